"""DC-Solver: the table (exact checks) and the search on the analytic 8×8 toy.

Seeded; no bound is a statistical test.
"""

from __future__ import annotations

import statistics
from functools import cache

import numpy as np
import pytest
import torch

from diffsamp import engine
from diffsamp.calibrate import Cascade, Reference, fit_cascade, search_ratios
from diffsamp.calibrate.search import mse
from diffsamp.errors import DiffsampError
from diffsamp.grids import Grid, grid
from diffsamp.process import Process
from diffsamp.registry import solver
from diffsamp.solvers.dc import dc, lagrange_weights
from diffsamp.testing import toys

VP = Process.vp("scaled_linear", 0.00085, 0.012)
FLOW = Process.flow(shift=3.0)
NFE = (5, 6, 8, 10)
GAINS = {
    1.0: {5: 2.5, 6: 3.0, 8: 5.0, 10: 6.0},
    3.0: {5: 1.0, 6: 1.4, 8: 5.0, 10: 8.0},
    7.5: {5: 1.4, 6: 1.0, 8: 1.3, 10: 3.0},
}


def unipc(n: int, **options):
    return solver("unipc", disable_corrector=(0,), **options)(VP, grid("linspace", VP, n, final="sigma_min"))


@cache
def world(scale: float) -> dict:
    """Three draws of 10 search points and 64 held-out ones with one reference for all numbers of calls."""
    toy = toys.img()
    parts = [toy.noise(10, 100 + draw) for draw in range(3)] + [toy.noise(64, 7)]
    labels = torch.cat([label for _, label in parts])
    x = torch.cat([noise for noise, _ in parts]) * unipc(5).first_level.sigma
    levels = [level for n in NFE for level in unipc(n).grid.levels]
    reference = Reference(VP, levels, toy.denoiser(labels, scale), x, steps=400)
    return {"toy": toy, "labels": labels, "x": x, "reference": reference}


def found(scale: float, n: int, draw: int = 0, **options):
    w, part = world(scale), slice(10 * draw, 10 * draw + 10)
    denoiser = w["toy"].denoiser(w["labels"][part], scale)
    return search_ratios(unipc(n), w["reference"].of(part), denoiser, w["x"][part], **options)


def gain(scale: float, n: int, ratios) -> float:
    w, part = world(scale), slice(30, 94)
    denoiser, x = w["toy"].denoiser(w["labels"][part], scale), w["x"][part]
    goal = w["reference"].of(part).at(unipc(n).last_level)
    base = mse(engine.sample(unipc(n), denoiser, x), goal)
    return base / mse(engine.sample(dc(unipc(n), ratios=ratios), denoiser, x), goal)


# -- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("off", [(), (0,)])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ["linspace", "trailing", "flow"])
def test_ratio_one_is_the_base_exactly(name, order, variant, off, final):
    process = FLOW if name == "flow" else VP
    plan = solver("unipc", order=order, variant=variant, disable_corrector=off)(
        process, grid(name, process, 6, final=final)
    )
    assert dc(plan, ratios=[1.0] * plan.nfe).rows == plan.rows
    assert dc(plan).fingerprint == plan.fingerprint


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "dpmpp-3m", "deis", "unipc"])
def test_ratio_one_is_the_base_exactly_for_every_multistep_solver(name):
    plan = solver(name)(VP, grid("linspace", VP, 7))
    assert dc(plan, ratios=[1.0] * 7).rows == plan.rows


@pytest.mark.parametrize(("dtype", "step", "bound"), [(torch.float64, 1e-12, 1e-9), (torch.float32, 1e-6, 5e-5)])
def test_ratio_next_to_one_changes_next_to_nothing(dtype, step, bound):
    w = world(7.5)
    denoiser, x = w["toy"].denoiser(w["labels"][:10], 7.5), w["x"][:10].to(dtype)
    near = dc(unipc(8), ratios=[1.0, 1.0, *[1 + step] * 6])
    change = engine.sample(near, denoiser, x) - engine.sample(unipc(8), denoiser, x)
    assert change.dtype == dtype and 0 < change.abs().max() < bound


