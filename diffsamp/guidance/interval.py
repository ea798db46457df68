"""Guidance in an interval of noise levels (or of steps), the conditional prediction outside it.

Source: Kynkäänniemi et al. 2024, arXiv:2404.07724; ``sigma_min`` and ``sigma_max`` are theirs (sigma of EDM, which is
the noise-to-signal ratio sigma/alpha of other processes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..errors import DiffsampError
from .base import Guidance, GuidanceBase, GuidanceState, LevelLike, check_number


@dataclass(frozen=True)
class Interval(GuidanceBase):
    """``inner`` where sigma_min < sigma/alpha <= sigma_max and start <= progress < stop.

    Args:
        inner: any guidance. Its memory does not advance outside the interval.
        sigma_min, sigma_max: noise-to-signal ratios, 0 <= sigma_min < sigma_max (infinity allowed).
        start, stop: fractions of the run, 0 <= start < stop <= 1; need a caller that knows the number of steps.
    """

    inner: Guidance
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.sigma_min, "sigma_min", 0.0)
        if self.sigma_max != math.inf:
            check_number(self.sigma_max, "sigma_max", 0.0)
        check_number(self.start, "start", 0.0, 1.0)
        check_number(self.stop, "stop", 0.0, 1.0)
        for low, high, name in (
            (self.sigma_min, self.sigma_max, "sigma_min, sigma_max"),
            (self.start, self.stop, "start, stop"),
        ):
            if not low < high:
                raise DiffsampError(f"{name}: got {low:g}, {high:g}; the first must be below the second")

    @property
    def guidance_scale(self) -> float | None:  # type: ignore[override]
        """Scale of the inner method."""
        return self.inner.guidance_scale

    @property
    def conditions(self) -> int:  # type: ignore[override]
        """Predictions that the inner method takes."""
        return self.inner.conditions

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """As the inner method."""
        return self.inner.linear

    def with_scale(self, guidance_scale: float) -> Interval:
        """A copy with another scale."""
        return replace(self, inner=self.inner.with_scale(guidance_scale))

    def init(self, batch: int = 1, steps: int | None = None) -> GuidanceState:
        """State of the inner method."""
        return self.inner.init(batch, steps)

    def active(self, state: GuidanceState, level: LevelLike) -> bool:
        """Whether guidance acts at this level and step."""
        ratio = math.inf if level.alpha == 0.0 else level.sigma / level.alpha
        if not self.sigma_min < ratio <= self.sigma_max:
            return False
        if self.start == 0.0 and self.stop == 1.0:
            return True
        if state.steps is None:
            raise DiffsampError("start, stop: the number of steps is not known here; give sigma_min and sigma_max")
        return int(self.start * state.steps) <= state.step < int(self.stop * state.steps)

    def __call__(
        self,
        state: GuidanceState,
        cond_x0: torch.Tensor,
        uncond_x0: torch.Tensor,
        x: torch.Tensor,
        level: LevelLike,
        *extra_x0: torch.Tensor,
    ) -> tuple[torch.Tensor, GuidanceState]:
        if self.active(state, level):
            return self.inner(state, cond_x0, uncond_x0, x, level, *extra_x0)
        return cond_x0, state.advance(state.buffer)
