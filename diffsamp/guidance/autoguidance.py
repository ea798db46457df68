"""Autoguidance: guide away from a weaker version of the same model instead of away from "no condition".

    x0 = strong + (w − 1)·(strong − weak)          both with the condition

Source: Karras et al. 2024, arXiv:2406.02507. The weak prediction comes from a second, smaller or less
trained model, or from the same one with layers skipped (Hyung et al. 2025, arXiv:2411.18664).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import DiffsampError
from .base import GuidanceBase, GuidanceState, LevelLike, check_pair, check_scale
from .cfg import cfg


@dataclass(frozen=True)
class AutoGuidance(GuidanceBase):
    """Autoguidance. As a plain function, the second prediction it is given is the weak model's.

    Args:
        guidance_scale: w >= 1; None for a pipeline's own.
        weak: the weak denoiser. In a pipeline: a module called with the strong one's arguments. In
            :func:`diffsamp.sample`: pass it to :func:`pair`.
        skip_layers: in a pipeline, in place of ``weak``: indices of transformer blocks that the weak pass leaves out.
    """

    guidance_scale: float | None = None
    weak: Any = field(default=None, repr=False)
    skip_layers: tuple[int, ...] = ()
    linear = True

    def __post_init__(self) -> None:
        check_scale(self.guidance_scale, optional=True)
        layers = self.skip_layers
        layers = (layers,) if isinstance(layers, int) and not isinstance(layers, bool) else tuple(layers)
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in layers):
            raise DiffsampError(f"skip_layers: got {self.skip_layers!r}; must be block indices of 0 or above")
        if layers and self.weak is not None:
            raise DiffsampError("weak, skip_layers: both given; accepted: one of them")
        object.__setattr__(self, "skip_layers", layers)

    def __call__(
        self,
        state: GuidanceState,
        cond_x0: torch.Tensor,
        uncond_x0: torch.Tensor,
        x: torch.Tensor,
        level: LevelLike,
        *extra_x0: torch.Tensor,
    ) -> tuple[torch.Tensor, GuidanceState]:
        check_pair(cond_x0, uncond_x0, "weak x0")
        return cfg(cond_x0, uncond_x0, self.scale), state.advance()


def pair(strong: Callable[..., torch.Tensor], weak: Callable[..., torch.Tensor]) -> Callable[..., tuple]:
    """A denoiser that returns (strong, weak), for :func:`diffsamp.sample` with a guidance."""

    def denoiser(x: torch.Tensor, level: LevelLike) -> tuple[torch.Tensor, torch.Tensor]:
        return strong(x, level), weak(x, level)

    return denoiser
