"""Perpendicular negative prompt: only the part of the negative direction that does not oppose the prompt is removed.

    d = c − u,   n = negative − u,   n⊥ = n − <n, d>·d/‖d‖²,   x0 = u + w·(d − w_neg·n⊥)

Source: Armandpour et al. 2023, arXiv:2304.04968. Takes three predictions (conditional, unconditional with
an empty prompt, negative prompt), so a pipeline that makes two cannot carry it. Depends on differences only, hence the
same in every space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import DiffsampError
from .base import GuidanceBase, GuidanceState, LevelLike, check_number, check_pair, check_scale, per_sample


def perp_neg(
    cond: torch.Tensor, uncond: torch.Tensor, negative: torch.Tensor, guidance_scale: float, negative_scale: float
) -> torch.Tensor:
    """Guided prediction, shape (batch, ...)."""
    d, n = cond - uncond, negative - uncond
    wide_d, wide_n = d.flatten(1).double(), n.flatten(1).double()
    dd = (wide_d * wide_d).sum(1)
    share = torch.where(dd > 0, (wide_d * wide_n).sum(1) / dd.clamp(min=1e-300), 0.0)
    perpendicular = n - per_sample(share, n).to(n.dtype) * d
    return uncond + guidance_scale * (d - negative_scale * perpendicular)


@dataclass(frozen=True)
class PerpNeg(GuidanceBase):
    """Perpendicular negative prompt.

    Args:
        guidance_scale: w >= 1.
        negative_scale: w_neg >= 0, weight of the negative prompt.
    """

    guidance_scale: float | None = None
    negative_scale: float = 1.0
    conditions = 3
    linear = True

    def __post_init__(self) -> None:
        check_scale(self.guidance_scale, optional=True)
        check_number(self.negative_scale, "negative_scale", 0.0)

    def __call__(
        self,
        state: GuidanceState,
        cond_x0: torch.Tensor,
        uncond_x0: torch.Tensor,
        x: torch.Tensor,
        level: LevelLike,
        *extra_x0: torch.Tensor,
    ) -> tuple[torch.Tensor, GuidanceState]:
        if len(extra_x0) != 1:
            raise DiffsampError(
                f"guidance: perp-neg takes 3 predictions (cond, uncond, negative), got {2 + len(extra_x0)}"
            )
        check_pair(cond_x0, uncond_x0)
        check_pair(cond_x0, extra_x0[0], "negative_x0")
        return perp_neg(cond_x0, uncond_x0, extra_x0[0], self.scale, self.negative_scale), state.advance()
