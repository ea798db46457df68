"""Tensors that make a kernel's mistakes visible: holes of NaN between values, and fresh memory that is not clean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

POISON = -7777  # of integers; floating tensors have NaN
MARGIN = 64


def strided(values: torch.Tensor, layout: int) -> torch.Tensor:
    """The same values: 0 contiguous, 1 every second element, 2 rows with a gap, 3 transposed memory; holes are NaN."""
    if layout == 0 or values.ndim < 2:
        return values
    if layout == 1:
        wide = torch.full((*values.shape, 2), math.nan, dtype=values.dtype)
        wide[..., 0] = values
        return wide[..., 0]
    if layout == 2:
        wide = torch.full((*values.shape[:-1], values.shape[-1] + 3), math.nan, dtype=values.dtype)
        wide[..., 3:] = values
        return wide[..., 3:]
    return values.transpose(0, -1).contiguous().transpose(0, -1)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty and empty_like give poison with a margin behind; at the end the margins must be untouched."""
    empty, like = torch.empty, torch.empty_like
    made: list[tuple[torch.Tensor, int]] = []

    def fresh(*size: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        count = math.prod(shape)
        buffer = empty(count + MARGIN, dtype=dtype, device=device)
        buffer.fill_(math.nan if dtype.is_floating_point else POISON)
        made.append((buffer, count))
        return buffer[:count].view(shape)

    torch.empty = fresh
    torch.empty_like = lambda tensor: fresh(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, like
    assert made, "nothing was allocated: the poison was not in use"
    for buffer, count in made:
        tail = buffer[count:]
        clean = tail.isnan() if buffer.dtype.is_floating_point else tail == POISON
        assert bool(clean.all()), f"a kernel wrote behind the end of a tensor of {count} elements"


def sparse(folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in a file with holes: only the pages that are touched take memory."""
    path = folder / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(math.prod(shape) * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
