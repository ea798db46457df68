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

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..errors import DiffsampError
from ..grids import Grid
from ..plan import Mix, Plan, Row
from ..process import Process
from .grid import Gaps

# Outputs behind the newest that have a free weight.
MEMORY = 4


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


class TableFit:
    """A table as a list of unknowns for a search: gaps of its levels, changes of older weights, offsets of told times.

    Args:
        grid: the levels to start from.
        rebuild: the rule that builds a plan on any grid; its weights are what changes are added to.
    """

    def __init__(self, grid: Grid, rebuild: Callable[[Grid], Plan]) -> None:
        self.grid, self.rebuild, self.gaps = grid, rebuild, Gaps(grid)
        n = len(grid)
        self.free = [(i, j) for i in range(n) for j in range(max(0, i - MEMORY), i)]
        self.start = np.concatenate([self.gaps.of(grid), np.zeros(len(self.free) + n - 1)])

    @classmethod
    def around(cls, plan: Plan) -> tuple[TableFit, np.ndarray]:
        """(unknowns around a table whose weights are its own on every grid, the table itself as unknowns)."""
        made = cls(plan.grid, lambda _: plan)
        start = made.start.copy()
        for i, row in enumerate(plan.rows[1:]):
            told = plan.process.level_at(row.level.t).noise_to_signal
            start[made.gaps.inner + len(made.free) + i] = math.log(told / row.level.noise_to_signal)
        return made, start

    def late(self, calls: int) -> list[int]:
        """Which unknowns change the input of none but the last ``calls`` calls."""
        n, inner = len(self.grid), self.gaps.inner
        first = [*range(1, inner + 1), *(i + 1 for i, _ in self.free), *range(1, n)]
        return [k for k, call in enumerate(first) if n - call <= calls]

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
        """The plan of the unknowns; None where they define none."""
        parts = self.parts(unknowns)
        return None if parts is None else plan_of(*parts)