def test_first_order_is_ddim_and_euler_and_the_second_order_predictor_is_dpm_solver():
    w = world(3.0)
    denoiser, x = w["toy"].denoiser(w["labels"][:4], 3.0), w["x"][:4]

    def end(name: str, process=VP, **options) -> torch.Tensor:
        plan = solver(name, **options)(process, grid("linspace", process, 8, final="sigma_min"))
        return engine.sample(plan, denoiser, x * plan.first_level.sigma)

    one, two = {"order": 1, "corrector": False}, {"order": 2, "variant": "bh2", "corrector": False}
    assert (end("unipc", **one) - end("ddim")).abs().max() < 1e-12
    assert (end("unipc", **two) - end("dpmpp-2m")).abs().max() < 1e-12
    assert (end("unipc", FLOW, **one) - end("euler", FLOW)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [5, 10])
def test_arbitrary_ratios_equal_an_independent_implementation(n):
    """UniPC-2 (bh2, x0 form) with compensation, written out from the equations with a buffer."""
    w = world(7.5)
    denoiser, x = w["toy"].denoiser(w["labels"][:10], 7.5), w["x"][:10]
    ratios = [1.0, 1.0, *np.random.default_rng(n).uniform(0.4, 1.6, n - 2)]
    levels = unipc(n).grid.levels
    lam = [level.lambda_ for level in levels]
    base, buffer, point = x, [], x
    for i in range(n):
        m = denoiser(point, levels[i])
        s, t = levels[i], levels[i + 1]
        if i >= 2:  # corrector of the step i − 1, order 2; the first step has none
            r, h = levels[i - 1], lam[i] - lam[i - 1]
            r1 = (lam[i - 2] - lam[i - 1]) / h
            u = -h
            psi2 = np.expm1(u) / u - 1
            psi3 = psi2 / u - 0.5
            b = np.expm1(u)
            rho = np.linalg.solve([[1, 1], [r1, 1]], [psi2 / b, 2 * psi3 / b])
            m0, m1 = buffer[-1], buffer[-2]
            update = m0 * np.expm1(u) + b * (rho[0] * (m1 - m0) / r1 + rho[1] * (m - m0))
            base = s.sigma / r.sigma * base - s.alpha * update
        else:
            base = point
        buffer.append(m)
        if i >= 2 and ratios[i] != 1.0:
            times = [levels[i - j].t for j in range(3)]
            at = times[1] + ratios[i] * (times[0] - times[1])
            weights = [np.prod([(at - times[q]) / (times[j] - times[q]) for q in range(3) if q != j]) for j in range(3)]
            buffer[-1] = sum(weight * buffer[-1 - j] for j, weight in enumerate(weights))
        h = lam[i + 1] - lam[i]
        update = buffer[-1] * np.expm1(-h)
        if 0 < i < n - 1:
            r1 = (lam[i - 1] - lam[i]) / h
            update = update + np.expm1(-h) * 0.5 * (buffer[-2] - buffer[-1]) / r1
        point = t.sigma / s.sigma * base - t.alpha * update
    ours = engine.sample(dc(unipc(n), ratios=ratios), denoiser, x)
    assert (ours - point).abs().max() / point.abs().max() < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3])
def test_lagrange_weights_are_exact_for_polynomials(k):
    nodes, generator = [700.0, 812.0, 930.0, 999.0][: k + 1], np.random.default_rng(k)
    polynomial = np.polynomial.Polynomial(generator.normal(size=k + 1), domain=[700, 999])
    for at in (*generator.uniform(600, 1000, 5), nodes[1]):
        weights = lagrange_weights(nodes, at)
        assert sum(weights) == pytest.approx(1.0, abs=1e-12)
        assert np.dot(weights, polynomial(np.array(nodes))) == pytest.approx(polynomial(at), rel=1e-12, abs=1e-12)


