"""Linear step on a CPU.

``combine(rows, tensors, outs=None) -> tuple of tensors``: rows are lists of Python floats, one per tensor; terms of
weight zero cost nothing (and their tensors are not read). Float32 and float64 stay as they are, half types are
summed in
float32 and rounded once. ``outs`` are written in place and must not share memory with ``tensors``.

The first two terms go in one pass by an outer product with a vector of one element, the only operation of torch with
two free coefficients; each further term is one pass with ``add_(alpha=)``.
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
        total = _row(row, bank, direct)
        if direct is None:
            total = total.to(dtype) if outs is None else outs[m].copy_(total)
        made.append(total)
    return tuple(made)


def _row(row: Sequence[float], bank: Sequence[torch.Tensor], out: torch.Tensor | None) -> torch.Tensor:
    terms = [(value, weight) for value, weight in zip(bank, row, strict=True) if weight != 0.0]
    if not terms:
        return torch.zeros_like(bank[0]) if out is None else out.zero_()
    (x, a), rest = terms[0], terms[1:]
    if not rest:
        return torch.mul(x, a) if out is None else torch.mul(x, a, out=out)
    y, b = rest[0]
    flat = None if out is None else out.view(1, -1)
    one = torch.ones(1, dtype=x.dtype, device=x.device)
    if flat is None:
        total = torch.addr(x.view(1, -1), one, y.view(-1), beta=a, alpha=b).view(x.shape)
    else:
        torch.addr(x.view(1, -1), one, y.view(-1), beta=a, alpha=b, out=flat)
        total = flat.view(x.shape)
    for value, weight in rest[1:]:
        total.add_(value, alpha=weight)
    return total
