"""Everything together: noise levels, DC-Solver's ratios, DualFast's constants, then the whole table at once.

Stages, each guarded on the calibration points (what does not help is dropped):

1.  grid: the base solver's noise levels (:mod:`.grid`);
2.  dualfast and dc on that grid: ratios alone, and constants with ratios on top, whichever is better;
3.  table: levels, the times told to the network and all weights of its outputs together, by Gauss-Newton from there
    (:mod:`.table` says what is known of this family). Newest weights follow from the point-mass invariant, and at most
    ``MEMORY`` outputs behind the newest are free.

Stages 1 and 3 are this project's, not the papers'.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch

from .. import engine
from ..errors import DiffsampError
from ..grids import Grid
from ..plan import Plan
from ..registry import solver as by_name
from ..solvers.dc import dc
from ..solvers.dualfast import dualfast
from .artifact import Artifact
from .gauss_newton import gauss_newton
from .grid import Gaps, search_grid
from .model import CALIBRATION_SEED, Model
from .reference import Denoiser, Reference
from .run import Found, Progress, calibrate
from .search import mse, search_constants, search_ratios
from .table import pack, plan_of, weights_of

MEMORY = 4
# Points of the ratio and constant searches, as the papers advise; the guard of each stage uses all points.
SEARCH_POINTS = 10


class TableFit:
    """Unknowns of stage 3 around a rule that builds a plan on any grid: gaps, told levels, older weights."""

    def __init__(self, grid: Grid, rebuild: Callable[[Grid], Plan]) -> None:
        self.grid, self.rebuild, self.gaps = grid, rebuild, Gaps(grid)
        n = len(grid)
        self.free = [(i, j) for i in range(n) for j in range(max(0, i - MEMORY), i)]
        self.start = np.concatenate([self.gaps.of(grid), np.zeros(len(self.free) + n - 1)])

    def parts(self, unknowns: np.ndarray) -> tuple[Grid, list[float], list[np.ndarray]] | None:
        """(grid, times, weights) of the unknowns; None where they define none."""
        inner = self.gaps.inner
        moved = self.gaps.grid_of(unknowns[:inner])
        if moved is None:
            return None
        weights = weights_of(self.rebuild(moved))
        offsets = unknowns[inner + len(self.free) :]
        for (i, j), change in zip(self.free, unknowns[inner:], strict=False):
            weights[i][j] += change
        low, high = (math.log(v) for v in moved.process.noise_to_signal_range)
        # The network is told the time of a level somewhat above or below the state's; the first call keeps its own.
        told = [
            moved.process.time(math.exp(min(max(math.log(level.noise_to_signal) + change, low), high)))
            for level, change in zip(moved.levels[1:-1], offsets, strict=True)
        ]
        return moved, [moved.levels[0].t, *told], weights

    def plan(self, unknowns: np.ndarray) -> Plan | None:
        parts = self.parts(unknowns)
        return None if parts is None else plan_of(*parts)


def search_all(
    plan: Plan,
    solver: str,
    denoiser: Denoiser,
    few: Denoiser,
    x: torch.Tensor,
    goal: torch.Tensor,
    *,
    k: int = 2,
    tau: str | int = "first",
    prediction: str = "sample",
    evaluations: int = 8,
    rounds: int = 3,
    reference_steps: int = 60,
) -> Found:
    """All stages for one setting.

    Args:
        plan: the base on the named grid.
        solver: its registry name.
        denoiser, few: guided already, for all points and for the first ``SEARCH_POINTS`` of them.
        x, goal: start and final states of the points, (points, ...).
        k, tau: of DC-Solver and DualFast.
        evaluations: network calls per searched ratio or constant, at most.
        rounds: of each Gauss-Newton search, at most.
        reference_steps: of the fine run that the ratios are searched against, on the chosen levels.
    """
    process, build = plan.process, by_name(solver)

    def error(candidate: Plan) -> float:
        return mse(engine.sample(candidate, denoiser, x, prediction=prediction), goal)

    chosen, before, best, calls = search_grid(
        build, plan.grid, denoiser, x, goal, prediction=prediction, rounds=rounds
    )
    stages = [] if chosen is plan.grid else ["grid"]
    base = build(process, chosen)
    part = x[:SEARCH_POINTS]
    fine = Reference(process, chosen.levels, few, part, steps=reference_steps, prediction=prediction)
    calls += fine.calls
    options = {"k": k, "prediction": prediction, "evaluations": evaluations}
    constants = search_constants(base, fine, few, part, tau=tau, prediction=prediction, evaluations=evaluations)
    alone = search_ratios(base, fine, few, part, **options)
    calls += constants.calls + alone.calls
    tried: list[tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]] = [
        (("dc",), alone.values, ()), (("dualfast",), (), constants.values)
    ]  # fmt: skip
    if any(constants.values):
        both = search_ratios(dualfast(base, c=constants.values, tau=tau), fine, few, part, **options)
        calls += both.calls
        tried.append((("dualfast", "dc"), both.values, constants.values))

    def rule(ratios: tuple[float, ...], c: tuple[float, ...]) -> Callable[[Grid], Plan]:
        def rebuild(grid: Grid) -> Plan:
            made = build(process, grid)
            made = dualfast(made, c=c, tau=tau) if c else made
            return dc(made, ratios=ratios, k=k) if ratios else made

        return rebuild

    rebuild, kept = rule((), ()), ()
    for names, ratios, c in tried:
        candidate = rule(ratios, c)
        value = error(candidate(chosen))
        calls += plan.nfe
        if value < best:
            best, rebuild, kept = value, candidate, names
    stages += kept
    table = TableFit(chosen, rebuild)
    fit = gauss_newton(
        table.plan, table.start, denoiser, x, goal, prediction=prediction, rounds=rounds, largest=0.5
    )
    calls += fit.calls
    found = table.parts(fit.values if fit.after < best else table.start)
    if fit.after < best:
        best, stages = fit.after, [*stages, "table"]
    assert found is not None
    return Found(pack(*found), before, best, "+".join(stages) or "base", calls, lambda: plan_of(*found))


def calibrate_all(
    model: Model,
    *,
    nfe: Sequence[int],
    guidance_scale: Sequence[float],
    solver: str = "unipc",
    out: str | os.PathLike[str] | None = None,
    grid: str = "linspace",
    final: str = "zero",
    k: int = 2,
    tau: str | int = "first",
    points: int = 48,
    held_out: int = 32,
    reference_steps: int = 200,
    evaluations: int = 8,
    rounds: int = 3,
    progress: Progress | None = None,
) -> Artifact:
    """Levels, times and weights for every (nfe, guidance scale); continues ``out`` where it exists.

    See :func:`search_all`.
    """

    artifact: Artifact | None = None
    _, labels = model.points(range(CALIBRATION_SEED, CALIBRATION_SEED + min(points, SEARCH_POINTS)))
    for index, scale in enumerate(guidance_scale):
        few = model.guided(labels, scale)

        def search(
            plan: Plan, reference: Reference, denoiser: Denoiser, x: torch.Tensor, prediction: str, few: Denoiser = few
        ) -> Found:
            return search_all(
                plan, solver, denoiser, few, x, reference.at(plan.last_level), k=k, tau=tau, prediction=prediction,
                evaluations=evaluations, rounds=rounds, reference_steps=min(reference_steps, 60),
            )  # fmt: skip

        def report(what: str, done: int, total: int, index: int = index) -> None:
            if progress is not None:
                progress(what, index * len(nfe) + done, len(guidance_scale) * len(nfe))

        part = calibrate(
            "all", model, search, solver=solver, nfe=nfe, guidance_scale=[scale], out=out, grid_name=grid, final=final,
            options={"k": k, "tau": tau, "rounds": rounds}, points=points, held_out=held_out,
            reference_steps=reference_steps, progress=report,
        )  # fmt: skip
        if artifact is None:
            artifact = part
        for setting in part.settings.values():
            artifact.add(setting)
    if artifact is None:
        raise DiffsampError("guidance_scale: got none; needs at least one")
    return artifact