def test_uniform_weights_have_the_closed_form_and_ratio_zero_is_the_previous_output():
    for ratio in (-1.0, 0.0, 0.4, 1.7):
        s = ratio - 1
        ours = lagrange_weights([3.0, 4.0, 5.0], 4.0 - ratio)
        assert np.allclose(ours, [(1 + s) * (2 + s) / 2, -s * (2 + s), s * (1 + s) / 2], atol=1e-13)
    assert lagrange_weights([3.0, 4.0, 5.0], 4.0) == (0.0, 1.0, 0.0)


def test_data_at_one_point_is_solved_exactly_by_any_ratios():
    toy = toys.point(d=64)
    x = toy.noise(4, 0)[0]
    plan = dc(unipc(5), ratios=[1, 1, 0.3, 1.9, -0.5])
    start, end = plan.first_level, plan.last_level
    exact = end.alpha * toy.means + end.sigma / start.sigma * (x - start.alpha * toy.means)
    assert (engine.sample(plan, toy.denoiser(), x) - exact).abs().max() < 1e-13


def test_compensated_output_stays_in_the_history():
    w = world(3.0)
    denoiser, x = w["toy"].denoiser(w["labels"][:4], 3.0), w["x"][:4]
    plan = dc(unipc(6), ratios=[1, 1, 1.4, 1, 1.2, 1])
    state, raw = engine.init(plan, x), []
    for i in range(4):
        raw.append(denoiser(state.input, plan.rows[i].level))
        state = engine.step(plan, state, raw[-1])
    weights = plan.rows[2].rewrite
    assert torch.equal(state.history[0], raw[3])
    assert torch.allclose(state.history[1], sum(v * m for v, m in zip(weights, raw[2::-1], strict=True)), atol=1e-13)
    assert not torch.allclose(state.history[1], raw[2], atol=1e-3)


def test_orders_of_base_and_of_a_fixed_ratio():
    """Smooth VP (beta 0.1 to 20), t from 1 to 0.05, 2-D rings: slopes of the rms error between 160 and 320 calls."""
    # 6400 entries: both grids fall on them, so no interpolation of the table spoils the third and fourth order.
    t = np.arange(1, 6401) / 6400
    process = Process.vp(alphas_cumprod=np.exp(-0.1 * t - 9.95 * t**2))
    toy = toys.rings(spread=0.5)
    x = toy.noise(16, 0)[0]

    def run(n: int, ratio: float | None, **options) -> torch.Tensor:
        levels = [process.level_at(v) for v in np.linspace(6399, 319, n + 1)]
        plan = solver("unipc", lower_order_final=False, **options)(process, Grid(process, tuple(levels)))
        if ratio is not None:
            plan = dc(plan, ratios=[1.0, 1.0, *[ratio] * (n - 2)])
        return engine.sample(plan, toy.denoiser(), x)

    exact = run(1900, None, order=3)

    def slope(ratio=None, **options) -> float:
        errors = [(run(n, ratio, **options) - exact).square().mean().sqrt() for n in (160, 320)]
        return float(torch.log2(errors[0] / errors[1]))

    assert slope(corrector=False) == pytest.approx(2.0, abs=0.15)
    assert slope() == pytest.approx(3.0, abs=0.2)
    assert slope(order=3) >= 3.5
    assert 1.0 <= slope(1.1) <= 1.4


@pytest.mark.parametrize(
    ("k", "ratio", "low", "high"), [(2, 1.30, 0, 5), (2, 1.45, 1e6, np.inf), (1, 1.9, 0, 5), (1, 2.1, 50, np.inf)]
)
def test_constant_ratio_is_stable_below_the_root_condition_only(k, ratio, low, high):
    """200 steps of DDIM on the 2-D toy: in place, the history is a recursive filter."""
    toy = toys.rings()
    plan = solver("ddim")(VP, grid("linspace", VP, 200, final="sigma_min"))
    plan = dc(plan, ratios=[*[1.0] * k, *[ratio] * (200 - k)], k=k)
    final = float(engine.sample(plan, toy.denoiser(), toy.noise(16, 0)[0]).abs().max())
    assert low < final < high


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([1.0] * 4, "got 4 for a plan of 5"),
        ([1.0, 1.2, 1.0, 1.0, 1.0], "first 2 must be 1"),
        (0.9, "ratios: got 0.9; needs a list, one for each of the 5 network calls"),
        ([1.0, 1.0, float("nan"), 1.0, 1.0], "finite"),
    ],
)
def test_bad_ratios_are_refused(ratios, words):
    with pytest.raises(DiffsampError, match=words):
        dc(unipc(5), ratios=ratios)


