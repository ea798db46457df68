"""Resample gather in Triton: one program per (particle, block), all registers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


@triton.jit
def resample_gather_kernel(
    h0, h1, h2, h3, h4, h5, y0, y1, y2, y3, y4, y5, ancestors, n, K: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    source = tl.load(ancestors + row) * n + at
    target = row * n + at
    tl.store(y0 + target, tl.load(h0 + source, mask=mask), mask=mask)
    if K > 1:
        tl.store(y1 + target, tl.load(h1 + source, mask=mask), mask=mask)
    if K > 2:
        tl.store(y2 + target, tl.load(h2 + source, mask=mask), mask=mask)
    if K > 3:
        tl.store(y3 + target, tl.load(h3 + source, mask=mask), mask=mask)
    if K > 4:
        tl.store(y4 + target, tl.load(h4 + source, mask=mask), mask=mask)
    if K > 5:
        tl.store(y5 + target, tl.load(h5 + source, mask=mask), mask=mask)


def resample_gather(
    registers: Sequence[torch.Tensor], ancestors: torch.Tensor, block: int = 1024
) -> tuple[torch.Tensor, ...]:
    first, count, k = registers[0], ancestors.shape[0], len(registers)
    made = tuple(torch.empty((count, *r.shape[1:]), dtype=r.dtype, device=r.device) for r in registers)
    n = first[0].numel() if first.shape[0] else 0
    if n == 0 or count == 0:
        return made
    resample_gather_kernel[(triton.cdiv(n, block), count)](
        *registers, *[first] * (6 - k), *made, *[made[0]] * (6 - k), ancestors.contiguous(), n,
        K=k, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return made
