"""The definition of the linear step, float64 inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def linear_step(
    registers: Sequence[torch.Tensor], table: torch.Tensor, step: int | torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """out[m] = Σ_k table[step, m, k]·registers[k], rounded once to the dtype of the first register."""
    bank = torch.stack([r.double() for r in registers])
    result = torch.tensordot(table[int(step)].double(), bank, dims=1)
    return tuple(result.to(registers[0].dtype))