@pytest.mark.parametrize(("name", "words"), [("heun", "not a multistep"), ("euler-ancestral", "draws noise")])
def test_bases_without_a_history_are_refused(name, words):
    plan = solver(name)(VP, grid("linspace", VP, 6))
    with pytest.raises(DiffsampError, match=words):
        dc(plan, ratios=[1.0] * plan.nfe)


def test_composed_names_build_and_double_compensation_is_refused():
    g = grid("linspace", VP, 5)
    text = "dc(dualfast(unipc,c=0.2),ratios=[1;1;1;0.9;1.6])"
    plan = solver(text)(VP, g)
    assert plan.rows[4].rewrite is not None and plan.nfe == 5
    assert solver("dc-unipc")(VP, g) == solver("unipc")(VP, g)
    with pytest.raises(DiffsampError, match="compensated already"):
        dc(dc(unipc(5), ratios=[1, 1, 1, 1, 1.5]), ratios=[1, 1, 1, 1, 1.5])


# -- the search -----------------------------------------------------------------------------------------------------


# Mean squared error of DDIM, DPM-Solver++ 2M, UniPC-2 and UniPC-2 without its first corrector on the specified toy.
PUBLISHED_ERRORS = {
    1.0: ((0.0340, 0.0215, 0.0192, 0.0201), (0.0258, 0.0151, 0.0138, 0.0142), (0.0169, 0.0089, 0.0082, 0.0085),
          (0.0120, 0.0058, 0.0054, 0.0056)),
    3.0: ((0.0471, 0.0227, 0.0221, 0.0213), (0.0336, 0.0154, 0.0151, 0.0150), (0.0205, 0.0089, 0.0086, 0.0085),
          (0.0145, 0.0058, 0.0055, 0.0054)),
    7.5: ((0.1032, 0.0506, 0.1075, 0.0405), (0.0667, 0.0311, 0.0618, 0.0252), (0.0422, 0.0165, 0.0131, 0.0123),
          (0.0277, 0.0097, 0.0083, 0.0074)),
}  # fmt: skip


def test_toy_is_the_specified_one_as_far_as_errors_of_plain_solvers_tell():
    """The specification leaves the share of the variance inside a component open; these 48 errors choose it."""

    def deviation(within: float) -> float:
        toy, gaps = toys.img(within=within), []
        x, labels = toy.noise(64, 7)
        for scale, rows in PUBLISHED_ERRORS.items():
            denoiser = toy.denoiser(labels, scale)
            levels = [level for n in NFE for level in unipc(n).grid.levels]
            reference = Reference(VP, levels, denoiser, x * levels[0].sigma, steps=150)
            for n, published in zip(NFE, rows, strict=True):
                g = grid("linspace", VP, n, final="sigma_min")
                plans = [solver(name)(VP, g) for name in ("ddim", "dpmpp-2m", "unipc")]
                for plan, error in zip([*plans, unipc(n)], published, strict=True):
                    ours = mse(engine.sample(plan, denoiser, x * levels[0].sigma), reference.at(g.levels[-1]))
                    gaps.append(np.log(ours / error))
        return float(np.sqrt(np.mean(np.square(gaps))))

    chosen = deviation(0.6)
    assert chosen < 0.3
    assert chosen < min(deviation(0.1), deviation(0.25))


@pytest.mark.parametrize("scale", list(GAINS))
def test_gains_on_held_out_noises(scale):
    for n, least in GAINS[scale].items():
        gains = [gain(scale, n, found(scale, n, draw).values) for draw in range(3)]
        assert statistics.median(gains) >= least, (n, gains)
        assert min(gains) >= 1.0, (n, gains)


