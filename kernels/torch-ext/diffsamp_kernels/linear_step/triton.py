"""Linear step in Triton: every register is read once, every output written once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..dispatch import interpreting
from ..rounding import store


@triton.jit
def linear_step_kernel(
    h0, h1, h2, h3, h4, h5, y0, y1, y2, table, step, n,
    K: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    row = table + tl.load(step) * (M * K)
    a0 = tl.zeros([BLOCK], tl.float32)
    a1 = tl.zeros([BLOCK], tl.float32)
    a2 = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        if k == 0:
            v = tl.load(h0 + at, mask=mask, other=0.0).to(tl.float32)
        elif k == 1:
            v = tl.load(h1 + at, mask=mask, other=0.0).to(tl.float32)
        elif k == 2:
            v = tl.load(h2 + at, mask=mask, other=0.0).to(tl.float32)
        elif k == 3:
            v = tl.load(h3 + at, mask=mask, other=0.0).to(tl.float32)
        elif k == 4:
            v = tl.load(h4 + at, mask=mask, other=0.0).to(tl.float32)
        else:
            v = tl.load(h5 + at, mask=mask, other=0.0).to(tl.float32)
        a0 += tl.load(row + k).to(tl.float32) * v
        if M > 1:
            a1 += tl.load(row + K + k).to(tl.float32) * v
        if M > 2:
            a2 += tl.load(row + 2 * K + k).to(tl.float32) * v
    store(y0 + at, a0, mask, INTERPRET)
    if M > 1:
        store(y1 + at, a1, mask, INTERPRET)
    if M > 2:
        store(y2 + at, a2, mask, INTERPRET)


def linear_step(
    registers: Sequence[torch.Tensor],
    table: torch.Tensor,
    step: int | torch.Tensor,
    out: Sequence[torch.Tensor] | None,
    block: int = 1024,
) -> tuple[torch.Tensor, ...]:
    first = registers[0]
    if first.dtype == torch.float64:
        raise ValueError("registers: the Triton kernel takes float32, bfloat16 or float16; use backend='torch'")
    rows = table.shape[1]
    made = tuple(out) if out is not None else tuple(torch.empty_like(first) for _ in range(rows))
    n = first.numel()
    if n == 0:
        return made
    if not isinstance(step, torch.Tensor):
        step = torch.full((1,), step, dtype=torch.int64, device=first.device)
    bank = [*registers, *[first] * (6 - len(registers))]
    outs = [*made, *[made[0]] * (3 - rows)]
    linear_step_kernel[(triton.cdiv(n, block),)](
        *bank, *outs, table.contiguous(), step, n,
        K=len(registers), M=rows, BLOCK=block, INTERPRET=interpreting(), num_warps=4,
    )  # fmt: skip
    return made
