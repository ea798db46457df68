"""The definition of the resample gather; on a CPU it is also the fastest form."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def resample_gather(registers: Sequence[torch.Tensor], ancestors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows ``ancestors`` of every register."""
    return tuple(r.index_select(0, ancestors) for r in registers)
