"""top-k and top-p without a sort: each row's threshold by a search over the bits of a float, in Triton.

The kept classes are a prefix of the row in descending order (ties by class), so they are those above some logit t, and
of those equal to t the first few. t is the largest value at which the count of classes not below it reaches k, or their
mass reaches p of the mass after top-k. It is found two bits at a time, from the top: a pass over the row adds up the
count or the mass above three values. 16 passes for float32, 8 for bfloat16, 10 for float16; a row stays in cache. It is
a kernel before the draw because no class can be weighed before the threshold of its row is known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .row import load_raw, ordered


def dropped_bits(dtype: torch.dtype) -> int:
    """Lowest bits of a float32 that are the same in every number of ``dtype`` with the same sign."""
    return {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)


@triton.jit
def _search(
    c_ptr, u_ptr, params, offset, scale, top, target,
    MASS: tl.constexpr, V: tl.constexpr, MASK_ID: tl.constexpr, CFG: tl.constexpr, DROP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key at which the count (or mass) of classes not below it is ``target`` or more; 0 if none."""
    key = tl.full((), 0, tl.uint32)
    DIGITS: tl.constexpr = (32 - DROP + 1) // 2
    step = tl.full((), 1 << (2 * (DIGITS - 1)), tl.uint32)
    for _ in range(0, DIGITS):
        a1 = tl.zeros([BLOCK], tl.float32)
        a2 = tl.zeros([BLOCK], tl.float32)
        a3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            y = load_raw(c_ptr, u_ptr, params, offset, start + tl.arange(0, BLOCK), V, MASK_ID, CFG)
            mine = ordered(y, DROP)
            if MASS:
                weight = tl.exp2(y * scale - top)
            else:
                weight = tl.where(y == float("-inf"), 0.0, 1.0)
            a1 += tl.where(mine >= key + step, weight, 0.0)
            a2 += tl.where(mine >= key + 2 * step, weight, 0.0)
            a3 += tl.where(mine >= key + 3 * step, weight, 0.0)
        reached = (tl.sum(a1.to(tl.float64), 0) >= target).to(tl.uint32)
        reached += (tl.sum(a2.to(tl.float64), 0) >= target).to(tl.uint32)
        reached += (tl.sum(a3.to(tl.float64), 0) >= target).to(tl.uint32)
        key += reached * step
        step = step >> 2
    return key


@triton.jit
def _around(
    c_ptr, u_ptr, params, offset, scale, top, key,
    V: tl.constexpr, MASK_ID: tl.constexpr, CFG: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(classes above ``key``, their mass, classes equal to it, the mass of one of those), float64."""
    above = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    equal = tl.zeros([BLOCK], tl.float32)
    one = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        y = load_raw(c_ptr, u_ptr, params, offset, start + tl.arange(0, BLOCK), V, MASK_ID, CFG)
        mine = ordered(y, DROP)
        possible = y != float("-inf")
        weight = tl.exp2(y * scale - top)
        above += tl.where(possible & (mine > key), 1.0, 0.0)
        mass += tl.where(mine > key, weight, 0.0)
        equal += tl.where(possible & (mine == key), 1.0, 0.0)
        one = tl.maximum(one, tl.where(mine == key, weight, 0.0))
    return (
        tl.sum(above.to(tl.float64), 0),
        tl.sum(mass.to(tl.float64), 0),
        tl.sum(equal.to(tl.float64), 0),
        tl.max(one, 0).to(tl.float64),
    )


@triton.jit
def cut_kernel(
    c_ptr, u_ptr, rows_ptr, params, cut_ptr,
    V: tl.constexpr, MASK_ID: tl.constexpr, CFG: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,  # noqa: E501
    DROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store (threshold key, last class on the threshold that is kept) of a row; ``params`` ends with p and k."""
    r = tl.program_id(0).to(tl.int64)
    if ROWS:
        offset = tl.load(rows_ptr + r) * V
    else:
        offset = r * V
    scale = tl.load(params).to(tl.float32)
    k = tl.load(params + 3)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        tops = tl.maximum(tops, load_raw(c_ptr, u_ptr, params, offset, start + tl.arange(0, BLOCK), V, MASK_ID, CFG))
    top = tl.max(tops, 0) * scale
    top = tl.where(top == float("-inf"), 0.0, top)
    key = tl.full((), 0, tl.uint32)
    if TOP_K:
        key = _search(c_ptr, u_ptr, params, offset, scale, top, k, False, V, MASK_ID, CFG, DROP, BLOCK)
    above, mass, equal, one = _around(c_ptr, u_ptr, params, offset, scale, top, key, V, MASK_ID, CFG, DROP, BLOCK)
    kept = equal
    if TOP_K:
        kept = tl.minimum(equal, k - above)
    if TOP_P:
        goal = tl.load(params + 2) * (mass + kept * one)
        lower = _search(c_ptr, u_ptr, params, offset, scale, top, goal, True, V, MASK_ID, CFG, DROP, BLOCK)
        if lower > key:
            key = lower
            above, mass, equal, one = _around(
                c_ptr, u_ptr, params, offset, scale, top, key, V, MASK_ID, CFG, DROP, BLOCK
            )
            kept = equal
        wanted = tl.ceil((goal - mass) / tl.maximum(one, 1e-300))
        kept = tl.minimum(kept, tl.maximum(wanted, 1.0))
    last = tl.full((), V, tl.int64)
    if kept < equal:
        seen = tl.full((), 0, tl.int32)
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            y = load_raw(c_ptr, u_ptr, params, offset, at, V, MASK_ID, CFG)
            on = ((ordered(y, DROP) == key) & (y != float("-inf"))).to(tl.int32)
            rank = seen + tl.cumsum(on, 0)
            place = tl.max(tl.where((on == 1) & (rank == kept.to(tl.int32)), at, -1), 0)
            last = tl.where(place >= 0, place.to(tl.int64), last)
            seen += tl.sum(on, 0)
    tl.store(cut_ptr + 2 * r, key.to(tl.int64))
    tl.store(cut_ptr + 2 * r + 1, last)
