"""What part of the variance clock each row of a plan moves through: the net move of stages and churn."""

from __future__ import annotations

import math
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
        found.append(Span(opens, clock, stop, _churn(plan, len(found), stop)))
        opens, clock = stop < clock, stop
    plan.__dict__["_spans"] = tuple(found)
    return plan.__dict__["_spans"]


def _churn(plan: Plan, index: int, stop: float) -> float:
    # xt' = (1 − c)·xt + c·x0 + ..., c = (1 + z)·h/(2 s0²); in the epsilon form xt' = xt + Σ w_j·epsilon_j with
    # Σ w_j·s_j = −(1 + z)·h/2, which is how a score that does not change moves the sample.
    row = plan.rows[index]
    s, alpha = row.level.noise_to_signal, row.next_level.alpha
    if plan.form == "epsilon":
        if s == math.inf:
            return 0.0
        levels = [plan.rows[index - j].level.noise_to_signal for j in range(len(row.advance.m))]
        share = -sum(w * level for w, level in zip(row.advance.m, levels, strict=True)) / (alpha * s * s)
    else:
        share = sum(row.advance.m) / alpha
    part = 1.0 - (stop / s) ** 2
    return max(2.0 * share / part - 1.0, 0.0) if part > 0 else 0.0


def power_gains(total: float, ratio: float, churn: float) -> tuple[float, float]:
    """(drift, noise) gains of a step to ``ratio``·s for a target of total power B, relative to B = 1.

    Short steps hold the score: the gains are B and 1, which is right also where s is below the scale of the data and
    x0 follows xt. Long steps would overshoot (and blow up) with those: there x0 is held, the mixed score is
    B·(x0 − xt)/s², and its solution decays by ratio^((1+z)·B) and gathers the variance of such a process. Both agree to
    first order only, so holding x0 in a short step would take a second-order kernel's order away. A step is long if it
    forgets 85 % or more of where it was, or if the plain drift to a power B > 1 would go one and a half of the way to
    the mean; it is short below 60 % and one, and the gains in between are interpolated.
    """
    p = 1.0 + churn
    if ratio <= 0.0:
        return 1.0, 1.0
    long = _ramp(1.0 - ratio**p, 0.6, 0.85)
    if total > 1.0:
        long = max(long, _ramp(total * p / 2.0 * (1.0 - ratio * ratio), 1.0, 1.5))
    if long == 0.0:
        return total, 1.0
    log = math.log(ratio)
    drift = math.expm1(p * total * log) / math.expm1(p * log)
    noise = math.sqrt(_spread(p * total - 1.0, log) / _spread(p - 1.0, log))
    return total + long * (drift - total), 1.0 + long * (noise - 1.0)


def _ramp(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _spread(q: float, log_ratio: float) -> float:
    """(1 − ratio^(2q))/q, continued to q = 0."""
    return -2.0 * log_ratio if abs(q) < 1e-9 else -math.expm1(2.0 * q * log_ratio) / q


def require_noise(plan: Plan) -> None:
    """DiffsampError where the plan is deterministic: duplicates would stay identical for ever."""
    if not plan.stochastic:
        raise DiffsampError(
            f"solver: {plan.solver or 'the plan'} is deterministic, so duplicated particles would stay identical; "
            "accepted: a stochastic solver, e.g. sde-dpmpp-2m or euler-ancestral"
        )
