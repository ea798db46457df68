"""The greedy search: one scalar per step against the reference, no backward pass, and a guard on the final state.

At step i the earlier values are frozen and the walk is at its own state. A candidate changes the rows i and after; its
loss is the mean squared distance to the reference at the next level *after that level's corrector* (DC-Solver,
Section 3.3). Where the next row has no corrector the state is a polynomial of the candidate and the minimum has a
closed form; else each candidate costs one network call at the predicted point.

No call is made twice: the winning candidate's is the walk's next one, and the first ones of the walk and of the neutral
candidate are the base's.

Guard: the base, the last value alone and the greedy values are compared by the error of the final state on the
calibration points, and the best is kept: never worse than the base there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .. import engine
from ..errors import DiffsampError
from ..plan import Plan
from ..solvers.dc import dc
from ..solvers.dualfast import dualfast, pinned_noise
from .adamw import adamw_ratio
from .reference import Denoiser, Reference
from .scalar import bounded_minimum, polynomial_minimum

RATIO_BOUNDS = (-0.5, 3.0)
RATIO_START = (0.4, 0.75, 1.0, 1.25, 1.7)
CONSTANT_BOUNDS = (0.0, 1.5)
CONSTANT_START = (0.0, 0.15, 0.4, 0.8)
MIN_POINTS, ADVISED_POINTS = 4, 10
METHODS = ("search", "adamw")


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        values: one per network call.
        kept: what the guard kept: ``base``, ``last`` or ``greedy``.
        before, after: mean squared error of the final state on the calibration points: base, and with ``values``.
        calls: network calls (batches) that the search made, without the reference.
        steps: per searched step, (index, value, loss at the neutral value, loss at the value).
    """

    values: tuple[float, ...]
    kept: str
    before: float
    after: float
    calls: int
    steps: tuple[tuple[int, float, float, float], ...]


def check_points(n: int) -> None:
    """Refuse a calibration set that is too small; warn where it is below the advised size."""
    if n < MIN_POINTS:
        raise DiffsampError(f"points: got {n}; a calibration needs at least {MIN_POINTS}, {ADVISED_POINTS} are advised")
    if n < ADVISED_POINTS:
        warnings.warn(f"points: {n} is few; {ADVISED_POINTS} are advised", stacklevel=3)


