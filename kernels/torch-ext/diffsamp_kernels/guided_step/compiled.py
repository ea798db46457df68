"""Guided step by torch.compile: one generated loop for the sums and one for the results.

The first call of each shape and option takes seconds, so it runs only where it is asked for (``backend="compiled"``).
The weights of a sample are worked out between the loops: inside the second one they would be worked out per element. No
random number is drawn in a compiled region.
"""

from __future__ import annotations

from functools import cache

import torch

from . import sums
from .cpu import sample_weights


@cache
def _compiled(name: str):
    return torch.compile(getattr(sums, name), dynamic=False)


def _weights(found: torch.Tensor, row: torch.Tensor, n: int, guidance: str) -> tuple[torch.Tensor, torch.Tensor]:
    """On a CPU as Python numbers, which is faster than twenty operations on tensors of a few elements."""
    if found.device.type != "cpu":
        return sums.weights(found, row, n, guidance)
    numbers = row.tolist()
    pairs = torch.tensor([sample_weights(line, n, numbers, guidance) for line in found.tolist()], dtype=torch.float64)
    return pairs[:, 0], pairs[:, 1]


def guided_step(cond, uncond, x, history, coef, step, guidance, momentum, second):
    return sums.guided_step(
        cond, uncond, x, history, coef, step, guidance, momentum, second,
        totals=_compiled("totals"), weights=_weights, results=_compiled("results"),
    )  # fmt: skip
