"""Choosing the noise levels: those that bring a solver closest to a fine run at the end.

The first level is the start noise's and stays; every other level above the data is free. The unknowns are the
logarithms of the gaps in log-SNR, so levels cannot cross. The search is a Gauss-Newton one (:mod:`.gauss_newton`), from
the two best of the named grid and of a few that reach a lower level in one large first step. The named grid is kept
unless something is better on the calibration points. Not from a paper of the three; the objective is DC-Solver's.
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
from ..process import Process
from ..registry import solver as by_name
from .artifact import Artifact
from .gauss_newton import gauss_newton
from .model import Model
from .reference import Denoiser, Reference
from .run import Found, Progress, calibrate
from .search import mse

# Where one large first step may lead, in sigma/alpha; data have a standard deviation of about 0.5 to 1.
LOWER_STARTS = (4.0, 6.0, 8.0, 10.0)
# The error is rugged under guidance: the best start is not always the one that leads lowest.
DESCENTS = 2


class Gaps:
    """Grids as logarithms of their gaps in log-SNR, around one grid whose ends they share.

    A grid that ends at the data has a free last level above it; one that ends elsewhere keeps its last level.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.ends_at_data = grid.levels[-1].sigma == 0.0
        self.inner = len(grid.levels) - 2
        self.top = math.log(grid.levels[0].noise_to_signal)
        self.low = math.log(grid.process.noise_to_signal_range[0])

    def of(self, grid: Grid) -> np.ndarray:
        """The unknowns of a grid; one per level between the ends."""
        logs = np.array([math.log(level.noise_to_signal) for level in grid.levels[: self.inner + 1]])
        gaps = -np.diff(logs)
        if not self.ends_at_data:
            gaps = gaps / (logs[-1] - math.log(grid.levels[-1].noise_to_signal))
        return np.log(gaps)

    def grid_of(self, unknowns: Sequence[float] | np.ndarray) -> Grid | None:
        """The grid of these unknowns; None where two levels meet or the process does not reach as far."""
        gaps = np.exp(np.asarray(unknowns, dtype=np.float64))
        if self.ends_at_data:
            logs = np.maximum(self.top - np.cumsum(gaps), self.low)
        else:
            total = self.top - math.log(self.grid.levels[-1].noise_to_signal)
            logs = self.top - total * np.cumsum(gaps) / (gaps.sum() + 1.0)
        if (np.diff(np.concatenate([[self.top], logs])) > -1e-3).any():
            return None
        process = self.grid.process
        inner = (process.level(math.exp(v)) for v in logs)
        return Grid(process, (self.grid.levels[0], *inner, self.grid.levels[-1]), "calibrated")


def lower_starts(grid: Grid) -> list[Grid]:
    """Grids with the ends of ``grid`` that reach a lower level in one large first step and go on evenly in time."""
    process, levels = grid.process, grid.levels
    low = levels[-2 if levels[-1].sigma == 0.0 else -1]
    count = len(levels) - 2 if levels[-1].sigma == 0.0 else len(levels) - 1
    found = []
    for first in LOWER_STARTS:
        if not low.noise_to_signal < first < levels[0].noise_to_signal or count < 2:
            continue
        if process.clock in ("discrete", "flow"):
            times = np.linspace(process.level(first).t, low.t, count)
            ratios = [process.level_at(float(t)).noise_to_signal for t in times]
        else:
            ratios = list(np.linspace(first ** (1 / 7), low.noise_to_signal ** (1 / 7), count) ** 7)
        inner = [process.level(v) for v in ratios]
        tail = [*inner, levels[-1]] if levels[-1].sigma == 0.0 else [*inner[:-1], levels[-1]]
        found.append(Grid(process, (levels[0], *tail), "lower start"))
    return found


def search_grid(
    build: Callable[[Process, Grid], Plan],
    grid: Grid,
    denoiser: Denoiser,
    x: torch.Tensor,
    goal: torch.Tensor,
    *,
    prediction: str = "sample",
    rounds: int = 5,
) -> tuple[Grid, float, float, int]:
    """The levels whose plan brings ``x`` closest to ``goal``.

    Args:
        build: ``(process, grid) -> plan``, one call per step.
        grid: the named grid; its ends are kept.
        denoiser: guided already.
        x, goal: start and final states of the points, (points, ...).
        rounds: of the Gauss-Newton search, at most.

    Returns:
        (grid, error of the named grid, error of the chosen one, network calls). The named grid itself is returned where
        nothing was better.
    """
    process = grid.process
    gaps, calls, starts = Gaps(grid), 0, []
    for start in (grid, *lower_starts(grid)):
        plan = build(process, start)
        calls += plan.nfe
        starts.append((mse(engine.sample(plan, denoiser, x, prediction=prediction, check_finite=True), goal), start))
    before = starts[0][0]

    def make(unknowns: np.ndarray) -> Plan | None:
        moved = gaps.grid_of(unknowns)
        return None if moved is None else build(process, moved)

    chosen, after = grid, before
    for _, start in sorted(starts, key=lambda pair: pair[0])[:DESCENTS]:
        fit = gauss_newton(make, gaps.of(start), denoiser, x, goal, prediction=prediction, rounds=rounds)
        calls += fit.calls
        moved = gaps.grid_of(fit.values)
        if moved is not None and fit.after < after:
            chosen, after = moved, fit.after
    return chosen, before, after, calls


def calibrate_grid(
    model: Model,
    *,
    nfe: Sequence[int],
    guidance_scale: Sequence[float],
    solver: str = "unipc",
    out: str | os.PathLike[str] | None = None,
    grid: str = "linspace",
    final: str = "zero",
    points: int = 32,
    held_out: int = 32,
    reference_steps: int = 200,
    rounds: int = 5,
    progress: Progress | None = None,
) -> Artifact:
    """Noise levels for every (nfe, guidance scale); continues ``out`` where it exists. See :func:`search_grid`."""
    if rounds < 1:
        raise DiffsampError(f"rounds: got {rounds}; must be 1 or above")

    def search(plan: Plan, reference: Reference, denoiser: Denoiser, x: torch.Tensor, prediction: str) -> Found:
        chosen, before, after, calls = search_grid(
            by_name(solver), plan.grid, denoiser, x, reference.at(plan.last_level), prediction=prediction,
            rounds=rounds,
        )  # fmt: skip
        values = tuple(level.noise_to_signal for level in chosen.levels)
        kept = "base" if chosen is plan.grid else "search"
        return Found(values, before, after, kept, calls, lambda: by_name(solver)(model.process, chosen))

    return calibrate(
        "grid", model, search, solver=solver, nfe=nfe, guidance_scale=guidance_scale, out=out, grid_name=grid,
        final=final, options={"rounds": rounds}, points=points, held_out=held_out, reference_steps=reference_steps,
        progress=progress,
    )  # fmt: skip
