"""CFG-Zero*: the unconditional velocity is scaled to its best fit of the conditional one before guiding.

    s = <v_c, v_u>/‖v_u‖²,   v = s·v_u + w·(v_c − s·v_u),   v = 0 in the first steps

Source: Fan et al. 2025, arXiv:2503.18886 (flow matching). Twin: diffusers ClassifierFreeZeroStarGuidance.
For other processes the same fit is done on epsilon, and the zero start, which is a statement about a velocity at pure
noise, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import DiffsampError
from .base import GuidanceBase, GuidanceState, LevelLike, check_pair, check_scale, per_sample
from .cfg import cfg
from .space import SIGMA_FLOOR, from_x0, is_flow, to_x0


def cfg_zero(cond: torch.Tensor, uncond: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """The update on velocities (or epsilons), shape (batch, ...)."""
    c, u = cond.flatten(1).float(), uncond.flatten(1).float()
    if cond.dtype == torch.float64:
        c, u = cond.flatten(1), uncond.flatten(1)
    fit = (c * u).sum(1) / (u * u).sum(1).clamp(min=1e-8)
    return cfg(cond, uncond * per_sample(fit, uncond).to(uncond.dtype), guidance_scale)


@dataclass(frozen=True)
class CFGZeroStar(GuidanceBase):
    """CFG-Zero*.

    Args:
        guidance_scale: w >= 1; None for a pipeline's own.
        zero_steps: first evaluations whose velocity is 0 (flow levels only).
    """

    guidance_scale: float | None = None
    zero_steps: int = 1

    def __post_init__(self) -> None:
        check_scale(self.guidance_scale, optional=True)
        if isinstance(self.zero_steps, bool) or not isinstance(self.zero_steps, int) or self.zero_steps < 0:
            raise DiffsampError(f"zero_steps: got {self.zero_steps!r}; must be a whole number of 0 or above")

    def __call__(
        self,
        state: GuidanceState,
        cond_x0: torch.Tensor,
        uncond_x0: torch.Tensor,
        x: torch.Tensor,
        level: LevelLike,
        *extra_x0: torch.Tensor,
    ) -> tuple[torch.Tensor, GuidanceState]:
        check_pair(cond_x0, uncond_x0)
        after = state.advance()
        if self.scale == 1.0:
            return cond_x0, after
        if is_flow(level) and state.step < self.zero_steps:
            return x.to(cond_x0.dtype).clone(), after  # velocity 0: x0 = x
        space = "v" if is_flow(level) else "epsilon"
        if level.sigma < SIGMA_FLOOR or (space == "epsilon" and level.alpha == 0.0):
            return cfg(cond_x0, uncond_x0, self.scale), after
        guided = cfg_zero(from_x0(cond_x0, x, level, space), from_x0(uncond_x0, x, level, space), self.scale)
        return to_x0(guided, x, level, space).to(cond_x0.dtype), after
