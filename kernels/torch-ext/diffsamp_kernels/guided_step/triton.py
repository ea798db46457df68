"""Guided step in Triton: a reduction pass to partial sums, and a write pass. Plain CFG needs the second only.

Each program of the first kernel writes five float32 partial sums of one chunk; every program of the second adds its
sample's partials up again in float64. No atomics, so the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..dispatch import interpreting
from ..rounding import store

_KINDS = {"cfg": 0, "rescale": 1, "apg": 2}


@triton.jit
def guide_reduce_kernel(
    c_ptr, u_ptr, x_ptr, m_ptr, part, coef, step, n, chunks,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, ITER: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0)
    row = coef + tl.load(step) * 18
    p = tl.load(row).to(tl.float32)
    q = tl.load(row + 1).to(tl.float32)
    beta = tl.load(row + 5).to(tl.float32)
    sc = tl.zeros([BLOCK], tl.float32)
    sd = tl.zeros([BLOCK], tl.float32)
    scc = tl.zeros([BLOCK], tl.float32)
    scd = tl.zeros([BLOCK], tl.float32)
    sdd = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(ITER):
        inner = s.to(tl.int64) * (BLOCK * ITER) + i * BLOCK + tl.arange(0, BLOCK)
        mask = inner < n
        at = b * n + inner
        raw = tl.load(c_ptr + at, mask=mask, other=0.0).to(tl.float32)
        d = q * (raw - tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32))
        c = q * raw + p * tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if MOMENTUM:
            d += beta * tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
        sc += c
        sd += d
        scc += c * c
        scd += c * d
        sdd += d * d
    out = part + (b * chunks + s) * 8
    tl.store(out, tl.sum(sc, 0))
    tl.store(out + 1, tl.sum(sd, 0))
    tl.store(out + 2, tl.sum(scc, 0))
    tl.store(out + 3, tl.sum(scd, 0))
    tl.store(out + 4, tl.sum(sdd, 0))


@triton.jit
def _total(part, chunks, b, column: tl.constexpr, CHUNKS: tl.constexpr):
    at = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(part + (b * chunks + at) * 8 + column, mask=at < chunks, other=0.0).to(tl.float64), 0)


@triton.jit
def guide_apply_kernel(
    c_ptr, u_ptr, x_ptr, m_ptr, h1_ptr, h2_ptr, h3_ptr, y_ptr, x0_ptr, buffer_ptr, second_ptr, part, coef, step, n, chunks,  # noqa: E501
    KIND: tl.constexpr, MOMENTUM: tl.constexpr, HISTORY: tl.constexpr, SECOND: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    inner = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = inner < n
    at = b * n + inner
    row = coef + tl.load(step) * 18
    p = tl.load(row).to(tl.float32)
    q = tl.load(row + 1).to(tl.float32)
    k = tl.load(row + 2) - 1.0
    alpha = k * 0.0 + 1.0
    factor = k
    if KIND == 2:
        cc = _total(part, chunks, b, 2, CHUNKS)
        cd = _total(part, chunks, b, 3, CHUNKS)
        dd = _total(part, chunks, b, 4, CHUNKS)
        radius = tl.load(row + 4)
        clamp = tl.where(radius > 0.0, tl.minimum(1.0, radius / tl.maximum(tl.sqrt(dd), 1e-30)), 1.0)
        alpha = 1.0 - k * (1.0 - tl.load(row + 3)) * clamp * cd / tl.maximum(cc, 1e-37)
        factor = k * clamp
    elif KIND == 1:
        share = tl.load(row + 6)
        sc = _total(part, chunks, b, 0, CHUNKS) / n
        sd = _total(part, chunks, b, 1, CHUNKS) / n
        cc = _total(part, chunks, b, 2, CHUNKS) / n
        cd = _total(part, chunks, b, 3, CHUNKS) / n
        dd = _total(part, chunks, b, 4, CHUNKS) / n
        var_c = tl.maximum(cc - sc * sc, 0.0)
        mean = sc + k * sd
        var_g = tl.maximum(cc + 2.0 * k * cd + k * k * dd - mean * mean, 0.0)
        alpha = share * tl.sqrt(var_c) / tl.maximum(tl.sqrt(var_g), 1e-30) + 1.0 - share
        factor = alpha * k
    alpha32 = alpha.to(tl.float32)
    factor32 = factor.to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    raw = tl.load(c_ptr + at, mask=mask, other=0.0).to(tl.float32)
    d = q * (raw - tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32))
    c = q * raw + p * x
    if MOMENTUM:
        d += tl.load(row + 5).to(tl.float32) * tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
        store(buffer_ptr + at, d, mask, INTERPRET)
    x0 = alpha32 * c + factor32 * d
    store(x0_ptr + at, x0, mask, INTERPRET)
    y = tl.load(row + 8).to(tl.float32) * x + tl.load(row + 9).to(tl.float32) * x0
    z = tl.load(row + 13).to(tl.float32) * x + tl.load(row + 14).to(tl.float32) * x0
    if HISTORY > 0:
        h = tl.load(h1_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y += tl.load(row + 10).to(tl.float32) * h
        z += tl.load(row + 15).to(tl.float32) * h
    if HISTORY > 1:
        h = tl.load(h2_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y += tl.load(row + 11).to(tl.float32) * h
        z += tl.load(row + 16).to(tl.float32) * h
    if HISTORY > 2:
        h = tl.load(h3_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y += tl.load(row + 12).to(tl.float32) * h
        z += tl.load(row + 17).to(tl.float32) * h
    store(y_ptr + at, y, mask, INTERPRET)
    if SECOND:
        store(second_ptr + at, z, mask, INTERPRET)


def guided_step(cond, uncond, x, history, coef, step, guidance, momentum, second, block=1024):
    if cond.dtype == torch.float64 or x.dtype == torch.float64:
        raise ValueError("cond: the Triton kernel takes float32, bfloat16 or float16; use backend='torch'")
    made, x0 = torch.empty_like(x), torch.empty_like(x)
    buffer = None if momentum is None else torch.empty_like(momentum)
    other = torch.empty_like(x) if second else None
    if x.numel() == 0:
        return made, x0, buffer, other
    batch, n = x.shape[0], x[0].numel()
    if not isinstance(step, torch.Tensor):
        step = torch.full((1,), step, dtype=torch.int64, device=x.device)
    has = momentum is not None
    m = x if momentum is None else momentum
    iterations = max(4, triton.next_power_of_2(triton.cdiv(n, block * 256)))
    chunks = triton.cdiv(n, block * iterations)
    part = torch.empty((batch, chunks, 8), dtype=torch.float32, device=x.device) if guidance != "cfg" else x
    if guidance != "cfg":
        guide_reduce_kernel[(chunks, batch)](
            cond, uncond, x, m, part, coef, step, n, chunks,
            MOMENTUM=has, BLOCK=block, ITER=iterations, num_warps=4,
        )  # fmt: skip
    h = [*history, *[x] * (3 - len(history))]
    guide_apply_kernel[(triton.cdiv(n, block), batch)](
        cond, uncond, x, m, *h, made, x0, made if buffer is None else buffer, made if other is None else other,
        part, coef, step, n, chunks,
        KIND=_KINDS[guidance], MOMENTUM=has, HISTORY=len(history), SECOND=second,
        CHUNKS=triton.next_power_of_2(chunks), BLOCK=block, INTERPRET=interpreting(), num_warps=4,
    )  # fmt: skip
    return made, x0, buffer, other
