"""Classifier-free guidance.

    x0 = c + (w − 1)·(c − u)  =  u + w·(c − u)

Linear in the predictions, hence the same in every space. Source: Ho & Salimans 2022, arXiv:2207.12598, Equation 6
(whose weight is w − 1 here).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import GuidanceBase, GuidanceState, LevelLike, check_pair, check_scale


def cfg(cond: torch.Tensor, uncond: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """u + w·(c − u); exactly ``cond`` at w = 1. Any shape, any space."""
    if guidance_scale == 1.0:
        return cond
    # The order of operations is the pipelines' own, so that the result is theirs to the bit.
    return uncond + guidance_scale * (cond - uncond)


@dataclass(frozen=True)
class CFG(GuidanceBase):
    """Classifier-free guidance. ``guidance_scale`` >= 1; None where a pipeline's own scale is to be used."""

    guidance_scale: float | None = None
    linear = True

    def __post_init__(self) -> None:
        check_scale(self.guidance_scale, optional=True)

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
        return cfg(cond_x0, uncond_x0, self.scale), state.advance()
