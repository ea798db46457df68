"""Linear step by torch.compile: one generated loop reads every register once and writes every output once.

The first call of each shape takes seconds, so it runs only where it is asked for (``backend="compiled"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch


def _rows(registers: tuple[torch.Tensor, ...], table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``table`` (M, K) in the wide type."""
    wide = table.dtype
    made = []
    for m in range(table.shape[0]):
        total = table[m, 0] * registers[0].to(wide)
        for k in range(1, len(registers)):
            total = total + table[m, k] * registers[k].to(wide)
        made.append(total.to(registers[0].dtype))
    return tuple(made)


@cache
def _compiled():
    return torch.compile(_rows)


def linear_step(
    registers: Sequence[torch.Tensor], table: torch.Tensor, step: int | torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """As the definition, summed in float32 (float64 for float64 registers)."""
    wide = torch.float64 if registers[0].dtype == torch.float64 else torch.float32
    row = table[step].reshape(table.shape[1:]).to(wide)
    return _compiled()(tuple(registers), row)
