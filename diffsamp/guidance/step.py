"""A guided solver step: predictions to x0, guidance, and one row of a plan."""

from __future__ import annotations

import torch

from .. import engine
from ..plan import Plan
from .base import Guidance, GuidanceState
from .fused import fused_step


def guided_step(
    plan: Plan,
    state: engine.State,
    guidance: Guidance,
    memory: GuidanceState,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    noise: torch.Tensor | None = None,
    *,
    prediction: str = "sample",
) -> tuple[engine.State, GuidanceState]:
    """Guide two raw predictions at ``state.input`` and apply the plan's next row.

    Args:
        plan, state: as for :func:`diffsamp.engine.step`.
        guidance, memory: a method of two predictions and its state.
        cond, uncond: raw predictions of type ``prediction``, shape (batch, ...).
        noise: unit noise, in rows that draw it.

    Returns:
        The next state of the solver and of the guidance.
    """
    level, x = plan.rows[state.index].level, state.input
    p, q = plan.process.x0_coefficients(level, prediction)
    fused = fused_step(plan, state, guidance, memory, cond, uncond, (p, q))
    if fused is not None:
        return fused
    c, u = cond.to(x.dtype), uncond.to(x.dtype)
    if p or q != 1.0:
        c, u = torch.mul(c, q).add_(x, alpha=p), torch.mul(u, q).add_(x, alpha=p)
    x0, memory = guidance(memory, c, u, x, level)
    return engine.step(plan, state, x0, noise, prediction="sample"), memory
