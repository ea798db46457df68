"""Resampling schemes and log-weights: offspring, laws of slots, normalising constants, odd weights."""

import math

import numpy as np
import pytest
import scipy.stats

from diffsamp.correctors import resampling, weights
from diffsamp.errors import DiffsampError

SCHEMES = list(resampling.SCHEMES)


def counts(ancestors, particles):
    return np.stack([np.bincount(row, minlength=particles) for row in ancestors])


@pytest.mark.parametrize("name", SCHEMES)
def test_children_have_the_expected_number_and_every_slot_the_law_of_the_weights(name):
    generator = np.random.default_rng(0)
    w = np.array([0.05, 0.0, 0.45, 0.2, 0.3])
    n = 70_000
    found = resampling.SCHEMES[name](np.tile(w, (n, 1)), generator.random((n, 10)))
    children = counts(found, 5)
    assert (children.sum(1) == 5).all() and (children[:, 1] == 0).all()
    # False alarms below 1e-5 over all particles: the bars are `errors` standard errors or more. A slot's law is
    # binomial; the number of children varies most where it is multinomial, 5·w(1 − w).
    errors = scipy.stats.norm.isf(1e-5 / (2 * 15))
    assert errors * math.sqrt(5 * (w * (1 - w)).max() / n) < 0.025
    assert errors * math.sqrt((w * (1 - w)).max() / n) < 0.01
    assert np.abs(children.mean(0) - 5 * w).max() < 0.025
    for slot in (0, 4):
        assert np.abs(np.bincount(found[:, slot], minlength=5) / n - w).max() < 0.01
    if name in ("systematic", "ssp"):
        assert np.abs(children - 5 * w).max() < 1


@pytest.mark.parametrize("name", [s for s in SCHEMES if s != "multinomial"])
def test_equal_weights_keep_every_particle(name):
    u = np.random.default_rng(1).random((500, 14))
    found = resampling.SCHEMES[name](np.full((500, 7), 1 / 7), u)
    assert (np.sort(found, 1) == np.arange(7)).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_all_weight_on_one_particle_gives_only_that_particle(name):
    w = np.eye(6)
    found = resampling.SCHEMES[name](w, np.random.default_rng(2).random((6, 12)))
    assert (found == np.arange(6)[:, None]).all()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_normalising_constant_of_a_linear_gaussian_model_is_unbiased(name, threshold):
    # x0 ~ N(0, 1), x' = .8 x + .6 noise, y = x + noise/2; the likelihood of the ys by the Kalman filter. 1,000 runs.
    ys, runs, particles = (0.3, -0.4, 0.9, 1.2), 1000, 32
    mean, var, exact = 0.0, 1.0, 0.0
    for y in ys:
        total = var + 0.25
        exact += -0.5 * (y - mean) ** 2 / total - 0.5 * math.log(2 * math.pi * total)
        gain = var / total
        mean, var = 0.8 * (mean + gain * (y - mean)), 0.64 * (1 - gain) * var + 0.36
    generator = np.random.default_rng(3)
    x = generator.normal(size=(runs, particles))
    log_w, log_z = np.zeros((runs, particles)), np.zeros(runs)
    for y in ys:
        log_w += -0.5 * (y - x) ** 2 / 0.25 - 0.5 * math.log(2 * math.pi * 0.25)
        due = weights.ess(log_w) < threshold * particles
        ancestors = np.tile(np.arange(particles), (runs, 1))
        ancestors[due] = resampling.SCHEMES[name](
            weights.normalise(log_w[due]), generator.random((int(due.sum()), 2 * particles))
        )
        log_z += np.where(due, weights.log_mean(log_w), 0.0)
        log_w = np.where(due[:, None], 0.0, log_w)
        x = np.take_along_axis(x, ancestors, 1)
        x = 0.8 * x + 0.6 * generator.normal(size=x.shape)
    ratio = np.exp(log_z + weights.log_mean(log_w) - exact)
    errors = scipy.stats.t.isf(1e-5 / 2, runs - 1)
    assert abs(ratio.mean() - 1) < errors * ratio.std(ddof=1) / math.sqrt(runs)
    assert ratio.std() / math.sqrt(runs) < 0.02


def test_odd_weights_are_used_or_refused():
    assert np.allclose(weights.normalise([[0.0, -np.inf, 0.0]]), [[0.5, 0, 0.5]])
    assert np.allclose(weights.ess([[5.0, 5.0], [0.0, -np.inf]]), [2, 1])
    assert np.allclose(weights.log_mean([[-1e4, -1e4]]), -1e4)
    for bad, word in (([0.0, np.nan], "nan"), ([0.0, np.inf], "inf"), ([-np.inf, -np.inf], "weight 0")):
        with pytest.raises(DiffsampError, match=word) as error:
            weights.check(bad)
        assert "\n" not in str(error.value)
