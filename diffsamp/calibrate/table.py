"""A plan as free numbers: noise levels, the times that the network is told, and the weights of its outputs.

Every deterministic solver with one call per step is, in the x0 form,

    x_{i+1} = (sigma_{i+1}/sigma_i)·x_i + Σ_{j≤i} b_ij·m_j,     Σ_j b_ij = alpha_{i+1} − alpha_i·sigma_{i+1}/sigma_i

with predictors, correctors, compensation and mixing all folded into b. The sum is the point-mass invariant: it fixes
the newest weight of each row, and the others are free. UniPC, DC-Solver and DualFast are points of this family, so a
search that starts at one of them and keeps only what is better cannot lose on its own points.

This family is the non-stationary solver of Shaul et al. 2024 (Bespoke Non-Stationary Solvers, arXiv:2403.01329), which
is trained by back-propagation; told times apart from the state's level are used by Frankel et al. 2025 (S4S,
arXiv:2502.17423). Finding the numbers by Gauss-Newton from a calibrated DC-Solver is this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import DiffsampError
from ..grids import Grid
from ..plan import Mix, Plan, Row
from ..process import Process


def weights_of(plan: Plan) -> list[np.ndarray]:
    """b_i0 ... b_ii of every row of a deterministic plan with one call per step; oldest output first."""
    response = plan.response("sample")
    levels = [*(row.level for row in plan.rows), plan.last_level]
    return [
        (response[i + 1] - levels[i + 1].sigma / levels[i].sigma * response[i])[1 : 2 + i] for i in range(plan.nfe)
    ]


def plan_of(grid: Grid, times: Sequence[float], weights: Sequence[np.ndarray], solver: str = "") -> Plan:
    """The plan of these numbers; the newest weight of each row follows from the others."""
    rows = []
    for i, (s, t) in enumerate(zip(grid.levels, grid.levels[1:], strict=False)):
        carry = t.sigma / s.sigma
        older = np.asarray(weights[i], dtype=np.float64)[:i]
        newest = t.alpha - carry * s.alpha - older.sum()
        rows.append(Row(replace(s, t=float(times[i])), t, Mix(base=carry, m=(newest, *older[::-1]))))
    return Plan(tuple(rows), grid.process, grid, solver=solver, order=1)


def pack(grid: Grid, times: Sequence[float], weights: Sequence[np.ndarray]) -> tuple[float, ...]:
    """One list of numbers: n+1 ratios sigma/alpha, n times, n(n+1)/2 weights."""
    return (*(level.noise_to_signal for level in grid.levels), *map(float, times), *map(float, np.concatenate(weights)))


def unpack(process: Process, nfe: int, values: Sequence[float], solver: str = "") -> Plan:
    """The plan of packed numbers.

    Raises:
        DiffsampError: their count does not belong to ``nfe`` calls.
    """
    wanted = 2 * nfe + 1 + nfe * (nfe + 1) // 2
    if len(values) != wanted:
        raise DiffsampError(f"values: got {len(values)} for {nfe} network calls; a table has {wanted}")
    grid = Grid(process, tuple(process.level(v) for v in values[: nfe + 1]), "calibrated")
    times, flat = values[nfe + 1 : 2 * nfe + 1], np.asarray(values[2 * nfe + 1 :])
    ends = np.cumsum(np.arange(1, nfe + 1))
    return plan_of(grid, times, np.split(flat, ends[:-1]), solver)
