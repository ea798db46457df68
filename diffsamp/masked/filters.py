"""Temperature, top-k and top-p as maps of logits to logits; removed classes become minus infinity."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from diffsamp.errors import DiffsampError


def check_filters(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise `DiffsampError` unless temperature >= 0, top_k >= 1 or None, 0 < top_p <= 1 or None."""
    if not (isinstance(temperature, Real) and temperature >= 0 and math.isfinite(temperature)):
        raise DiffsampError(f"temperature={temperature} must be a finite number of at least 0 (0 is greedy)")
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
        raise DiffsampError(f"top_k={top_k} must be an integer of at least 1 (None keeps all classes)")
    if top_p is not None and not 0 < top_p <= 1:
        raise DiffsampError(f"top_p={top_p} must be above 0 and at most 1 (None keeps all classes)")


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Logits / temperature, then top-k, then top-p (nucleus), in at least float32; shape (..., V), unchanged.

    A class that ties with the k-th largest stays. Top-p keeps the fewest most probable classes whose total reaches
    top_p, never fewer than one. Temperature 0 is the caller's business (argmax).
    """
    if temperature == 1.0 and top_k is None and top_p is None:
        return logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1, dtype=torch.float64)
        drop = p.cumsum(-1) - p >= top_p  # what came before already reaches top_p
        drop[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), -math.inf)
    return logits
