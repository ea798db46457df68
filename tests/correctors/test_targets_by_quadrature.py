"""Corrected runs against quadrature.

One set-up for all targets and processes: Adams-Bashforth-Maruyama with z = 2 (one evaluation per step, as
Euler-Maruyama, whose step error alone is .033 at beta .5: see test_step_errors), 200 steps of a Karras grid from 20 to
.02, 512 particles, 64 or more groups. Everything is seeded. ``assert_right`` computes from the spread over groups how
often a right result would fail with another seed, and asks for 1e-5 or less; ``assert_wrong`` asks that the floor is
passed by as many standard errors.
"""

import numpy as np
import pytest
from analytic_targets import (
    ERRORS,
    Mixture,
    assert_right,
    assert_wrong,
    denoiser,
    estimated,
    estimates,
    karras,
    moments,
    process_of,
    start,
    without_weights,
)

import diffsamp
from diffsamp.correctors import Corrector, Tilt, annealed, cfg, churned_heun, euler_maruyama, product

PROCESSES = ("ve", "vp", "flow")


def gauss(mean, variance):
    return Mixture([1.0], [mean], [variance])


def three_modes(scale=1.0):
    """(conditional, unconditional) of equal weights and different spreads: guidance moves mass between the modes."""
    means, square = [-2.0 * scale, 0.0, 2.0 * scale], scale * scale
    spreads = ([0.4, 0.4, 0.25], [0.5, 0.5, 1.0])
    return [Mixture([0.35, 0.3, 0.35], means, [v * square for v in values]) for values in spreads]


PAIR = [gauss(-1, 1), gauss(2, 0.5)]
GUIDED = [gauss(2, 1), gauss(0, 4)]
GUIDED_FURTHER = [gauss(3, 1), gauss(0, 4)]

# target, experts, groups with and without weights, bars of the corrected |bias| (mean, variance, mass), floors of the
# uncorrected one (0: not asked)
CASES = {
    "anneal-0.5": (annealed(0.5), [gauss(0, 1)], 384, 64, (0.03, 0.03, 0.02), (0, 1.0, 0)),
    "anneal-2": (annealed(2.0), [gauss(0, 1)], 96, 96, (0.03, 0.03, 0.02), (0, 0.06, 0)),
    "anneal-3": (annealed(3.0), [gauss(0, 1)], 96, 64, (0.03, 0.03, 0.02), (0, 0.06, 0)),
    "product": (product(2), PAIR, 64, 64, (0.03, 0.03, 0.02), (0.09, 0.04, 0)),
    "root-of-product": (product(2, 0.5), PAIR, 96, 64, (0.03, 0.03, 0.02), (0.09, 0, 0.04)),
    "cfg-gauss-2.5": (cfg(2.5), GUIDED, 64, 64, (0.04, 0.04, 0.02), (0.1, 0.06, 0)),
    "cfg-gauss-3": (cfg(3.0), GUIDED, 64, 64, (0.04, 0.04, 0.02), (0.1, 0.06, 0)),
    "cfg-mixture-3": (cfg(3.0), three_modes(), 64, 64, (0.15, 0.15, 0.02), (0.4, 0, 0.09)),
    "annealed-cfg-0.8": (cfg(2.5, 0.8), GUIDED_FURTHER, 64, 192, (0.04, 0.04, 0.02), (0.1, 0.06, 0)),
    "annealed-cfg-1.5": (cfg(2.5, 1.5), GUIDED_FURTHER, 64, 64, (0.04, 0.04, 0.02), (0.1, 0.06, 0)),
}


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("name", CASES)
def test_corrected_run_has_the_moments_of_the_target_and_the_bare_drift_has_not(name, kind):
    target, experts, groups, bare, bars, floors = CASES[name]
    corrector = Corrector(target, 512, 0.9, rule="trapezoid")
    corrected, bare, exact = estimated(
        corrector, experts, target.powers, process_of(kind), groups=groups, bare=bare, seed=PROCESSES.index(kind)
    )
    assert_right(corrected, exact, bars)
    assert_wrong(bare, exact, floors)


