"""Refining a plan's numbers for the pictures as a set: Fréchet distance of their features beside the trajectory error.

The fewest-calls plan that follows a fine run best inherits that run's distance to real pictures, and a distance moves
much for changes that the trajectory error hardly sees. So, from the trajectory optimum,

    loss = error / error at the start + weight · FD / FD at the start,    held-out error ≤ bound · its start

is descended over the same numbers. Derivatives are forward differences of whole runs from common noise, as in
:mod:`.gauss_newton`: no backward pass, and the extractor may be anything that maps uint8 pictures to features. What is
linear in a small change is the final state and the features; the error (a sum of squares) and the distance (of the
moments of all features) are then known as functions of it, exactly, and are minimised together in a box that shrinks
where the true loss disagrees.

A distance of few pictures is biased upwards, by about the same amount for all near-by plans: both sides of every
comparison have the same number of pictures, from the same noises. No source; this project's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import engine
from ..errors import DiffsampError
from ..plan import Plan
from .frechet import CHUNK, Distance
from .gauss_newton import Make, Remembered
from .model import Model
from .reference import Denoiser


def in_parts(model: Model, labels: torch.Tensor, scale: float) -> Denoiser:
    """The guided denoiser of many points, a few at a time."""
    parts = [model.guided(part, scale) for part in labels.split(CHUNK)]

    def denoise(x: torch.Tensor, level: Any) -> torch.Tensor:
        return torch.cat([part(y, level) for part, y in zip(parts, x.split(CHUNK), strict=True)])

    return denoise


@dataclass(frozen=True)
class Refined:
    """What the refinement found.

    Attributes:
        values: the numbers; the start itself where nothing was better.
        error: mean squared error of the final state on the calibration points, at ``values``.
        before, after: Fréchet distance at the start and at ``values``.
        error_before, held_out_before: the error at the start, there and on held-out noises.
        calls: network calls (batches, of points and of pictures); seconds: how long it took.
    """

    values: np.ndarray
    error: float
    before: float
    after: float
    error_before: float
    held_out_before: float
    calls: int
    seconds: float


@dataclass
class _Place:
    """Everything known at one choice of the numbers."""

    values: np.ndarray
    r: torch.Tensor
    z: torch.Tensor
    features: np.ndarray
    error: float
    distance: float
    loss: float


def refine(
    make: Make,
    start: np.ndarray,
    free: Sequence[int],
    points: tuple[Denoiser, torch.Tensor, torch.Tensor],
    noises: tuple[Denoiser, torch.Tensor],
    distance: Distance,
    held_out: Callable[[Plan], float],
    *,
    prediction: str = "sample",
    weight: float = 1.0,
    bound: float = 1.25,
    rounds: int = 1,
    step: float = 1e-2,
    trust: float = 0.1,
    progress: Callable[[str], None] | None = None,
) -> Refined:
    """Numbers with a smaller ``error/error₀ + weight·FD/FD₀`` than the start's; never worse than the start.

    Args:
        make: numbers → plan; None where they define none.
        start: one-dimensional, at or near the optimum of the error.
        free: which of the numbers may move.
        points: (denoiser, start noises, final states of the fine run), for the error.
        noises: (denoiser, start noises), for the distance.
        distance: of the final states of ``noises``.
        held_out: error of a plan on points that are not searched. A candidate whose error, there or on ``points``, is
            above ``bound`` times the start's is not taken.
        weight: of the distance, in units of both starts.
        rounds: how often all derivatives are made.
        step: of the forward differences.
        trust: how far a number may move in the first step; later steps adapt it.
        progress: called with a line of text after each derivative and each step.

    Raises:
        DiffsampError: the start defines no plan, or its run is not finite.
    """
    clock = time.monotonic()
    near, far = Remembered(points[0]), Remembered(noises[0])
    x, goal = points[1], points[2]
    count, free = goal.numel(), list(free)
    level_off = scale = first_distance = 1.0

    def levelled(r: torch.Tensor) -> float:
        each = r.square().sum(1)
        return float((level_off * each / (level_off + each)).sum())

    def run(values: np.ndarray) -> tuple[torch.Tensor, torch.Tensor] | None:
        plan = make(values)
        if plan is None:
            return None
        near.begin()
        far.begin()
        r = (engine.sample(plan, near, x, prediction=prediction) - goal).double().flatten(1)
        z = engine.sample(plan, far, noises[1], prediction=prediction)
        return (r, z) if bool(torch.isfinite(r).all()) and bool(torch.isfinite(z).all()) else None

    def look(values: np.ndarray) -> _Place | None:
        found = run(values)
        if found is None:
            return None
        features = distance.features(found[1])
        place = _Place(values, *found, features, float(found[0].square().sum()) / count, distance.value(features), 0.0)
        place.loss = levelled(place.r) / scale + weight * place.distance / first_distance
        return place

    def keep() -> None:
        near.keep()
        far.keep()

    here = look(np.array(start, dtype=np.float64))
    if here is None:
        raise DiffsampError("denoiser: the run that the search starts from is not finite; check the model and its grid")
    keep()
    each = here.r.square().sum(1)
    level_off = 10 * max(float(each.median()), 1e-12 * float(each.mean()), 1e-300)
    scale, first_distance = max(levelled(here.r), 1e-300), max(abs(here.distance), 1e-300)
    here.loss = levelled(here.r) / scale + weight * here.distance / first_distance
    begun, plan = here, make(here.values)
    assert plan is not None
    unseen = held_out(plan)
    most = bound * here.error, bound * unseen
    for round_number in range(rounds):
        began = here.loss
        of_r, of_f = _derivatives(run, distance, here, free, step, progress)
        stale = False
        while trust > 1e-4:
            by = (level_off / (level_off + here.r.square().sum(1))).square()
            flat = (of_r * by.sqrt()[:, None]).flatten(1)
            curvature = (flat @ flat.T).cpu().numpy() / scale
            slope = (flat @ (here.r * by.sqrt()[:, None]).flatten()).cpu().numpy() / scale
            move = _best_move(curvature, slope, distance, here.features, of_f, weight / first_distance, trust)
            values = here.values.copy()
            values[free] += move
            there = look(values)
            taken = there is not None and there.loss < here.loss and there.error <= most[0]
            if taken:
                assert there is not None
                plan = make(values)
                taken = plan is not None and held_out(plan) <= most[1]
            if progress is not None and there is not None:
                progress(
                    f"round {round_number + 1}: error ×{there.error / begun.error:.3f}, "
                    f"FD {there.distance:.4f} (from {begun.distance:.4f}), {'taken' if taken else 'dropped'}"
                )
            if not taken:
                trust /= 3
                # Derivatives that a step has bent are made anew before the box gets small.
                if stale:
                    break
                continue
            assert there is not None
            keep()
            total = float(move @ move)
            change = torch.from_numpy(move)
            missed = (there.r - here.r) - torch.tensordot(change, of_r, 1)
            of_r = of_r + change[:, None, None] * missed / total
            short = (there.features - here.features) - np.tensordot(move, of_f, 1)
            of_f = of_f + move[:, None, None] * short / total
            gained = here.loss - there.loss
            here, stale, trust = there, True, 2 * trust
            if gained < 2e-3 * here.loss:
                break
        if here.loss > began - 2e-3 * began or trust <= 1e-4:
            break
    return Refined(
        here.values, here.error, begun.distance, here.distance, begun.error, unseen, near.calls + far.calls,
        time.monotonic() - clock,
    )  # fmt: skip


def _derivatives(
    run: Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor] | None],
    distance: Distance,
    here: _Place,
    free: list[int],
    step: float,
    progress: Callable[[str], None] | None,
) -> tuple[torch.Tensor, np.ndarray]:
    """Of the residual, [numbers, points, d], and of the features, [numbers, pictures, width], by the free numbers."""
    of_r, of_f = [], []
    for done, j in enumerate(free):
        for signed in (step, -step):
            values = here.values.copy()
            values[j] += signed
            found = run(values)
            if found is not None:
                break
        if found is None:
            of_r.append(torch.zeros_like(here.r))
            of_f.append(np.zeros_like(here.features))
            continue
        of_r.append((found[0] - here.r) / signed)
        moved = (found[1] - here.z) / signed
        # Pictures have 8 bits: a change of about 3 grey levels, both ways, so that rounding does not hide it.
        reach = 0.025 / max(float(moved.square().mean().sqrt()), 1e-12)
        up, down = (distance.features(here.z + s * reach * moved) for s in (1, -1))
        of_f.append((up - down) / (2 * reach))
        if progress is not None:
            progress(f"derivative {done + 1} of {len(free)}")
    return torch.stack(of_r), np.stack(of_f)


def _best_move(
    curvature: np.ndarray, slope: np.ndarray, distance: Distance, features: np.ndarray, of_f: np.ndarray, rate: float,
    trust: float,
) -> np.ndarray:  # fmt: skip
    """The change of the free numbers, each at most ``trust``, with the least loss by what is linear in it."""
    from scipy.optimize import minimize

    def expected(move: np.ndarray) -> tuple[float, np.ndarray]:
        value, by_feature = distance.with_slope(features + np.tensordot(move, of_f, 1))
        bent = curvature @ move
        gain = rate * np.tensordot(of_f, by_feature, ((1, 2), (0, 1)))
        return float(move @ bent + 2 * slope @ move + rate * value), 2 * bent + 2 * slope + gain

    return minimize(
        expected, np.zeros(len(slope)), jac=True, method="L-BFGS-B", bounds=[(-trust, trust)] * len(slope)
    ).x  # fmt: skip
