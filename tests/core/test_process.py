"""Processes: exact conversions between predictions, clocks that invert, and refusals."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import diffsamp
from diffsamp.errors import DiffsampError
from diffsamp.process import ZERO_SNR_FLOOR

PROCESSES = [
    diffsamp.Process.vp("scaled_linear", 0.00085, 0.012),
    diffsamp.Process.vp("squaredcos_cap_v2"),
    diffsamp.Process.vp_continuous(),
    diffsamp.Process.ve(),
    diffsamp.Process.flow(3.0),
]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_a_prediction_does_not_convert_back_to_x0_and_epsilon(process, prediction):
    for ratio in (1e-2, 0.5, 3.0):
        level = process.level(ratio)
        x0, epsilon = 0.7, -1.3
        x = level.alpha * x0 + level.sigma * epsilon
        raw = {
            "epsilon": epsilon, "sample": x0, "v_prediction": level.alpha * epsilon - level.sigma * x0,
            "flow_prediction": epsilon - x0,
        }[prediction]  # fmt: skip
        p, q = process.x0_coefficients(level, prediction)
        assert p * x + q * raw == pytest.approx(x0, rel=1e-12)
        p, q = process.epsilon_coefficients(level, prediction)
        assert p * x + q * raw == pytest.approx(epsilon, rel=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_clock_does_not_invert(process):
    for ratio in (0.05, 1.0, 9.0):
        level = process.level(ratio)
        again = process.level_at(level.t)
        assert again.noise_to_signal == pytest.approx(ratio, rel=1e-9)
        assert float(process.alpha(level.t)) == pytest.approx(level.alpha, rel=1e-9)
        assert float(process.sigma(level.t)) == pytest.approx(level.sigma, rel=1e-9)


def test_variance_is_not_preserved():
    t = np.linspace(0, 999, 77)
    process = PROCESSES[0]
    assert np.allclose(process.alpha(t) ** 2 + process.sigma(t) ** 2, 1, atol=1e-14)
    flow = PROCESSES[4]
    assert np.allclose(flow.alpha(t) + flow.sigma(t), 1, atol=1e-14)


def test_the_table_is_not_that_of_diffusers():
    import diffusers

    stock = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours = PROCESSES[0].alpha(np.arange(1000)) ** 2
    assert np.allclose(ours, stock.alphas_cumprod.numpy(), rtol=3e-6)


def test_zero_terminal_snr_is_lost():
    process = diffsamp.Process.vp("scaled_linear", 0.00085, 0.012, rescale_betas_zero_snr=True)
    assert process.level_at(999).alpha ** 2 == pytest.approx(ZERO_SNR_FLOOR, rel=1e-9)
    assert process.level_at(0).noise_to_signal == pytest.approx(PROCESSES[0].level_at(0).noise_to_signal, rel=1e-9)


def test_processes_are_mutable_or_do_not_survive_copying():
    process = PROCESSES[0]
    with pytest.raises(AttributeError):
        process.kind = "ve"
    assert copy.deepcopy(process) == process and pickle.loads(pickle.dumps(process)) == process
    assert len({hash(p) for p in PROCESSES}) == len(PROCESSES)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: diffsamp.Process.vp("cubic"), "beta_schedule"),
        (lambda: diffsamp.Process.ve(2.0, 1.0), "sigma_min"),
        (lambda: diffsamp.Process.flow(0.0), "shift"),
        (lambda: diffsamp.Process.vp(alphas_cumprod=[0.5, 0.9]), "alphas_cumprod"),
        (lambda: PROCESSES[0].x0_coefficients(PROCESSES[0].level(1.0), "score"), "prediction"),
    ],
)
def test_bad_input_is_accepted_or_not_named(build, word):
    with pytest.raises(DiffsampError, match=word):
        build()