def test_penultimate_ratio_is_fitted_to_its_own_target():
    result = found(3.0, 8, guard=False)
    assert 0.7 < result.values[6] < 1.2
    assert gain(3.0, 8, result.values) >= 5
    # The published code's slip: the penultimate step compared with the final state.
    w, part = world(3.0), slice(0, 10)

    class Slipped:
        def at(self, level):
            shifted = unipc(8).last_level if level.index == 7 else level
            return w["reference"].of(part).at(shifted)

    slipped = search_ratios(unipc(8), Slipped(), w["toy"].denoiser(w["labels"][part], 3.0), w["x"][part], guard=False)
    assert not 0.7 < slipped.values[6] < 1.2


def test_every_step_is_compared_with_the_state_at_its_own_next_level():
    """A reference filled with the index of its level: what is asked for is the levels 3 to n, in order."""
    asked, w = [], world(1.0)

    class Indexed:
        def at(self, level):
            asked.append(level.index)
            return torch.full((10, 1, 8, 8), float(level.index), dtype=torch.float64)

    search_ratios(unipc(6), Indexed(), w["toy"].denoiser(w["labels"][:10]), w["x"][:10], guard=False)
    # The final state first and last: the guard's scores. In between one target per searched step, n−2 and n−1 too.
    assert asked[1:5] == [3, 4, 5, 6]


def test_search_never_makes_a_step_worse_and_keeps_the_better_of_base_and_search():
    for scale, n in ((7.5, 5), (7.5, 8), (3.0, 6)):
        result = found(scale, n)
        assert all(after <= neutral for _, _, neutral, after in result.steps)
        assert result.after <= result.before


def counted(scale: float = 1.0) -> tuple:
    """(denoiser, list that grows by one with every call)."""
    w, calls = world(scale), []
    inner = w["toy"].denoiser(w["labels"][:10], scale)

    def denoise(x, level):
        calls.append(level)
        return inner(x, level)

    return denoise, calls


@pytest.mark.parametrize("n", NFE)
@pytest.mark.parametrize("scale", list(GAINS))
def test_network_calls_of_a_search_are_at_most_half_of_the_published_code(scale, n):
    denoiser, calls = counted(scale)
    w, plan = world(scale), unipc(n)
    result = search_ratios(plan, w["reference"].of(slice(0, 10)), denoiser, w["x"][:10])
    assert result.calls == len(calls)
    # The authors' code makes n + 20·(n − 3), each of the 20 with a backward pass; their paper has 40.
    assert len(calls) <= 0.5 * (n + 20 * (n - 3))
    assert plan.depth == unipc(n).depth


def test_calls_that_a_search_shares_are_those_of_separate_runs():
    """What the guard compares comes from shared calls; runs of the plans, made afresh, must give the same errors."""
    w, part = world(3.0), slice(0, 10)
    denoiser = w["toy"].denoiser(w["labels"][part], 3.0)
    result, goal = found(3.0, 6), w["reference"].of(part).at(unipc(6).last_level)
    again = mse(engine.sample(unipc(6), denoiser, w["x"][part]), goal)
    assert result.before == pytest.approx(again, rel=1e-9)
    again = mse(engine.sample(dc(unipc(6), ratios=result.values), denoiser, w["x"][part]), goal)
    assert result.after == pytest.approx(again, rel=1e-9)


@pytest.mark.parametrize("n", [5, 8])
def test_a_run_makes_n_calls_and_the_published_recipe_the_published_number(n):
    denoiser, calls = counted()
    w = world(1.0)
    engine.sample(dc(unipc(n), ratios=[1.0, 1.0, *[1.2] * (n - 2)]), denoiser, w["x"][:10])
    assert len(calls) == n
    calls.clear()
    reference = w["reference"].of(slice(0, 10))
    result = search_ratios(unipc(n), reference, denoiser, w["x"][:10], method="adamw", iterations=7, guard=False)
    # The base's own run, for the error before, adds the calls after the first free ratio.
    assert result.calls == len(calls) == n + 7 * (n - 3) + (n - 3)


