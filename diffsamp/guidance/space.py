"""Moving a prediction between x0 and the spaces that some methods are defined in.

For x = alpha·x0 + sigma·epsilon:  epsilon = (x − alpha·x0)/sigma,  and the velocity is v = alpha·epsilon − sigma·x0 for
a variance-preserving process (Salimans & Ho 2022, arXiv:2202.00512) and epsilon − x0 for a flow.
"""

from __future__ import annotations

import torch

from ..errors import DiffsampError
from .base import LevelLike

SPACES = ("x0", "epsilon", "v")
# Below this sigma the way back from x0 divides rounding errors by almost nothing.
SIGMA_FLOOR = 1e-4


def is_flow(level: LevelLike) -> bool:
    """Whether alpha = 1 − sigma. A variance-preserving level meets this only at sigma = 0 and sigma = 1."""
    return abs(level.alpha + level.sigma - 1.0) < 1e-9


def from_x0(x0: torch.Tensor, x: torch.Tensor, level: LevelLike, space: str) -> torch.Tensor:
    """x0 expressed as ``space``; needs sigma > 0 for all but ``"x0"``."""
    a, s = level.alpha, level.sigma
    if space == "x0":
        return x0
    if s == 0.0:
        raise DiffsampError(f"space: {space!r} is not defined at sigma = 0; accepted there: x0")
    if space == "epsilon":
        return (x - a * x0) / s
    if is_flow(level):
        return (x - x0) / s
    return (a * x - (a * a + s * s) * x0) / s


def to_x0(prediction: torch.Tensor, x: torch.Tensor, level: LevelLike, space: str) -> torch.Tensor:
    """The inverse of :func:`from_x0`; ``"epsilon"`` needs alpha > 0."""
    a, s = level.alpha, level.sigma
    if space == "x0":
        return prediction
    if space == "epsilon":
        if a == 0.0:
            raise DiffsampError("space: 'epsilon' does not determine x0 at alpha = 0; accepted there: x0, v")
        return (x - s * prediction) / a
    if is_flow(level):
        return x - s * prediction
    return (a * x - s * prediction) / (a * a + s * s)