def mse(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean squared difference in float64, over everything."""
    return float((x.double() - y.double()).square().mean())


def check_finite(output: torch.Tensor, index: int) -> None:
    """Refuse a prediction with a NaN or an infinity, naming its step."""
    if not bool(torch.isfinite(output).all()):
        raise DiffsampError(f"denoiser: the prediction at step {index} is not finite; check the model and its dtype")


class _Walk:
    """Runs rows of plans on the calibration points; counts network calls and makes none twice."""

    def __init__(self, denoiser: Denoiser, prediction: str, neutral: float) -> None:
        self.denoiser, self.prediction, self.neutral, self.calls = denoiser, prediction, neutral, 0
        self._known: dict[tuple[float, ...], torch.Tensor] = {}

    def call(self, plan: Plan, state: engine.State, values: Sequence[float]) -> torch.Tensor:
        """The prediction at ``state``, which the ``values`` of the rows before it determine."""
        key = tuple(values[: state.index])
        if key not in self._known:
            self.calls += 1
            with torch.no_grad():
                output = self.denoiser(state.input, plan.rows[state.index].level)
            check_finite(output, state.index)
            self._known[key] = output
        return self._known[key]

    def forget(self, values: Sequence[float]) -> None:
        """Drop what neither the walk at ``values`` nor the base can ask for again."""
        kept = tuple(values)
        self._known = {
            key: output for key, output in self._known.items()
            if key == kept or all(v == self.neutral for v in key)
        }  # fmt: skip

    def step(self, plan: Plan, state: engine.State, output: torch.Tensor) -> engine.State:
        return engine.step(plan, state, output, prediction=self.prediction)


def _whole_history(plan: Plan) -> Plan:
    """The same plan, told to keep every output: candidates of one search read histories of different lengths."""
    plan.__dict__["depth"] = plan.nfe
    return plan


def _corrects(plan: Plan, index: int) -> bool:
    """Whether row ``index`` corrects the point that row ``index − 1`` predicted, using its output."""
    correct = plan.rows[index].correct if index < plan.nfe else None
    return correct is not None and bool(correct.m)


# How a value is found where it is not by a scalar search: (base, state, output of the row, goal) to the value, its
# loss, the loss at the neutral value and the network calls made.
Descent = Callable[[Plan, engine.State, torch.Tensor, torch.Tensor], tuple[float, float, float, int]]


def _search(
    make: Callable[[Sequence[float]], Plan],
    reference: Reference,
    denoiser: Denoiser,
    x: torch.Tensor,
    *,
    prediction: str,
    neutral: float,
    first: int,
    degree: int,
    bounds: tuple[float, float],
    start: Sequence[float],
    evaluations: int,
    guard: bool,
    progress: Callable[[int, int], None] | None,
    descend: Descent | None = None,
) -> Result:
    check_points(len(x))

    def build(values: Sequence[float]) -> Plan:
        # A copy: the base itself, which the caller owns, comes back where nothing changes.
        made = make(values)
        # Rows that are done must have kept what a later candidate reads.
        first_row = replace(made.rows[0], keep_pin=pinned_noise(made))
        return _whole_history(made.with_rows([first_row, *made.rows[1:]], check=False))

    base = build(())
    n = base.nfe
    walk = _Walk(denoiser, prediction, neutral)
    values = [neutral] * n
    state, plain = engine.init(base, x), engine.init(base, x)
    report: list[tuple[int, float, float, float]] = []
    target = reference.at(base.last_level)
    last = neutral

    def closed(state: engine.State, output: torch.Tensor, i: int) -> tuple[float, float, float]:
        goal = reference.at(base.rows[i].next_level)

        def at(v: float) -> torch.Tensor:
            return walk.step(build([*values[:i], v, *[neutral] * (n - i - 1)]), state, output).input

        unchanged = mse(at(neutral), goal)
        v, loss = polynomial_minimum(at, goal, degree, bounds)
        return (v, loss, unchanged) if loss < unchanged else (neutral, unchanged, unchanged)

    for i in range(n):
        plan = build(values)
        output = walk.call(plan, state, values)
        if i >= first:
            goal = reference.at(base.rows[i].next_level)
            if descend is not None:
                v, loss, unchanged, made_calls = descend(plan, state, output, goal)
                walk.calls += made_calls
            elif not _corrects(plan, i + 1):
                v, loss, unchanged = closed(state, output, i)
            else:

                def cost(v: float, i: int = i, state=state, output=output, goal=goal) -> float:
                    given = [*values[:i], v, *[neutral] * (n - i - 1)]
                    candidate = build(given)
                    moved = walk.step(candidate, state, output)
                    return mse(walk.step(candidate, moved, walk.call(candidate, moved, given)).base, goal)

                v, loss, seen = bounded_minimum(cost, start, bounds, evaluations)
                unchanged = seen[neutral]
            values[i] = v
            report.append((i, v, unchanged, loss))
        state = walk.step(build(values), state, output)
        walk.forget(values[: i + 1])
        if progress is not None:
            progress(i + 1, n)
    choices = {"greedy": (tuple(values), mse(state.input, target))}
    # The base's own run, and the last value alone, which shares all calls with it.
    unchanged_values = (neutral,) * n
    for i in range(n):
        output = walk.call(base, plain, unchanged_values)
        if i == n - 1 and i >= first:
            saved, values = values, list(unchanged_values)
            last, loss, _ = closed(plain, output, i)
            values = saved
            choices["last"] = ((*[neutral] * (n - 1), last), loss)
        plain = walk.step(base, plain, output)
    before = mse(plain.input, target)
    choices["base"] = ((neutral,) * n, before)
    kept = (
        min(("base", "last", "greedy"), key=lambda k: choices[k][1] if k in choices else float("inf"))
        if guard
        else "greedy"
    )
    found, after = choices[kept]
    return Result(found, kept, before, after, walk.calls, tuple(report))


def search_ratios(
    plan: Plan,
    reference: Reference,
    denoiser: Denoiser,
    x: torch.Tensor,
    *,
    k: int = 2,
    prediction: str = "sample",
    evaluations: int = 8,
    guard: bool = True,
    method: str = "search",
    iterations: int = 40,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """DC-Solver's ratios for ``plan``.

    Args:
        plan: the base, a deterministic multistep solver.
        reference: fine states at the plan's levels, from the same ``x``.
        denoiser: ``denoiser(x, level) -> prediction``, guided already.
        x: start of the calibration points, (points, ...); 10 are advised.
        k: degree of the interpolation.
        evaluations: network calls per searched step, at most.
        guard: keep the best of base, last ratio alone and greedy.
        method: ``search``, or ``adamw``: the published recipe, gradient descent through the network from ratio 1.
        iterations: of ``adamw``, each a network call with a backward pass; 40 in the paper, 20 in the authors' code.

    Raises:
        DiffsampError: too few points, a prediction that is not finite, a base that is no multistep solver.
    """

    if method not in METHODS:
        raise DiffsampError(f"method: got {method!r}; accepted: {', '.join(METHODS)}")
    if evaluations < len(RATIO_START):
        raise DiffsampError(f"evaluations: got {evaluations}; a searched step needs at least {len(RATIO_START)}")
    if iterations < 1:
        raise DiffsampError(f"iterations: got {iterations}; accepted: 1 and above")

    def build(ratios: Sequence[float]) -> Plan:
        return dc(plan, ratios=ratios or None, k=k)

    def descend(
        at: Plan, state: engine.State, output: torch.Tensor, goal: torch.Tensor
    ) -> tuple[float, float, float, int]:
        return adamw_ratio(at, state, output, goal, denoiser, k=k, prediction=prediction, iterations=iterations)

    return _search(
        build, reference, denoiser, x, prediction=prediction, neutral=1.0, first=k, degree=k, bounds=RATIO_BOUNDS,
        start=RATIO_START, evaluations=evaluations, guard=guard, progress=progress,
        descend=descend if method == "adamw" else None,
    )  # fmt: skip


def search_constants(
    plan: Plan,
    reference: Reference,
    denoiser: Denoiser,
    x: torch.Tensor,
    *,
    tau: str | int = "first",
    prediction: str = "sample",
    evaluations: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """DualFast's constants for ``plan``, found as DC-Solver's ratios are; 0 is a candidate of every step.

    Arguments and errors as in :func:`search_ratios`; ``tau`` as in :func:`diffsamp.solvers.dualfast.dualfast`.
    """

    def build(c: Sequence[float]) -> Plan:
        return dualfast(plan, c=tuple(c) or 0.0, tau=tau)

    return _search(
        build, reference, denoiser, x, prediction=prediction, neutral=0.0, first=1, degree=1, bounds=CONSTANT_BOUNDS,
        start=CONSTANT_START, evaluations=evaluations, guard=True, progress=progress,
    )  # fmt: skip
