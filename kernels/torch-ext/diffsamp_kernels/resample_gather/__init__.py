"""Resample gather: every register of a particle batch re-ordered by the ancestors, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..dispatch import check_same, choose
from .naive import resample_gather as naive


def resample_gather(
    registers: Sequence[torch.Tensor], ancestors: torch.Tensor, backend: str | None = None
) -> tuple[torch.Tensor, ...]:
    """registers[k][ancestors] for each register.

    Args:
        registers: 1 to 6 tensors (particles, ...) of one shape, dtype and device.
        ancestors: (particles,) int64, each in [0, particles).
        backend: see :func:`diffsamp_kernels.choose`.

    Raises:
        ValueError: sizes or dtypes that do not agree.
    """
    if not 1 <= len(registers) <= 6:
        raise ValueError(f"registers: got {len(registers)}; needs 1 to 6")
    first = registers[0]
    if ancestors.dtype != torch.int64 or ancestors.ndim != 1:
        raise ValueError(f"ancestors: {ancestors.dtype} of shape {tuple(ancestors.shape)}; must be int64 of one axis")
    bank = [check_same(f"registers[{k}]", r, first) for k, r in enumerate(registers)]
    if any(r.dtype != first.dtype for r in bank):
        raise ValueError(f"registers: dtypes {[str(r.dtype) for r in bank]}; must be the same")
    if choose(backend, first, compiles=False) == "triton":
        from .triton import resample_gather as launch

        return launch(bank, ancestors)
    return naive(bank, ancestors)
