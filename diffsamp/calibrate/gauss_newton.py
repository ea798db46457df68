"""Levenberg-Marquardt over the numbers that define a plan: how far the final state is from a fine run's.

The loss is a sum of squares over all pixels of all points, so its curvature follows from first derivatives alone. They
are forward differences of whole runs: no backward pass, hence no activations held, and any dtype or compiled network
serves. A run that differs from the kept one only from row i on repeats no network call before row i, which halves the
cost of a derivative. After a step that was taken the derivatives are corrected by Broyden's rank-one update and made
anew only where a step fails.

Sources: Marquardt 1963, SIAM J. 11(2); Broyden 1965, Math. Comp. 19(92). The use on samplers is this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .. import engine
from ..errors import DiffsampError
from ..plan import Plan
from ..process import Level
from .reference import Denoiser

Make = Callable[[np.ndarray], Plan | None]


@dataclass(frozen=True)
class Fit:
    """What a search found.

    Attributes:
        values: the numbers; the start itself where nothing was better.
        before, after: mean squared error of the final state at the start and at ``values``; after <= before.
        calls: network calls (batches).
    """

    values: np.ndarray
    before: float
    after: float
    calls: int


class Remembered:
    """A denoiser that makes no call again whose input and level are those of the kept run."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.calls = denoiser, 0
        self.kept: list[tuple[torch.Tensor, Level, torch.Tensor]] = []
        self.begin()

    def begin(self) -> None:
        self.run: list[tuple[torch.Tensor, Level, torch.Tensor]] = []
        self.same = True

    def keep(self) -> None:
        self.kept = self.run

    def __call__(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        i = len(self.run)
        output = None
        if self.same and i < len(self.kept):
            before, place, known = self.kept[i]
            if place.t == level.t and torch.equal(before, x):
                output = known
        if output is None:
            self.same = False
            self.calls += 1
            with torch.no_grad():
                output = self.denoiser(x, level)
        self.run.append((x, level, output))
        return output


def gauss_newton(
    make: Make,
    start: np.ndarray,
    denoiser: Denoiser,
    x: torch.Tensor,
    goal: torch.Tensor,
    *,
    prediction: str = "sample",
    rounds: int = 5,
    step: float = 1e-2,
    least_gain: float = 0.01,
    largest: float = 1.0,
) -> Fit:
    """Numbers whose plan brings ``x`` closest to ``goal``, from ``start``; never worse than the start.

    Args:
        make: numbers → plan; None where they define none.
        start: one-dimensional.
        denoiser: guided already.
        x, goal: start and final states of the points, (points, ...).
        rounds: how often all derivatives are made.
        step: of the forward differences, in the numbers' own unit.
        least_gain: relative gain of a round below which the search ends.
        largest: change of one number in one step, at most.

    Raises:
        DiffsampError: the start defines no plan, or its run is not finite.
    """
    memory = Remembered(denoiser)
    count = goal.numel()
    best: tuple[float, np.ndarray] | None = None

    def residual(values: np.ndarray) -> torch.Tensor | None:
        """Differences to the goal, (points, numbers of a sample)."""
        nonlocal best
        plan = make(values)
        if plan is None:
            return None
        memory.begin()
        made = engine.sample(plan, memory, x, prediction=prediction)
        found = (made - goal).double().flatten(1)
        error = float(found.square().sum()) / count
        if not np.isfinite(error):
            return None
        if best is None or error < best[0]:
            best = (error, values.copy())
        return found

    values = np.array(start, dtype=np.float64)
    r = residual(values)
    if r is None or best is None:
        raise DiffsampError("denoiser: the run that the search starts from is not finite; check the model and its grid")
    memory.keep()
    before = best[0]
    each = r.square().sum(1)
    level_off = 10 * max(float(each.median()), 1e-12 * float(each.mean()), 1e-300)
    damping = 1e-2

    def loss(r: torch.Tensor) -> float:
        each = r.square().sum(1)
        return float((level_off * each / (level_off + each)).sum())

    def differences(values: np.ndarray, r: torch.Tensor) -> torch.Tensor:
        rows = []
        for j in range(len(values)):
            for signed in (step, -step):
                moved = values.copy()
                moved[j] += signed
                other = residual(moved)
                if other is not None:
                    rows.append((other - r) / signed)
                    break
            else:
                rows.append(torch.zeros_like(r))
        return torch.stack(rows)

    current = loss(r)
    for _ in range(rounds):
        jacobian, fresh = differences(values, r), True
        began = current
        while True:
            # Each point counts by the slope of its levelled loss.
            weight = (level_off / (level_off + r.square().sum(1))).square()
            flat = (jacobian * weight.sqrt()[:, None]).flatten(1)
            curvature = (flat @ flat.T).cpu().numpy()
            slope = (flat @ (r * weight.sqrt()[:, None]).flatten()).cpu().numpy()
            taken = None
            for _ in range(5 if fresh else 1):
                scale = np.diag(curvature) + 1e-12 * max(float(np.trace(curvature)), 1e-300)
                move = -np.linalg.solve(curvature + damping * np.diag(scale), slope)
                move *= min(1.0, largest / max(float(np.abs(move).max()), 1e-300))
                other = residual(values + move)
                if other is not None and loss(other) < current:
                    taken = other
                    break
                damping *= 8
            if taken is None:
                break
            memory.keep()
            change = torch.from_numpy(move).to(r.device)
            # Broyden: the least change of the derivatives that explains the step.
            missed = (taken - r) - torch.tensordot(change, jacobian, 1)
            jacobian = jacobian + change[:, None, None] * missed / (change @ change)
            gained = 1 - loss(taken) / current
            values, r, current, fresh = values + move, taken, loss(taken), False
            damping = max(damping / 5, 1e-6)
            if gained < least_gain:
                break
        if current > began * (1 - least_gain):
            break
    return Fit(best[1], before, best[0], memory.calls)
