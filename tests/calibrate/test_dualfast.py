"""DualFast as a table: identities to rounding, and its gains and losses on analytic models.

Seeded, no statistical bound.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

from diffsamp import engine
from diffsamp.calibrate import Reference, search_constants
from diffsamp.calibrate.search import mse
from diffsamp.errors import DiffsampError
from diffsamp.grids import Grid, grid
from diffsamp.process import Process
from diffsamp.registry import solver
from diffsamp.solvers.dualfast import dualfast
from diffsamp.testing import toys

VP = Process.vp("scaled_linear", 0.00085, 0.012)
# The page's schedule: linear beta 0.1 to 20 over t in (0, 1], as a fine table.
CONTINUOUS = Process.vp(alphas_cumprod=np.exp(-0.1 * (t := np.linspace(0.001, 1, 4000)) - 9.95 * t**2))
BASES = ["ddim", "dpmpp-2m", "dpmpp-3m", "unipc", "deis", "ipndm"]


def field(x: np.ndarray, t: float) -> np.ndarray:
    return np.tanh(x * (1 + t / 1000)) + 0.3 * np.sin(x + t)


def run(plan, x: np.ndarray, epsilon=field) -> np.ndarray:
    def output(i, row, now):
        e = epsilon(now, row.level.t)
        return e if plan.form == "epsilon" else (now - row.level.sigma * e) / row.level.alpha

    return plan.simulate(x, output)


X = np.random.default_rng(0).normal(size=6)


@pytest.mark.parametrize("base", BASES)
def test_constant_zero_is_the_base_exactly(base):
    plan = solver(base)(VP, grid("linspace", VP, 7))
    for tau in ("first", "previous", 2):
        for mode in ("first-order", "all"):
            assert dualfast(plan, c=0.0, tau=tau, mode=mode).rows == plan.rows


@pytest.mark.parametrize("mode", ["first-order", "all"])
@pytest.mark.parametrize("tau", ["first", "previous", 2])
@pytest.mark.parametrize("base", BASES)
def test_constant_noise_field_is_not_changed_by_any_constant(base, tau, mode):
    plan = solver(base)(VP, grid("linspace", VP, 7))
    pushed = dualfast(plan, c=0.4, tau=tau, mode=mode)
    still = np.linspace(-1, 1, 6)
    base_end = run(plan, X, lambda x, t: still)
    assert np.abs(run(pushed, X, lambda x, t: still) - base_end).max() < 1e-12 * np.abs(base_end).max()
    assert pushed.fingerprint != plan.fingerprint


def test_ddim_with_half_the_step_ratio_is_second_order_dpm_solver():
    g = grid("linspace", VP, 8, final="sigma_min")
    h = np.diff([level.lambda_ for level in g.levels])
    plan = dualfast(solver("ddim")(VP, g), tau="previous", c=(0, *(h[1:] / (2 * h[:-1]))))
    x, old = X, None
    for i in range(8):
        s, t = g.levels[i], g.levels[i + 1]
        e = field(x, s.t)
        mixed = e if old is None else e + h[i] / (2 * h[i - 1]) * (e - old)
        x, old = t.alpha / s.alpha * x - t.sigma * math.expm1(h[i]) * mixed, e
    assert np.abs(run(plan, X) - x).max() < 1e-12


@pytest.mark.parametrize("base", ["ddim", "dpmpp-2m", "deis", "unipc"])
@pytest.mark.parametrize("tau", ["first", "previous", 3])
def test_first_order_mode_adds_the_same_term_to_every_solver(base, tau):
    """At the step where it acts first: x' − x = −(alpha_t sigma_s / alpha_s − sigma_t)·c·(e − e_tau)."""
    n, at, c = 7, 4, 0.3
    plan = solver(base)(VP, grid("linspace", VP, n))
    pushed = dualfast(plan, tau=tau, c=[c if i == at else 0.0 for i in range(n)])
    seen = {}
    for name, one in (("base", plan), ("pushed", pushed)):
        inputs, noises = [], []

        def output(i, row, now, inputs=inputs, noises=noises, one=one):
            inputs.append(now)
            noises.append(field(now, row.level.t))
            return noises[-1] if one.form == "epsilon" else (now - row.level.sigma * noises[-1]) / row.level.alpha

        one.simulate(X, output)
        seen[name] = (inputs, noises)
    s, t = plan.grid.levels[at], plan.grid.levels[at + 1]
    lag = {"first": 0, "previous": at - 1, 3: at - 3}[tau]
    noises = seen["base"][1]
    expected = -(t.alpha * s.sigma / s.alpha - t.sigma) * c * (noises[at] - noises[lag])
    assert np.abs(seen["pushed"][0][at + 1] - seen["base"][0][at + 1] - expected).max() < 1e-12


