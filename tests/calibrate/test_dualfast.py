"""DualFast as a table: identities to rounding, and its gains and losses on analytic models.

Seeded, no statistical bound.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from sklearn.datasets import load_digits

from diffsamp import engine
from diffsamp.adapters.diffusers import scheduler_class
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("base", BASES)
def test_scheduler_with_constant_zero_is_the_base_scheduler_bit_for_bit(base, kind, dtype):
    config = {"process": "flow"} if kind == "flow_prediction" else {}
    ends = []
    for name in (base, f"dualfast({base},c=0)"):
        scheduler = scheduler_class(solver(name).info.name)(**config, prediction_type=kind, solver=name)
        scheduler.set_timesteps(6)
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends)


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


def test_ddim_with_half_the_step_ratio_is_dpm_solver_of_diffusers():
    stock = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver", solver_order=2, lower_order_final=False, final_sigmas_type="sigma_min",
    )  # fmt: skip
    stock.set_timesteps(8)
    process = Process.vp()
    levels = [process.level_at(float(t)) for t in [*stock.timesteps, 0.0]]
    g = Grid(process, tuple(levels))
    # The same noise levels in double precision: its own float32 ones are worth 2e-6 after eight steps.
    stock.sigmas = torch.tensor([level.noise_to_signal for level in levels], dtype=torch.float64)
    h = np.diff([level.lambda_ for level in g.levels])
    plan = dualfast(solver("ddim")(process, g), tau="previous", c=(0, *(h[1:] / (2 * h[:-1]))))
    x = y = torch.from_numpy(X)[None]
    state = engine.init(plan, y)
    for t, row in zip(stock.timesteps, plan.rows, strict=True):
        x = stock.step(torch.from_numpy(field(x.numpy(), float(t))), t, x).prev_sample
        e = torch.from_numpy(field(state.input.numpy(), row.level.t))
        state = engine.step(plan, state, e, prediction="epsilon")
    assert (state.input - x).norm() <= 1e-6 * x.norm()


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


@pytest.mark.parametrize("name", ["deis", "ddim", "dpmpp-2m", "dpmpp-3m", "unipc"])
def test_calls_and_memory_equal_the_base_s_and_one_pinned_tensor(name):
    base = solver(name)(VP, grid("linspace", VP, 20))
    plan = dualfast(base, c=0.3, tau="first")
    assert plan.nfe == base.nfe and plan.depth == base.depth
    assert [bool(row.keep_pin) for row in plan.rows] == [True] + [False] * 19
    if plan.form == "epsilon":
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


ENDS = (CONTINUOUS.level_at(3999), CONTINUOUS.level_at(0))


@cache
def digits_toy(spread: float = 0.15) -> toys.Mixture:
    """A Gaussian of this width on each of sklearn's digits, in [-1, 1]."""
    data, labels = load_digits(return_X_y=True)
    variance = torch.full((64,), spread**2, dtype=torch.float64)
    return toys.Mixture(torch.tensor(data / 8 - 1), torch.tensor(labels), variance, (64,))


@cache
def world(name: str) -> tuple:
    """(exact denoiser, start, end of a fine run)."""
    toy, n, steps = (toys.rings(8, 0.1), 512, 600) if name == "ring" else (digits_toy(), 1024, 100)
    # Digits in single precision: their errors are above 1e-2, and 1797 components take time.
    x = toy.noise(n, 0 if name == "ring" else 11)[0] * ENDS[0].sigma
    x = x if name == "ring" else x.float()
    reference = Reference(CONTINUOUS, ENDS, toy.denoiser(), x, steps=steps)
    return toy.denoiser(), x, reference.at(ENDS[1])


@cache
def ratio(base: str, spacing: str, n: int, c: float, tau: str = "first", data: str = "ring") -> float:
    denoiser, x, exact = world(data)
    if spacing == "time":
        levels = [CONTINUOUS.level_at(v) for v in np.linspace(3999, 0, n + 1)]
    else:
        levels = [CONTINUOUS.level_at_lambda(v) for v in np.linspace(ENDS[0].lambda_, ENDS[1].lambda_, n + 1)]
    plan = solver(base)(CONTINUOUS, Grid(CONTINUOUS, tuple(levels)))
    pushed = dualfast(plan, c=c, tau=tau, schedule="constant")
    return mse(engine.sample(pushed, denoiser, x), exact) / mse(engine.sample(plan, denoiser, x), exact)


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


