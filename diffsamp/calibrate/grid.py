"""Choosing the noise levels: a smooth warp of a named grid that brings a solver closest to a fine run at the end.

Levels move by u → u + b·u² + Σ_k a_k·sin(pi·k·u) in the grid's own index (u from 0 at the start to 1 at the last level
above the data), so the start is kept and the last level may move; the coefficients are found by a simplex search
without derivatives.
The named grid itself is the start and is kept unless something is better on the calibration points.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch

from .. import engine
from ..grids import Grid
from ..plan import Plan
from ..registry import solver as by_name
from .artifact import Artifact
from .model import Model
from .reference import Denoiser, Reference
from .run import Found, Progress, calibrate
from .search import mse


def warped(grid: Grid, coefficients: Sequence[float]) -> Grid | None:
    """``grid`` with its levels moved by (b, a_1, a_2.

    ...); none where the warp is not monotone or leaves the process.
    """
    levels = list(grid.levels)
    last = len(levels) - 1 if levels[-1].sigma > 0 else len(levels) - 2
    u = np.linspace(0, 1, last + 1)
    stretch = coefficients[0] if levels[-1].sigma == 0 else 0.0
    moved = u + stretch * u**2 + sum(a * np.sin(math.pi * (k + 1) * u) for k, a in enumerate(coefficients[1:]))
    if (np.diff(moved) <= 0.02 / last).any():
        return None
    log_ratio = np.array([math.log(level.noise_to_signal) for level in levels[: last + 1]])
    slope = (log_ratio[-1] - log_ratio[-2]) * last
    beyond = np.maximum(moved - 1, 0) * slope
    values = np.exp(np.interp(moved, u, log_ratio) + beyond)
    process = grid.process
    if values[-1] < process.noise_to_signal_range[0]:
        return None
    inner = [process.level(float(v)) for v in values[1:]]
    return Grid(process, (levels[0], *inner, *levels[last + 1 :]), "calibrated")


def calibrate_grid(
    model: Model,
    *,
    nfe: Sequence[int],
    guidance_scale: Sequence[float],
    solver: str = "unipc",
    out: str | os.PathLike[str] | None = None,
    grid: str = "linspace",
    final: str = "zero",
    points: int = 10,
    held_out: int = 20,
    reference_steps: int = 200,
    trials: int = 40,
    progress: Progress | None = None,
) -> Artifact:
    """Noise levels for every (nfe, guidance scale); continues ``out`` where it exists. Costs ``trials`` runs each."""

    def search(plan: Plan, reference: Reference, denoiser: Denoiser, x: torch.Tensor, prediction: str) -> Found:
        from scipy.optimize import minimize

        goal = reference.at(plan.last_level)
        calls = 0

        def error(candidate: Plan) -> float:
            nonlocal calls
            calls += candidate.nfe
            return mse(engine.sample(candidate, denoiser, x, prediction=prediction, check_finite=True), goal)

        before = error(plan)
        best: tuple[float, Grid] = (before, plan.grid)

        def cost(coefficients: np.ndarray) -> float:
            nonlocal best
            moved = warped(plan.grid, coefficients.tolist())
            if moved is None:
                return 10 * before
            value = error(by_name(solver)(model.process, moved))
            if value < best[0]:
                best = (value, moved)
            return value

        size = min(3, plan.nfe - 2)
        corners = np.vstack([np.zeros(size), 0.08 * np.eye(size)])
        minimize(cost, np.zeros(size), method="Nelder-Mead", options={"maxfev": trials, "initial_simplex": corners})
        after, chosen = best
        values = tuple(level.noise_to_signal for level in chosen.levels)
        kept = "base" if chosen is plan.grid else "search"
        return Found(values, before, after, kept, calls, lambda: by_name(solver)(model.process, chosen))

    return calibrate(
        "grid", model, search, solver=solver, nfe=nfe, guidance_scale=guidance_scale, out=out, grid_name=grid,
        final=final, options={"trials": trials}, points=points, held_out=held_out, reference_steps=reference_steps,
        progress=progress,
    )  # fmt: skip