@pytest.mark.parametrize("tau", ["first", "previous", 2])
def test_mode_all_equals_the_base_run_on_mixed_predictions(tau):
    """Second-order DPM-Solver++ written out with every output mixed, against the table."""
    g, n = grid("linspace", VP, 7, final="sigma_min"), 7
    c = (0.0, *np.linspace(0.1, 0.4, n - 1))
    plan = dualfast(solver("dpmpp-2m")(VP, g), tau=tau, c=c, mode="all")
    plain = solver("dpmpp-2m")(VP, g)
    noises, x, history = [], X, []
    for i, row in enumerate(plain.rows):
        e = field(x, row.level.t)
        noises.append(e)
        lag = {"first": 0, "previous": max(i - 1, 0), 2: max(i - 2, 0)}[tau]
        mixed = (1 + c[i]) * e - c[i] * noises[lag]
        history.insert(0, (x - row.level.sigma * mixed) / row.level.alpha)
        x = row.advance.base * x + sum(w * m for w, m in zip(row.advance.m, history, strict=False))
    assert np.abs(run(plan, X) - x).max() < 1e-11


@pytest.mark.parametrize("base", BASES)
def test_first_step_is_never_changed(base):
    plan = solver(base)(VP, grid("linspace", VP, 6))
    for tau in ("first", "previous", 2):
        assert dualfast(plan, c=0.9, tau=tau, schedule="constant").rows[0].advance == plan.rows[0].advance


@pytest.mark.parametrize("process", [VP, Process.ve(), Process.flow()], ids=["vp", "ve", "flow"])
def test_prediction_types_of_one_field_give_one_trajectory(process):
    name = "karras" if process.kind == "ve" else "linspace"
    plan = dualfast(solver("dpmpp-2m")(process, grid(name, process, 6)), c=0.3, schedule="constant")
    x = torch.from_numpy(X)[None] * plan.first_level.sigma
    ends = []
    for kind in ("epsilon", "sample", "v_prediction", "flow_prediction"):

        def network(x, level, kind=kind):
            e = torch.tanh(x / (1 + level.noise_to_signal))
            p, q = process.epsilon_coefficients(level, kind)
            return (e - p * x) / q

        ends.append(engine.sample(plan, network, x, prediction=kind))
    for other in ends[1:]:
        assert ((other - ends[0]).abs() / (1 + ends[0].abs())).max() < 1e-5


def test_calls_equal_the_base_and_the_pin_holds_one_tensor_in_epsilon_form():
    base = solver("deis")(VP, grid("linspace", VP, 8))
    plan = dualfast(base, c=0.3, tau="first")
    assert plan.nfe == base.nfe and plan.depth == base.depth
    assert [row.keep_pin for row in plan.rows] == [True] + [False] * 7
    assert dualfast(base, c=0.3, tau=3).depth <= max(base.depth, 4)