@pytest.mark.parametrize(("data", "spacing", "most"), [
    ("ring", "logsnr", 0.35), ("ring", "time", 0.75), ("digits", "logsnr", 0.85), ("digits", "time", 0.75),
])  # fmt: skip
def test_gain_on_ddim_with_the_exact_score(data, spacing, most):
    assert geometric_mean([ratio("ddim", spacing, n, 0.3, data=data) for n in (5, 6, 8, 10)]) <= most


@pytest.mark.parametrize("data", ["ring", "digits"])
def test_negative_constant_loses_everywhere(data):
    assert all(ratio("ddim", "logsnr", n, -0.1, data=data) > 1 for n in (5, 6, 8, 10))


def test_loss_on_a_second_order_solver_is_on_record():
    # Measured 5 times the base's error; the method is no gain where the base has no error of first order left.
    assert ratio("dpmpp-2m", "logsnr", 8, 0.3) > 1


def class_gaussians() -> toys.Mixture:
    """One Gaussian per class of the digits: the class's mean and the pooled variance within classes."""
    toy = digits_toy()
    means = torch.stack([toy.means[toy.labels == c].mean(0) for c in range(10)])
    within = (toy.means - means[toy.labels]).square().mean(0) + 0.02
    return toys.Mixture(means, torch.arange(10), within, (64,))


@pytest.mark.parametrize("n", [8, 10])
def test_default_constant_keeps_the_size_of_strongly_guided_samples_and_a_large_one_does_not(n):
    toy = class_gaussians()
    x, labels = toy.noise(128, 3)
    levels = [CONTINUOUS.level_at_lambda(v) for v in np.linspace(ENDS[0].lambda_, ENDS[1].lambda_, n + 1)]
    plan, denoiser = solver("dpmpp-2m")(CONTINUOUS, Grid(CONTINUOUS, tuple(levels))), toy.denoiser(labels, 7.5)

    def size(one) -> float:
        return float(engine.sample(one, denoiser, x * ENDS[0].sigma).square().mean().sqrt())

    assert size(dualfast(plan)) < 1.2 * size(plan)
    if n == 8:
        assert size(dualfast(plan, c=0.3, schedule="constant")) > 1.2 * size(plan)


def test_default_constant_stays_near_the_base_under_strong_guidance():
    toy = toys.img()
    x, labels = toy.noise(32, 3)
    for n in (8, 10):
        plan = solver("dpmpp-2m")(VP, grid("logsnr", VP, n))
        denoiser = toy.denoiser(labels, 7.5)
        base, ours = engine.sample(plan, denoiser, x), engine.sample(dualfast(plan), denoiser, x)
        assert float(ours.square().mean().sqrt()) < 1.2 * float(base.square().mean().sqrt())


@pytest.mark.parametrize("base", ["ddim", "dpmpp-2m", "deis"])
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


def test_two_runs_of_one_scheduler_with_other_seeds_and_shapes_leak_nothing():
    def run(scheduler, seed: int, shape: tuple[int, ...], n: int) -> torch.Tensor:
        scheduler.set_timesteps(n)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
        return x

    for tau in ("first", "previous", 2):
        options = {"solver": f"dualfast(deis,c=0.3,tau={tau})"}
        one = scheduler_class("dualfast")(**options)
        for job in ((0, (2, 3, 4, 4), 6), (1, (5, 1, 8, 8), 9), (2, (1, 7), 5)):
            assert torch.equal(run(one, *job), run(scheduler_class("dualfast")(**options), *job))


def test_two_runs_in_a_row_leak_nothing():
    toy = toys.img()
    plan = dualfast(solver("deis")(VP, grid("linspace", VP, 5)), c=0.3)
    first = toy.noise(3, 0)[0]
    other = toy.noise(5, 1)[0]
    a = engine.sample(plan, toy.denoiser(), first)
    engine.sample(plan, toy.denoiser(), other)
    assert torch.equal(engine.sample(plan, toy.denoiser(), first), a)
