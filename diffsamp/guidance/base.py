"""What a guidance method is: a frozen set of options, and a pure step with explicit state.

A guidance maps the predictions of the network with and without the condition to one prediction. All of them work on
x0 (the denoised prediction) whatever the network emits, because methods that are not linear in the predictions give
another result in another space; callers convert with :meth:`diffsamp.process.Process.x0_coefficients`.

    state = guidance.init(batch, steps)
    x0, state = guidance(state, cond_x0, uncond_x0, x, level)     # once per network evaluation

``guidance_scale`` is 1 for "the conditional prediction alone" in every method.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch

from ..errors import DiffsampError


@runtime_checkable
class LevelLike(Protocol):
    """A noise level, x = alpha·x0 + sigma·epsilon (:class:`diffsamp.process.Level` is one)."""

    @property
    def alpha(self) -> float: ...

    @property
    def sigma(self) -> float: ...


@dataclass(frozen=True)
class GuidanceState:
    """What a guidance remembers between evaluations.

    Attributes:
        step: evaluations done so far.
        steps: evaluations of the whole run, None where the caller does not know.
        buffer: running sum of the guidance direction (momentum), shape of x0, None before the first evaluation and for
            methods without memory. Never written in place.
    """

    step: int = 0
    steps: int | None = None
    buffer: torch.Tensor | None = None

    def advance(self, buffer: torch.Tensor | None = None) -> GuidanceState:
        """The state after one more evaluation."""
        return GuidanceState(self.step + 1, self.steps, buffer)

    def select(self, index: torch.Tensor) -> GuidanceState:
        """The state of the samples ``index`` (resampling, or a smaller batch)."""
        return GuidanceState(self.step, self.steps, None if self.buffer is None else self.buffer[index])


@runtime_checkable
class Guidance(Protocol):
    """Protocol of every guidance.

    Attributes:
        guidance_scale: strength w; 1 gives the conditional prediction; None leaves it to a pipeline.
        conditions: number of predictions taken, 2 (cond, uncond) or 3 (cond, uncond, negative).
        linear: whether the result is the same whatever the predictions are expressed in, so that a caller need not
            convert them to x0.
    """

    @property
    def guidance_scale(self) -> float | None: ...

    @property
    def conditions(self) -> int: ...

    @property
    def linear(self) -> bool: ...

    def with_scale(self, guidance_scale: float) -> Self:
        """A copy with another scale."""
        ...

    def init(self, batch: int = 1, steps: int | None = None) -> GuidanceState:
        """State at the start of a run of ``steps`` evaluations on ``batch`` samples."""
        ...

    def __call__(
        self,
        state: GuidanceState,
        cond_x0: torch.Tensor,
        uncond_x0: torch.Tensor,
        x: torch.Tensor,
        level: LevelLike,
        *extra_x0: torch.Tensor,
    ) -> tuple[torch.Tensor, GuidanceState]:
        """One evaluation.

        Args:
            state: from :meth:`init` or the last call.
            cond_x0, uncond_x0: denoised predictions, shape (batch, ...).
            x: the noisy sample that the network saw, in the process's own scale (alpha·x0 + sigma·epsilon).
            level: the noise level of ``x``.
            extra_x0: further predictions, where ``conditions`` is above 2.

        Returns:
            The guided x0 in the dtype of ``cond_x0``, and the next state.
        """
        ...


class GuidanceBase(ABC):
    """The part that all methods share: no memory, two predictions. Methods are frozen dataclasses."""

    conditions = 2
    linear = False
    guidance_scale: float | None = None

    @property
    def scale(self) -> float:
        """The scale as a number; an error where it was left to a pipeline and there is none."""
        if self.guidance_scale is None:
            raise DiffsampError("guidance_scale: is not set; give one, as in 'apg:7.5'")
        return float(self.guidance_scale)

    def with_scale(self, guidance_scale: float) -> Self:
        """A copy with another scale."""
        return replace(self, guidance_scale=guidance_scale)  # type: ignore[type-var]

    def init(self, batch: int = 1, steps: int | None = None) -> GuidanceState:
        """State at the start of a run; ``steps`` is the number of evaluations, where known."""
        return GuidanceState(0, steps, None)

    @abstractmethod
    def __call__(
        self,
        state: GuidanceState,
        cond_x0: torch.Tensor,
        uncond_x0: torch.Tensor,
        x: torch.Tensor,
        level: LevelLike,
        *extra_x0: torch.Tensor,
    ) -> tuple[torch.Tensor, GuidanceState]:
        """One evaluation; see :meth:`Guidance.__call__`."""


def check_scale(value: Any, name: str = "guidance_scale", *, optional: bool = False) -> None:
    """Refuse a scale below 1 or not finite; None passes where ``optional``."""
    if value is None and optional:
        return
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and number >= 1.0):
        raise DiffsampError(f"{name}: got {value!r}; must be a finite number of 1 or above (1 is no guidance)")


def check_number(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a finite float in [low, high]."""
    bounds = f" in [{low:g}, {high:g}]"
    if high == math.inf:
        bounds = "" if low == -math.inf else f" of {low:g} or above"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DiffsampError(f"{name}: got {value!r}; must be a finite number{bounds}")
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high:
        raise DiffsampError(f"{name}: got {value!r}; must be a finite number{bounds}")
    return number


def check_pair(cond: torch.Tensor, other: torch.Tensor, name: str = "uncond_x0") -> None:
    """Refuse predictions of different shapes (broadcasting would hide the mistake)."""
    if cond.shape != other.shape:
        raise DiffsampError(f"{name}: has shape {tuple(other.shape)}, cond_x0 has {tuple(cond.shape)}; must be equal")


def per_sample(scalars: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A vector of one number per sample, shaped to multiply ``like`` (batch, ...)."""
    return scalars.reshape(-1, *([1] * (like.ndim - 1)))