def test_adamw_takes_the_steps_of_the_optimiser_on_the_loss_of_the_step():
    """One step of AdamW from ratio 1 is 0.1 down the slope, whatever its size, after the weight decay of 0.001."""
    result = found(3.0, 6, method="adamw", iterations=1, guard=False)
    w, part = world(3.0), slice(0, 10)
    denoiser, reference = w["toy"].denoiser(w["labels"][part], 3.0), w["reference"].of(part)

    def loss(ratio: float, i: int) -> float:
        ratios = [*result.values[:i], ratio, *[1.0] * (5 - i)]
        plan, seen = dc(unipc(6), ratios=ratios), []
        end = engine.sample(plan, denoiser, w["x"][part], callback=lambda _, state: seen.append(state.base))
        # The state at level i + 1 is corrected in the next row; the last one is final.
        return mse(seen[i + 1] if i < 5 else end, reference.at(plan.rows[i].next_level))

    for i in range(2, 6):
        slope = (loss(1 + 1e-5, i) - loss(1 - 1e-5, i)) / 2e-5
        assert result.values[i] == pytest.approx(0.999 - 0.1 * np.sign(slope), abs=1e-3)


@pytest.mark.parametrize("n", NFE)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_search_agrees_with_the_published_optimiser(scale, n):
    published = gain(scale, n, found(scale, n, method="adamw", guard=False).values)
    ours = gain(scale, n, found(scale, n, guard=False).values)
    assert ours == pytest.approx(published, rel=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "sgd"}, "accepted: search, adamw"), ({"evaluations": 3}, "at least 5"),
        ({"method": "adamw", "iterations": 0}, "1 and above"),
    ],
)  # fmt: skip
def test_bad_options_of_a_search_are_refused(options, words):
    with pytest.raises(DiffsampError, match=words):
        found(1.0, 5, **options)


def test_adamw_says_that_a_network_gives_no_gradient():
    w, part = world(1.0), slice(0, 10)
    inner = w["toy"].denoiser(w["labels"][part])

    def frozen(x, level):
        with torch.no_grad():
            return inner(x, level)

    with pytest.raises(DiffsampError, match="gives no gradient"):
        search_ratios(unipc(5), w["reference"].of(part), frozen, w["x"][part], method="adamw")


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
@pytest.mark.parametrize(("n", "least"), [(5, 1.2), (10, 4.0)])
def test_gains_on_a_flow_process(scale, n, least):
    toy = toys.img()
    parts = [toy.noise(10, 100 + draw) for draw in range(3)] + [toy.noise(64, 7)]
    labels = torch.cat([label for _, label in parts])
    plan = solver("unipc", disable_corrector=(0,))(FLOW, grid("linspace", FLOW, n))
    x = torch.cat([noise for noise, _ in parts]) * plan.first_level.sigma
    reference = Reference(FLOW, plan.grid.levels, toy.denoiser(labels, scale), x, steps=400)
    goal, unseen = reference.of(slice(30, None)).at(plan.last_level), toy.denoiser(labels[30:], scale)
    base, gains = mse(engine.sample(plan, unseen, x[30:]), goal), []
    for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
        result = search_ratios(plan, reference.of(part), toy.denoiser(labels[part], scale), x[part])
        gains.append(base / mse(engine.sample(dc(plan, ratios=result.values), unseen, x[30:]), goal))
    assert statistics.median(gains) >= least


def test_bad_calibration_input_is_refused_with_the_reason():
    w = world(1.0)
    reference, x = w["reference"].of(slice(0, 3)), w["x"][:3]
    with pytest.raises(DiffsampError, match="got 3; a calibration needs at least 4"):
        search_ratios(unipc(5), reference, w["toy"].denoiser(w["labels"][:3]), x)
    with pytest.warns(UserWarning, match="10 are advised"):
        search_ratios(unipc(5), w["reference"].of(slice(0, 5)), w["toy"].denoiser(w["labels"][:5]), w["x"][:5])
    with pytest.raises(DiffsampError, match="not finite"):
        search_ratios(unipc(5), w["reference"].of(slice(0, 10)), lambda x, level: x * float("nan"), w["x"][:10])
    heun = solver("heun")(VP, grid("linspace", VP, 6))
    with pytest.raises(DiffsampError, match="not a multistep"):
        search_ratios(heun, w["reference"].of(slice(0, 10)), w["toy"].denoiser(w["labels"][:10]), w["x"][:10])