@pytest.mark.parametrize("z", [1 / 3, 1.0, 2.0, 4.0])
def test_unweighted_annealing_has_the_closed_limit_of_its_drift(z):
    # v·z/(beta(1 + z) − 1): proves the kernel, not the weights.
    process, n, limit = process_of("ve"), 40_000, z / (3.0 * (1 + z) - 1)
    plan = euler_maruyama(process, karras(process, 400), z=z)
    x, generator = start(plan, n, 1)
    bare = without_weights(Corrector(annealed(3.0), 200))
    found = bare.run(plan, denoiser([gauss(0, 1)]), x, generator=generator).samples
    assert ERRORS * limit * (2 / n) ** 0.5 < 0.012  # the law is Gaussian: standard error of its variance
    assert abs(float(found.var()) - limit) < 0.012


@pytest.mark.parametrize("kind", PROCESSES)
def test_reward_tilt_moves_the_mean_to_its_closed_form(kind):
    # Modes N(m, v) of weight p become N(m + v, v) of weight p·exp(m + v/2): the mean is 2.583.
    q = Mixture([0.7, 0.3], [-2.0, 2.0], [0.747, 0.747])
    tilt = Tilt(lambda xt: xt[:, 0], 1.0, s_min=0.02, s_max=20.0)
    corrector = Corrector(None, 512, 0.9, potential=tilt, rule="trapezoid")
    corrected, bare, exact = estimated(
        corrector, [q], (1.0,), process_of(kind), groups=144, seed=PROCESSES.index(kind), extra=lambda x: x
    )
    assert abs(exact[0] - 2.583) < 1e-3
    assert_right(corrected, exact, (0.06, 0.06, 0.02))
    assert_wrong(bare, exact, (1.0, 1.0, 0.1))


def test_heun_with_churn_counts_the_net_move():
    # The scale of the data of EDM, as the sampler's own grid expects.
    experts, target, process, groups = three_modes(0.5), cfg(3.0), process_of("ve"), 64
    plan = churned_heun(process, karras(process, 64, high=80.0, low=0.002), churn=40.0)
    exact = np.array(moments(experts, target.powers, plan.last_level.noise_to_signal))

    def run(corrector, plan):
        x, generator = start(plan, groups * 256, 0)
        result = corrector.run(plan, denoiser(experts), x, generator=generator)
        return estimates(result, 1.0, groups)[:, :1]

    assert_right(run(Corrector(target, 256, 0.7, rule="trapezoid"), plan), exact[:1], (0.08,))
    assert_wrong(run(without_weights(Corrector(target, 256, 0.7)), plan), exact[:1], (0.2,))
    # Left points: the unsigned rule is h/2·N with h = s_hat² − s'².
    assert_wrong(run(Corrector(target, 256, 0.7, rule="left"), unsigned(plan)), exact[:1], (0.3,))


def unsigned(plan):
    """The plan with spans as if every move down were counted without the move up before it."""
    from diffsamp.correctors.spans import Span, spans

    made, top = [], 0.0
    for row, span in zip(plan.rows, spans(plan), strict=True):
        top = row.level.noise_to_signal if span.opens else top
        made.append(Span(span.opens, top, span.stop if span.stop < span.start else top, span.churn))
    fresh = churned_heun(plan.process, plan.grid, churn=40.0)
    fresh.__dict__["_spans"] = tuple(made)
    return fresh


def test_gathered_history_keeps_a_second_order_solver_right():
    target, experts, groups = cfg(3.0), three_modes(), 64
    process = process_of("ve")
    exact = np.array(moments(experts, target.powers, 0.02))

    def run(kind):
        plan = diffsamp.solver("sde-dpmpp-2m", lower_order_final=False)(process, karras(process, 20))
        x, generator = start(plan, groups * 512, 0)
        result = kind(target, 512, 0.9, rule="trapezoid").run(plan, denoiser(experts), x, generator=generator)
        return estimates(result, 1.0, groups)[:, :1]

    assert_right(run(Corrector), exact[:1], (0.15,))
    assert_wrong(run(Broken), exact[:1], (2.0,))


class Broken(Corrector):
    """Leaves the solver's history where it was."""

    def _gather(self, run, accounts, moved, flat):
        made, accounts, moved = super()._gather(run, accounts, moved, flat)
        return diffsamp.engine.State(made.index, made.input, made.base, run.history), accounts, moved
