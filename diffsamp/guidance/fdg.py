"""Frequency-decoupled guidance: one scale for the low frequencies of the direction and one for the high.

    d = c − u,   d = low(d) + high(d),   x0 = c + (w_low − 1)·low(d) + (w_high − 1)·high(d)

low(d) is what is left of d after ``levels − 1`` rounds of blurring and halving, brought back to full size (a Laplacian
pyramid, Burt & Adelson 1983). Linear in the predictions, hence the same in every space.
Source: Sadat et al. 2025, arXiv:2506.19713. Twin: diffusers FrequencyDecoupledGuidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import conv2d, interpolate, pad

from ..errors import DiffsampError
from .base import GuidanceBase, GuidanceState, LevelLike, check_number, check_pair, check_scale

_BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def _blur(image: torch.Tensor) -> torch.Tensor:
    row = torch.tensor(_BINOMIAL, dtype=image.dtype, device=image.device)
    planes = image.reshape(-1, 1, *image.shape[-2:])
    mode = "reflect" if min(image.shape[-2:]) > 2 else "replicate"
    planes = pad(planes, (2, 2, 2, 2), mode=mode)
    planes = conv2d(conv2d(planes, row.view(1, 1, 1, 5)), row.view(1, 1, 5, 1))
    return planes.reshape(image.shape)


def low_frequencies(image: torch.Tensor, levels: int = 2) -> torch.Tensor:
    """The coarsest level of a Laplacian pyramid of ``levels``, at full size; acts on the last two axes."""
    sizes, low = [], image.reshape(-1, 1, *image.shape[-2:])
    for _ in range(levels - 1):
        sizes.append(low.shape[-2:])
        low = _blur(low)[..., ::2, ::2]
    for size in reversed(sizes):
        low = _blur(interpolate(low, size=tuple(size), mode="bilinear", align_corners=False))
    return low.reshape(image.shape)


def fdg(
    cond: torch.Tensor, uncond: torch.Tensor, scale_low: float, scale_high: float, levels: int = 2
) -> torch.Tensor:
    """Guided prediction, shape (batch, ..., height, width); equal scales are CFG."""
    d = cond - uncond
    if scale_low == scale_high:
        return cond + (scale_high - 1.0) * d
    return cond + (scale_high - 1.0) * d + (scale_low - scale_high) * low_frequencies(d, levels)


@dataclass(frozen=True)
class FrequencyDecoupled(GuidanceBase):
    """Frequency-decoupled guidance.

    Args:
        guidance_scale: w_high >= 1, of the high frequencies; None for a pipeline's own.
        low_scale: w_low >= 1, of the low frequencies (colour, composition); the paper keeps it the smaller one.
        levels: pyramid levels, 2 or above.
    """

    guidance_scale: float | None = None
    low_scale: float = 1.0
    levels: int = 2
    linear = True

    def __post_init__(self) -> None:
        check_scale(self.guidance_scale, optional=True)
        check_number(self.low_scale, "low_scale", 1.0)
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 2:
            raise DiffsampError(f"levels: got {self.levels!r}; must be a whole number of 2 or above")

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
        if cond_x0.ndim < 4:
            raise DiffsampError(
                f"cond_x0: has shape {tuple(cond_x0.shape)}; frequency-decoupled guidance needs height and width as "
                "the last axes, and packed tokens have none; accepted there: cfg, apg"
            )
        out = fdg(cond_x0, uncond_x0, self.low_scale, self.scale, self.levels)
        return out.to(cond_x0.dtype), state.advance()