# -- cascade regression ---------------------------------------------------------------------------------------------


def test_cascade_reproduces_ratios_of_its_own_form_and_refuses_beyond_its_domain():
    generator = np.random.default_rng(0)
    truth = Cascade(generator.normal(size=(4, 3, 3)), generator.normal(size=(3, 3)), (5, 20), (1.0, 12.0))
    table = {(n, g): truth.ratios(n, g) for n in range(5, 21, 3) for g in (1.0, 3.0, 7.5, 12.0)}
    fitted = fit_cascade(table)
    for n, g in ((6, 2.0), (9, 5.0), (19, 11.0)):
        assert np.allclose(fitted.ratios(n, g), truth.ratios(n, g), atol=1e-6)
    with pytest.raises(DiffsampError, match="NFE 5 to 20"):
        fitted.ratios(30, 3.0)
    with pytest.warns(UserWarning, match="using ratio 1"):
        assert fitted.ratios(4, 3.0, outside="ones") == (1.0,) * 4


def test_separate_last_ratio_follows_a_jump_that_the_cubic_cannot():
    table = {(n, g): (1.0,) * (n - 1) + (1.8,) for n in range(5, 16) for g in (1.0, 3.0, 7.5)}
    ours, published = fit_cascade(table), fit_cascade(table, separate_last=False)
    target = np.array(table[(10, 3.0)])
    assert np.abs(np.array(ours.ratios(10, 3.0)) - target).max() < 1e-6
    assert np.abs(np.array(published.ratios(10, 3.0)) - target).max() > 0.1


# What the authors publish for Stable Diffusion 2.1 (github.com/wl-zhao/DC-Solver, diffusers/dc_solver/cpr_coeffs_path/
# sd2.1.npy, Apache-2.0), to 12 digits.
SD21 = [
    1523.67661966, -1111.47464508, 198.383496178, -1346.08900228, 1007.19494126, -186.254757741,
    168.397302433, -128.038948941, 24.8847897518, -8140.64401858, 5906.74827912, -1035.99411231,
    6941.4138994, -5193.98065982, 950.320565298, -848.210467505, 650.690333331, -121.286742766,
    13309.2703846, -9616.67032053, 1668.76859621, -11037.1077944, 8256.66668566, -1503.79920359,
    1293.97404351, -999.562932821, 188.221704135, -6747.42182161, 4853.15305335, -835.511679283,
    5489.11518378, -4096.89721821, 743.095341313, -619.561276326, 480.149714656, -90.8963312856,
]  # fmt: skip


def test_published_coefficients_give_the_published_ratios_inside_their_domain_only():
    cascade = Cascade.published(SD21)
    assert cascade.ratios(5, 7.5) == pytest.approx((1, 1, 1.027, 0.739, 1.226), abs=1e-3)
    assert cascade.ratios(5, 1.0) == pytest.approx((1, 1, 0.870, 1.303, 1.276), abs=1e-3)
    ten = (1, 1, 0.445, 0.898, 1.063, 1.043, 0.941, 0.861, 0.907, 1.182)
    assert cascade.ratios(10, 7.5) == pytest.approx(ten, abs=1e-3)
    for nfe, scale in ((4, 7.5), (21, 7.5), (10, 0.9), (10, 12.5)):
        with pytest.raises(DiffsampError, match="NFE 5 to 20 and guidance scale 1 to 12"):
            cascade.ratios(nfe, scale)
        with pytest.warns(UserWarning, match="using ratio 1"):
            assert cascade.ratios(nfe, scale, outside="ones") == (1.0,) * nfe
    with pytest.raises(DiffsampError, match="got 35 numbers"):
        Cascade.published(SD21[1:])
