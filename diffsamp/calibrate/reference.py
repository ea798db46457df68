"""The ground truth of a calibration: the states of a fine run of the same model at the levels that a solver visits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from .. import engine
from ..errors import DiffsampError
from ..grids import Grid
from ..process import Level, Process

Denoiser = Callable[[torch.Tensor, Level], torch.Tensor]


def refined(process: Process, levels: Iterable[Level], steps: int) -> Grid:
    """A grid of about ``steps`` calls that visits every level of ``levels``, evenly in the network's time between."""
    wanted = {level.noise_to_signal: level for level in levels}
    known = [wanted[s] for s in sorted(wanted, reverse=True)]
    uses_time = process.clock in ("discrete", "flow")

    def coordinate(level: Level) -> float:
        return level.t if uses_time else level.noise_to_signal ** (1 / 7)

    ends = list(known)
    if ends[-1].sigma == 0.0:
        ends[-1] = process.level(min(process.noise_to_signal_range[0], known[-2].noise_to_signal / 2))
    length = coordinate(ends[0]) - coordinate(ends[-1])
    found: list[Level] = []
    for a, b in zip(ends, ends[1:], strict=False):
        u, v = coordinate(a), coordinate(b)
        parts = max(1, round(steps * (u - v) / length))
        found.append(a)
        for w in np.linspace(u, v, parts + 1)[1:-1]:
            level = process.level_at(float(w)) if uses_time else process.level(float(w) ** 7)
            if found[-1].noise_to_signal > level.noise_to_signal > b.noise_to_signal:
                found.append(level)
    found.append(ends[-1])
    if known[-1].sigma == 0.0:
        found.append(known[-1])
    return Grid(process, tuple(found), "reference")


class Reference:
    """States of a fine run, by level.

    Args:
        process, levels: what to visit; the first level is where ``x`` lives.
        denoiser: ``denoiser(x, level) -> prediction``, guided already.
        x: start, shape (points, ...).
        steps: network calls of the fine run, about.
        prediction: type of the denoiser's output.
        solver: registry name of the fine solver.
        progress: called after each call with (calls done, calls in all).

    Raises:
        DiffsampError: a prediction is not finite.
    """

    def __init__(
        self,
        process: Process,
        levels: Iterable[Level],
        denoiser: Denoiser,
        x: torch.Tensor,
        *,
        steps: int = 200,
        prediction: str = "sample",
        solver: str = "unipc",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        from ..registry import solver as by_name

        levels = list(levels)
        grid = refined(process, levels, steps)
        plan = by_name(solver)(process, grid)
        keep = {self._key(level) for level in levels}
        self.calls = plan.nfe
        self._states: dict[float, torch.Tensor] = {}

        def visit(i: int, state: engine.State) -> None:
            # UniPC commits a state one call after it predicted it; the base is the better of the two.
            row = plan.rows[i]
            for level, value in ((row.next_level, state.input), (row.base_level, state.base)):
                if level is not None and self._key(level) in keep:
                    self._states[self._key(level)] = value
            if progress is not None:
                progress(i + 1, plan.nfe)

        with torch.no_grad():
            engine.sample(plan, denoiser, x, prediction=prediction, callback=visit, check_finite=True)
        self._states[self._key(grid.levels[0])] = x

    @staticmethod
    def _key(level: Level) -> float:
        return -math.inf if level.sigma == 0.0 else round(math.log(level.noise_to_signal), 10)

    def at(self, level: Level) -> torch.Tensor:
        """The state at a level that was asked for."""
        key = self._key(level)
        if key not in self._states:
            raise DiffsampError(f"level: the reference has no state at sigma/alpha {level.noise_to_signal:.6g}")
        return self._states[key]

    def covers(self, levels: Iterable[Level]) -> bool:
        """Whether every one of ``levels`` was visited."""
        return all(self._key(level) in self._states for level in levels)

    def of(self, chosen: slice) -> Reference:
        """The reference of some of the points."""
        part = object.__new__(Reference)
        part.calls = self.calls
        part._states = {key: state[chosen] for key, state in self._states.items()}
        return part
