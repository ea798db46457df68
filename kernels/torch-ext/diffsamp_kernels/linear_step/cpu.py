"""Linear step on a CPU.

``combine(rows, tensors, outs=None) -> tuple of tensors``: rows are lists of Python floats, one per tensor; terms of
weight zero cost nothing (and their tensors are not read). Float32 and float64 stay as they are, half types are summed
in float32 and rounded once. ``outs`` are written in place and must not share memory with ``tensors``.

Registers that lie evenly spaced in one storage are a matrix, and a row is its product with a vector: one pass. Of
others the first two terms go in one pass by an outer product with a vector of one element, the only operation of torch
with two free coefficients; each further term is one pass with ``add_(alpha=)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def combine(
    rows: Sequence[Sequence[float]], tensors: Sequence[torch.Tensor], outs: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, ...]:
    """Σ_k rows[m][k]·tensors[k] for each row m; the tensors are contiguous and of one shape."""
    dtype = tensors[0].dtype
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    bank = [t.to(wide) for t in tensors]
    made = []
    for m, row in enumerate(rows):
        direct = outs[m] if outs is not None and outs[m].dtype == wide else None
        total = weighted(row, bank, direct)
        if direct is None:
            total = total.to(dtype) if outs is None else outs[m].copy_(total)
        made.append(total)
    return tuple(made)


def _matrix(bank: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """(elements, registers), a view, where the registers are evenly spaced rows of one storage."""
    first, second = bank[0], bank[1]
    gap = second.storage_offset() - first.storage_offset()
    if gap < first.numel():
        return None
    storage = first.untyped_storage().data_ptr()
    for k, tensor in enumerate(bank):
        if tensor.untyped_storage().data_ptr() != storage or tensor.dtype != first.dtype:
            return None
        if tensor.storage_offset() != first.storage_offset() + k * gap:
            return None
    return first.as_strided((first.numel(), len(bank)), (1, gap))


def weighted(row: Sequence[float], bank: Sequence[torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
    """Σ_k row[k]·bank[k] of contiguous tensors of one shape and floating dtype, into ``out`` if given."""
    terms = [(value, weight) for value, weight in zip(bank, row, strict=True) if weight != 0.0]
    if not terms:
        return torch.zeros_like(bank[0]) if out is None else out.zero_()
    (x, a), rest = terms[0], terms[1:]
    if not rest:
        return torch.mul(x, a) if out is None else torch.mul(x, a, out=out)
    if len(terms) > 2 and x.numel() > 0 and (matrix := _matrix([value for value, _ in terms])) is not None:
        vector = torch.tensor([weight for _, weight in terms], dtype=x.dtype, device=x.device)
        if out is None:
            return torch.mv(matrix, vector).view(x.shape)
        torch.mv(matrix, vector, out=out.view(-1))
        return out
    y, b = rest[0]
    one = torch.ones(1, dtype=x.dtype, device=x.device)
    if out is None:
        total = torch.addr(x.view(1, -1), one, y.view(-1), beta=a, alpha=b).view(x.shape)
    else:
        torch.addr(x.view(1, -1), one, y.view(-1), beta=a, alpha=b, out=out.view(1, -1))
        total = out
    for value, weight in rest[1:]:
        total.add_(value, alpha=weight)
    return total
