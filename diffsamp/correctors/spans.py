"""What part of the variance clock each row of a plan moves through: the net move of stages and churn."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import DiffsampError
from ..plan import Plan


@dataclass(frozen=True)
class Span:
    """One row's part in a step.

    Attributes:
        opens: the network is evaluated at the start of a step (not at a stage inside one): weights are closed here.
        start, stop: noise-to-signal before and after the step that this row commits; equal where it commits none.
        churn: injected noise variance relative to the forward process, z, as the row's drift implies it.
    """

    opens: bool
    start: float
    stop: float
    churn: float


def spans(plan: Plan) -> tuple[Span, ...]:
    """One :class:`Span` per row; kept on the plan.

    The clock only counts new ground: a churn sampler goes up before it comes down, and a step from s by way of s_hat to
    s' counts s² − s'². Counting the way down alone is wrong by up to a factor of 9 at strong churn.
    """
    cached = plan.__dict__.get("_spans")
    if cached is not None:
        return cached
    clock, opens, found = plan.first_level.noise_to_signal, True, []
    for row in plan.rows:
        assert row.base_level is not None
        reached = row.base_level.noise_to_signal
        if row.committed:
            reached = min(reached, row.next_level.noise_to_signal)
        stop = min(clock, reached)
        found.append(Span(opens, clock, stop, _churn(plan, row, clock, stop)))
        opens, clock = stop < clock, stop
    plan.__dict__["_spans"] = tuple(found)
    return plan.__dict__["_spans"]


def _churn(plan: Plan, row, start: float, stop: float) -> float:
    # xt' = (1 − c)·xt + c·x0 + ..., c = (1 + z)·h/(2 s0²); in the epsilon form xt' = xt − c·s0·epsilon.
    share = sum(row.advance.m) / row.next_level.alpha
    s = row.level.noise_to_signal
    if plan.form == "epsilon":
        share = -share / s
    part = 1.0 - (stop / s) ** 2
    return max(2.0 * share / part - 1.0, 0.0) if part > 0 else 0.0


def require_noise(plan: Plan) -> None:
    """DiffsampError where the plan is deterministic: duplicates would stay identical for ever."""
    if not plan.stochastic:
        raise DiffsampError(
            f"solver: {plan.solver or 'the plan'} is deterministic, so duplicated particles would stay identical; "
            "accepted: a stochastic solver, e.g. sde-dpmpp-2m or euler-ancestral"
        )
