"""Corrected runs against quadrature. Everything is seeded; the bars are 3 to 10 standard errors of the estimates."""

import numpy as np
import pytest
import torch
from analytic_targets import (
    Mixture,
    denoiser,
    estimates,
    karras,
    moments,
    process_of,
    run_biases,
    start,
)

import diffsamp
from diffsamp.correctors import Corrector, Tilt, annealed, cfg, churned_heun, euler_maruyama, product


def gauss(mean, variance):
    return Mixture([1.0], [mean], [variance])


# target, experts, bars of the corrected |bias| (mean, variance, mass), floors of the uncorrected (0: not asked)
CASES = {
    "anneal-0.5": (annealed(0.5), [gauss(1, 1)], (0.06, 0.12, 0.03), (0, 1.0, 0)),
    "anneal-2": (annealed(2.0), [gauss(1, 1)], (0.03, 0.03, 0.02), (0, 0.06, 0)),
    "anneal-3": (annealed(3.0), [gauss(1, 1)], (0.03, 0.03, 0.02), (0, 0.06, 0)),
    "product": (product(2), [gauss(0, 2), gauss(2, 0.5)], (0.03, 0.03, 0.02), (0.09, 0.04, 0)),
    "geometric": (product(2, 0.5), [gauss(0, 2), gauss(2, 0.5)], (0.06, 0.1, 0.02), (0, 0, 0)),
    "cfg-gauss": (cfg(2.5), [gauss(1.9, 1.1), gauss(0, 3.1)], (0.04, 0.04, 0.02), (0.1, 0.055, 0)),
    "cfg-mixture": (
        cfg(3.0),
        [
            Mixture([0.35, 0.3, 0.35], [-2, 0, 2], [0.4, 0.4, 0.25]),
            Mixture([0.35, 0.3, 0.35], [-2, 0, 2], [0.5, 0.5, 0.87]),
        ],
        (0.15, 0.2, 0.02),
        (0.4, 0, 0.09),
    ),
    "annealed-cfg": (cfg(2.5, 1.5), [gauss(1.9, 1.1), gauss(0, 3.1)], (0.04, 0.04, 0.02), (0.1, 0.03, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_corrected_run_has_the_moments_of_the_target_and_the_bare_drift_has_not(name):
    target, experts, bars, floors = CASES[name]
    corrector = Corrector(target, 512, 0.9, rule="trapezoid")
    corrected, bare = run_biases(corrector, experts, target.powers, process_of("ve"))
    assert (np.abs(corrected) < bars).all(), corrected
    assert (np.abs(bare) >= floors).all(), bare


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("name", ["anneal-3", "product", "cfg-gauss"])
def test_other_processes_reach_the_same_target(kind, name):
    target, experts, bars, floors = CASES[name]
    corrector = Corrector(target, 512, 0.9, rule="trapezoid")
    corrected, bare = run_biases(corrector, experts, target.powers, process_of(kind), groups=12, bare_groups=6)
    assert (np.abs(corrected) < 1.5 * np.array(bars)).all(), corrected
    assert (np.abs(bare) >= 0.8 * np.array(floors)).all(), bare


@pytest.mark.parametrize("z", [1 / 3, 1.0, 2.0, 4.0])
def test_unweighted_annealing_has_the_closed_limit_of_its_drift(z):
    # v·z/(beta(1 + z) − 1): proves the kernel, not the weights. 20,000 samples: standard error below .003.
    process = process_of("ve")
    plan = euler_maruyama(process, karras(process, 800), z=z)
    x, generator = start(plan, 20_000, 1)
    bare = Corrector(annealed(3.0), 2, window=(1e9, 2e9))
    found = bare.run(plan, denoiser([gauss(0, 1)]), x, generator=generator).samples
    assert abs(float(found.var()) - z / (3.0 * (1 + z) - 1)) < 0.012


def test_reward_tilt_moves_the_mean_to_its_closed_form_and_the_gradient_alone_does_not():
    q = Mixture([0.5, 0.3, 0.2], [-2.0, 0.5, 3.0], [0.5, 0.5, 0.5])
    process = process_of("ve")
    tilt = Tilt(lambda xt: xt[:, 0], 1.0, s_min=0.02, s_max=20.0)
    corrector = Corrector(None, 512, 0.9, potential=tilt, rule="trapezoid")
    corrected, bare = run_biases(corrector, [q], (1.0,), process, groups=24, extra=lambda x: x)
    assert abs(corrected[0]) < 0.06, corrected
    assert abs(bare[0]) > 1.0, bare


def test_heun_with_churn_counts_the_net_move():
    cond = Mixture([0.2, 0.45, 0.35], [-0.9, 0.0, 0.9], [0.06, 0.06, 0.05])
    uncond = Mixture([0.3, 0.4, 0.3], [-0.9, 0.0, 0.9], [0.1, 0.1, 0.16])
    target, process = cfg(3.0), process_of("ve")
    grid = karras(process, 64, high=80.0, low=0.002)
    plan = churned_heun(process, grid, churn=40.0)
    x, generator = start(plan, 24 * 256, 0)
    result = Corrector(target, 256, 0.7, rule="trapezoid").run(plan, denoiser([cond, uncond]), x, generator=generator)
    exact = moments([cond, uncond], target.powers, plan.last_level.noise_to_signal)
    net = estimates(result, 1.0, 24).mean(0)
    assert abs(net[0] - exact[0]) < 0.08, (net, exact)
    assert abs(_unsigned(plan, target, [cond, uncond]) - exact[0]) > 0.25


def _unsigned(plan, target, experts):
    """The mean if every move down were counted without the move up before it."""
    from diffsamp.correctors.spans import Span, spans

    table = spans(plan)
    wrong = []
    for row, span in zip(plan.rows, table, strict=True):
        top = row.level.noise_to_signal if span.opens else None
        wrong.append(Span(span.opens, top or wrong[-1].start, span.stop, span.churn))
    fresh = churned_heun(plan.process, plan.grid, churn=40.0)
    # Per step: rows of one step share the raised start.
    fixed = []
    for i, span in enumerate(wrong):
        start_at = span.start if span.opens else wrong[i - 1].start
        stop = span.stop if span.stop < table[i].start else start_at
        fixed.append(Span(span.opens, start_at, stop, span.churn))
    fresh.__dict__["_spans"] = tuple(fixed)
    x, generator = start(fresh, 24 * 256, 0)
    # Left points: the unsigned rule is h/2·N with h = s_hat² − s'².
    result = Corrector(target, 256, 0.7, rule="left").run(fresh, denoiser(experts), x, generator=generator)
    return estimates(result, 1.0, 24).mean(0)[0]


def test_gathered_history_keeps_a_second_order_solver_right():
    target, experts, _, _ = CASES["cfg-mixture"]
    process = process_of("ve")
    exact = moments(experts, target.powers, 0.02)

    def bias(broken):
        plan = diffsamp.solver("sde-dpmpp-2m", lower_order_final=False)(process, karras(process, 20))
        x, generator = start(plan, 16 * 256, 0)
        corrector = Broken(target, 256, 1.0, rule="left") if broken else Corrector(target, 256, 1.0, rule="left")
        result = corrector.run(plan, denoiser(experts), x, generator=generator)
        return abs(estimates(result, 1.0, 16).mean(0)[0] - exact[0])

    right, wrong = bias(False), bias(True)
    assert right < 0.3, (right, wrong)
    assert wrong > 0.3 and wrong > 2 * right, (right, wrong)


class Broken(Corrector):
    """Leaves the solver's history where it was."""

    def _gather(self, run, accounts, moved, flat):
        made, accounts, moved = super()._gather(run, accounts, moved, flat)
        return diffsamp.engine.State(made.index, made.input, made.base, run.history), accounts, moved


@pytest.mark.parametrize("dims", [16, 64])
def test_share_of_the_guidance_bias_removed_grows_with_particles(dims):
    # Gaussians, w = 3, conditional variance .5: the target's variance is 1/(3/.5 − 2) = .25 in every direction.
    process = process_of("ve")
    s = 0.02
    exact = 1 / (3 / (0.5 + s * s) - 2 / (1 + s * s))

    def predict(x, level):
        s2 = level.noise_to_signal**2
        return x * (0.5 / (0.5 + s2)), x * (1.0 / (1.0 + s2))

    def variance(k, count=64):
        plan = euler_maruyama(process, karras(process, 100), z=1.0)
        x, generator = start(plan, count * k, 3, dims)
        corrector = Corrector(cfg(3.0), k, 1.0 if k > 1 else 0.5)
        result = corrector.run(plan, predict, x, generator=generator)
        return float(result.samples[torch.from_numpy(result.chosen)].square().mean())

    plain, few, many = (variance(k) for k in (1, 2, 16))
    shares = [(plain - v) / (plain - exact) for v in (few, many)]
    # One draw per group: the variance of dims·64 values has standard error .25·√(2/1024) = .011 at most.
    assert 0.1 < shares[0] < 0.7 and shares[1] > 0.6, shares
