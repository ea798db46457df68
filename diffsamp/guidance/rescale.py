"""Classifier-free guidance with its standard deviation pulled back to the conditional one's.

    g = u + w·(c − u),   out = phi·g·std(c)/std(g) + (1 − phi)·g        std over all but the batch axis

Source: Lin et al. 2024, arXiv:2305.08891, Section 3.4, Equations 15-16 (phi = 0.7 there, on a v-prediction model).
The standard deviation depends on the space: the paper's models predict v, diffusers rescales whatever the network
emits. ``space`` names it, so that an epsilon model can be given either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import DiffsampError
from .base import GuidanceBase, GuidanceState, LevelLike, check_number, check_pair, check_scale
from .cfg import cfg
from .space import SIGMA_FLOOR, SPACES, from_x0, to_x0


def rescale(guided: torch.Tensor, cond: torch.Tensor, phi: float) -> torch.Tensor:
    """``guided`` with its per-sample standard deviation moved to ``cond``'s by the share ``phi`` in [0, 1]."""
    dims = list(range(1, guided.ndim))
    wanted, found = cond.std(dim=dims, keepdim=True), guided.std(dim=dims, keepdim=True)
    factor = torch.where(found > 0, wanted / torch.where(found > 0, found, torch.ones_like(found)), 1.0)
    return guided * (1.0 - phi + phi * factor)


@dataclass(frozen=True)
class RescaledCFG(GuidanceBase):
    """CFG, rescaled.

    Args:
        guidance_scale: w >= 1; None for a pipeline's own.
        rescale: phi in [0, 1]; 0 is CFG.
        space: where the standard deviations are taken: ``"v"`` (the paper), ``"epsilon"`` or ``"x0"``.
    """

    guidance_scale: float | None = None
    rescale: float = 0.7
    space: str = "v"

    def __post_init__(self) -> None:
        check_scale(self.guidance_scale, optional=True)
        check_number(self.rescale, "rescale", 0.0, 1.0)
        if self.space not in SPACES:
            raise DiffsampError(f"space: got {self.space!r}; accepted: {', '.join(SPACES)}")

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
        guided = cfg(cond_x0, uncond_x0, self.scale)
        unusable = level.sigma < SIGMA_FLOOR or (self.space == "epsilon" and level.alpha == 0.0)
        if self.scale == 1.0 or (self.space != "x0" and unusable):
            return guided, state.advance()
        cond = from_x0(cond_x0, x, level, self.space)
        out = rescale(from_x0(guided, x, level, self.space), cond, self.rescale)
        return to_x0(out, x, level, self.space).to(cond_x0.dtype), state.advance()
