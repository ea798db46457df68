"""Searches of noise levels and of whole tables: what they keep, what they count, what they give. Seeded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffsamp import calibrate, engine
from diffsamp.calibrate.artifact import Artifact
from diffsamp.calibrate.gauss_newton import gauss_newton
from diffsamp.calibrate.grid import Gaps, lower_starts, search_grid
from diffsamp.calibrate.search import mse
from diffsamp.calibrate.table import MEMORY, TableFit, pack, plan_of, unpack, weights_of
from diffsamp.errors import DiffsampError
from diffsamp.grids import grid
from diffsamp.process import Process
from diffsamp.registry import solver
from diffsamp.solvers.dc import dc
from diffsamp.solvers.dualfast import dualfast
from diffsamp.testing import toys

VP = Process.vp("scaled_linear", 0.00085, 0.012)
COSINE = Process.vp("squaredcos_cap_v2")
TOY = toys.img()
MODEL = calibrate.Model("toy", "ab" * 32, VP, "sample", (1, 8, 8), 10, TOY.denoiser)
SMALL = {"nfe": [5], "guidance_scale": [1.0], "points": 16, "held_out": 16, "reference_steps": 100, "rounds": 2}


class Counted:
    """A denoiser that counts its calls."""

    def __init__(self, denoiser) -> None:
        self.denoiser, self.calls = denoiser, 0

    def __call__(self, x, level):
        self.calls += 1
        return self.denoiser(x, level)


@pytest.fixture(scope="module")
def points():
    noise, labels = MODEL.points(range(32))
    x = noise * grid("linspace", VP, 5).levels[0].sigma
    levels = grid("linspace", VP, 5).levels
    fine = calibrate.Reference(VP, levels, TOY.denoiser(labels), x, steps=200)
    return x, labels, fine.at(levels[-1])


@pytest.mark.parametrize("process", [VP, COSINE, Process.flow(3.0), Process.ve()])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_unknowns_of_a_grid_give_the_grid_back_and_never_move_its_ends(process, final):
    name = "linspace" if process.clock in ("discrete", "flow") else "karras"
    named = grid(name, process, 6, final=final)
    gaps = Gaps(named)
    unknowns = gaps.of(named)
    again = gaps.grid_of(unknowns)
    assert [v.noise_to_signal for v in again.levels] == pytest.approx([v.noise_to_signal for v in named.levels])
    moved = gaps.grid_of(unknowns + 0.1 * np.arange(len(unknowns)))
    assert (moved.levels[0], moved.levels[-1]) == (named.levels[0], named.levels[-1])
    assert len(moved) == len(named) and moved != named
    assert all(v.noise_to_signal >= process.noise_to_signal_range[0] * (1 - 1e-9) for v in moved.levels[:-1])


def test_levels_beyond_what_the_process_knows_are_no_grid():
    named = grid("linspace", VP, 6)
    assert Gaps(named).grid_of(Gaps(named).of(named) + 3.0) is None


@pytest.mark.parametrize("process", [COSINE, Process.flow(3.0), Process.ve()])
def test_lower_starts_keep_the_number_of_calls_and_both_ends(process):
    named = grid("linspace" if process.clock in ("discrete", "flow") else "karras", process, 6)
    found = lower_starts(named)
    assert found
    for other in found:
        assert len(other) == 6
        assert (other.levels[0], other.levels[-1]) == (named.levels[0], named.levels[-1])
        assert other.levels[1].noise_to_signal < named.levels[0].noise_to_signal


def test_search_finds_levels_that_a_run_was_made_with():
    """The goal is itself a five-call run, so there are levels of error 0: only a search that works finds them."""
    noise, labels = MODEL.points(range(8))
    named = grid("linspace", VP, 5)
    wanted = Gaps(named).grid_of(Gaps(named).of(named) + np.array([0.2, -0.2, 0.15, -0.1]))
    x = noise * named.levels[0].sigma
    goal = engine.sample(solver("dpmpp-2m")(VP, wanted), TOY.denoiser(labels), x)
    found, before, after, _ = search_grid(
        solver("dpmpp-2m"), named, TOY.denoiser(labels), x.double(), goal.double(), rounds=8
    )
    assert after < 1e-4 * before
    ratios = [v.noise_to_signal for v in wanted.levels]
    assert [v.noise_to_signal for v in found.levels] == pytest.approx(ratios, rel=0.02)


def test_calls_are_all_counted_and_shared_beginnings_are_not_repeated(points):
    x, labels, goal = points
    named = grid("linspace", VP, 5)
    gaps, runs = Gaps(named), 0

    def make(unknowns):
        nonlocal runs
        runs += 1
        return solver("unipc")(VP, gaps.grid_of(unknowns))

    denoiser = Counted(TOY.denoiser(labels))
    fit = gauss_newton(make, gaps.of(named), denoiser, x, goal, rounds=1)
    assert fit.calls == denoiser.calls
    assert fit.calls < 0.8 * 5 * runs
    plan = solver("unipc")(VP, gaps.grid_of(fit.values))
    assert mse(engine.sample(plan, TOY.denoiser(labels), x), goal) == pytest.approx(fit.after, rel=1e-6)


def test_named_grid_is_kept_where_nothing_is_better(points):
    x, labels, _ = points
    named = grid("linspace", VP, 5)
    goal = engine.sample(solver("unipc")(VP, named), TOY.denoiser(labels), x)
    found, before, after, _ = search_grid(solver("unipc"), named, TOY.denoiser(labels), x, goal, rounds=1)
    assert found is named and before == after == 0.0


def test_descent_from_the_second_best_start_is_kept_where_it_leads_lower(points, monkeypatch):
    x, labels, goal = points
    named = grid("linspace", VP, 5)
    begun = []

    def descent(make, start, *_, **__):
        begun.append(start)
        return SimpleNamespace(values=start, after=1e-3 / len(begun), calls=7)

    monkeypatch.setattr("diffsamp.calibrate.grid.gauss_newton", descent)
    found, _, after, calls = search_grid(solver("unipc"), named, TOY.denoiser(labels), x, goal)
    starts = [named, *lower_starts(named)]
    errors = [mse(engine.sample(solver("unipc")(VP, g), TOY.denoiser(labels), x), goal) for g in starts]
    best, second = sorted(range(len(starts)), key=errors.__getitem__)[:2]
    assert np.allclose(begun, [Gaps(named).of(starts[best]), Gaps(named).of(starts[second])])
    assert after == 5e-4 and calls == 5 * len(starts) + 2 * 7
    ratios = [v.noise_to_signal for v in starts[second].levels]
    assert [v.noise_to_signal for v in found.levels] == pytest.approx(ratios)


def test_network_that_returns_nan_is_reported(points):
    x, _, goal = points
    named = grid("linspace", VP, 5)

    def broken(x, level):
        return torch.full_like(x, float("nan"))

    with pytest.raises(DiffsampError, match="not finite"):
        search_grid(solver("unipc"), named, broken, x, goal)
    with pytest.raises(DiffsampError, match="not finite"):
        gauss_newton(lambda v: solver("unipc")(VP, named), np.zeros(1), broken, x, goal)


BASES = {
    "unipc": lambda g: solver("unipc")(VP, g), "ddim": lambda g: solver("ddim")(VP, g),
    "deis": lambda g: solver("deis")(VP, g), "dpmpp-3m": lambda g: solver("dpmpp-3m")(VP, g),
    "dc(dualfast(unipc))": lambda g: dc(
        dualfast(solver("unipc")(VP, g), c=(0.0, 0.3, 0.1, 0.2, 0.4)), ratios=(1, 1, 0.7, 1.2, 1.6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_table_of_a_solver_is_the_solver(name):
    plan = BASES[name](grid("linspace", VP, 5))
    times = [row.level.t for row in plan.rows]
    same = plan_of(plan.grid, times, weights_of(plan))
    assert np.abs(same.response() - plan.response()).max() < 1e-10
    packed = pack(plan.grid, times, weights_of(plan))
    assert np.abs(unpack(VP, 5, packed).response() - plan.response()).max() < 1e-9
    with pytest.raises(DiffsampError, match="a table has 26"):
        unpack(VP, 5, packed[:-1])


def test_unknowns_of_a_table_start_at_the_rule_and_leave_the_first_call_alone():
    named = grid("linspace", VP, 7)
    table = TableFit(named, lambda g: solver("unipc")(VP, g))
    start = table.plan(table.start)
    assert np.abs(start.response() - solver("unipc")(VP, named).response()).max() < 1e-10
    moved = table.start.copy()
    moved[table.gaps.inner :] += 0.05
    other = table.plan(moved)
    assert other.rows[0].level == start.rows[0].level
    for before, after in zip(start.rows[1:], other.rows[1:], strict=True):
        assert (after.level.alpha, after.level.sigma) == (before.level.alpha, before.level.sigma)
        assert after.level.t > before.level.t  # told a noisier level, one tenth of a step in log-SNR at most
    # No output farther back than the memory has a weight of its own.
    changed = [np.nonzero(a - b)[0] for a, b in zip(weights_of(other), weights_of(start), strict=True)]
    assert all(not len(c) or c.min() >= i - MEMORY for i, c in enumerate(changed))


def test_everything_together_beats_each_stage_on_unseen_noises_and_comes_back_from_its_file(tmp_path):
    path = tmp_path / "all.safetensors"
    artifact = calibrate.calibrate_all(MODEL, **SMALL, out=path)
    setting = artifact.setting(5, 1.0)
    assert setting.after < setting.before and setting.kept.endswith("table")
    assert setting.held_out_after < 0.5 * setting.held_out_before
    levels = calibrate.calibrate_grid(MODEL, **SMALL).setting(5, 1.0)
    assert setting.after < levels.after < levels.before
    assert levels.held_out_after < levels.held_out_before
    base = solver("unipc")(VP, grid("linspace", VP, 5))
    plan = Artifact.load(path).apply(base, 1.0)
    assert plan.nfe == 5 and plan.first_level.noise_to_signal == base.first_level.noise_to_signal
    assert plan.last_level.sigma == 0.0
    noise, labels = MODEL.points(artifact.seeds)
    x = noise * plan.first_level.sigma
    fine = calibrate.Reference(VP, base.grid.levels, TOY.denoiser(labels), x, steps=100)
    error = mse(engine.sample(plan, TOY.denoiser(labels), x), fine.at(plan.last_level))
    assert error == pytest.approx(setting.after, rel=0.02)


def test_killed_run_of_everything_goes_on_and_repeats_nothing(tmp_path):
    path = tmp_path / "all.safetensors"
    few = {**SMALL, "points": 10, "rounds": 1, "held_out": 4}
    first = calibrate.calibrate_all(MODEL, **few, out=path)
    called: list[float] = []

    def guided(labels, scale):
        inner = TOY.denoiser(labels, scale)

        def denoise(x, level):
            called.append(scale)
            return inner(x, level)

        return denoise

    both = calibrate.calibrate_all(replace(MODEL, guided=guided), **{**few, "guidance_scale": [1.0, 3.0]}, out=path)
    assert both.settings["5/1"] == first.settings["5/1"]
    assert set(both.settings) == {"5/1", "5/3"}
    assert set(called) == {3.0}, "a finished setting was searched again"
    again = calibrate.calibrate_all(MODEL, **few)
    assert again.setting(5, 1.0).values == first.setting(5, 1.0).values  # seeded: the same numbers