@pytest.mark.parametrize(
    ("base", "words"), [("heun", "not a multistep"), ("dpmpp-2s", "not a multistep"), ("sde-dpmpp-2m", "draws noise")]
)
def test_bases_with_noise_or_two_calls_per_step_are_refused(base, words):
    with pytest.raises(DiffsampError, match=words):
        dualfast(solver(base)(VP, grid("linspace", VP, 6)), c=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tau": "next"}, "first, previous"), ({"tau": 0}, "first, previous"), ({"mode": "both"}, "first-order, all"),
        ({"c": [0.1, 0.2]}, "got 2 constants"), ({"c": float("nan")}, "finite"), ({"c": 0.1, "schedule": "up"}, "ramp"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, words):
    with pytest.raises(DiffsampError, match=words):
        dualfast(solver("ddim")(VP, grid("linspace", VP, 6)), **options)


def test_large_constant_under_strong_guidance_warns():
    with pytest.warns(UserWarning, match="blow up"):
        dualfast(solver("dpmpp-2m")(VP, grid("linspace", VP, 6)), c=0.3, guidance_scale=7.5)


@pytest.mark.parametrize(
    "order",
    ["dc(dualfast(unipc,c=0.3),ratios=[1;1;0.9;1.1;1.6])", "dualfast(dc(unipc,ratios=[1;1;0.9;1.1;1.6]),c=0.3)"],
)
def test_compositions_with_compensation_solve_a_point_exactly(order):
    toy = toys.point(d=6)
    plan = solver(order)(VP, grid("linspace", VP, 5, final="sigma_min"))
    x = toy.noise(3, 0)[0]
    exact = plan.last_level.alpha * toy.means + plan.last_level.sigma / plan.first_level.sigma * (
        x - plan.first_level.alpha * toy.means
    )
    assert (engine.sample(plan, toy.denoiser(), x) - exact).abs().max() < 1e-12


# -- gains and losses with the exact score ----------------------------------------------------------------------------


@cache
def ring() -> tuple:
    toy = toys.rings(8, 0.1)
    x = toy.noise(512, 0)[0]
    ends = [CONTINUOUS.level_at(3999), CONTINUOUS.level_at(0)]
    reference = Reference(CONTINUOUS, ends, toy.denoiser(), x * ends[0].sigma, steps=600)
    return toy.denoiser(), x * ends[0].sigma, reference.at(ends[1])


def ratio(base: str, spacing: str, n: int, c: float, tau: str = "first") -> float:
    denoiser, x, exact = ring()
    if spacing == "time":
        levels = [CONTINUOUS.level_at(v) for v in np.linspace(3999, 0, n + 1)]
    else:
        ends = [CONTINUOUS.level_at(3999).lambda_, CONTINUOUS.level_at(0).lambda_]
        levels = [CONTINUOUS.level_at_lambda(v) for v in np.linspace(*ends, n + 1)]
    plan = solver(base)(CONTINUOUS, Grid(CONTINUOUS, tuple(levels)))
    pushed = dualfast(plan, c=c, tau=tau, schedule="constant")
    return mse(engine.sample(pushed, denoiser, x), exact) / mse(engine.sample(plan, denoiser, x), exact)


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def test_gain_on_ddim_and_the_sign_of_the_constant():
    assert geometric_mean([ratio("ddim", "logsnr", n, 0.3) for n in (5, 6, 8, 10)]) <= 0.35
    assert geometric_mean([ratio("ddim", "time", n, 0.3) for n in (5, 6, 8, 10)]) <= 0.75
    assert all(ratio("ddim", "logsnr", n, -0.1) > 1 for n in (5, 6, 8, 10))


def test_loss_on_a_second_order_solver_is_on_record():
    assert ratio("dpmpp-2m", "logsnr", 8, 0.3) > 1


def test_default_constant_stays_near_the_base_under_strong_guidance():
    toy = toys.img()
    x, labels = toy.noise(32, 3)
    for n in (8, 10):
        plan = solver("dpmpp-2m")(VP, grid("logsnr", VP, n))
        denoiser = toy.denoiser(labels, 7.5)
        base, ours = engine.sample(plan, denoiser, x), engine.sample(dualfast(plan), denoiser, x)
        assert float(ours.square().mean().sqrt()) < 1.2 * float(base.square().mean().sqrt())


@pytest.mark.parametrize("base", ["ddim", "dpmpp-2m"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_calibrated_constants_never_lose_on_the_calibration_set(base, scale):
    toy = toys.img()
    x, labels = toy.noise(10, 5)
    plan = solver(base)(VP, grid("linspace", VP, 6))
    denoiser = toy.denoiser(labels, scale)
    reference = Reference(VP, plan.grid.levels, denoiser, x, steps=300)
    result = search_constants(plan, reference, denoiser, x)
    assert result.after <= result.before
    made = engine.sample(dualfast(plan, c=result.values), denoiser, x)
    assert mse(made, reference.at(plan.last_level)) == pytest.approx(result.after, rel=1e-9)
    if base == "ddim":
        assert result.after < 0.7 * result.before


def test_two_runs_in_a_row_leak_nothing():
    toy = toys.img()
    plan = dualfast(solver("deis")(VP, grid("linspace", VP, 5)), c=0.3)
    first = toy.noise(3, 0)[0]
    other = toy.noise(5, 1)[0]
    a = engine.sample(plan, toy.denoiser(), first)
    engine.sample(plan, toy.denoiser(), other)
    assert torch.equal(engine.sample(plan, toy.denoiser(), first), a)
