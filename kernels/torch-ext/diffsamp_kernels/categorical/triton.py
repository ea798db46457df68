"""The categorical draw in Triton.

"tile": a streaming kernel stores (max, sum of 2^(y - max)) of each tile; a second one, one program per row, takes a
float64 running total over the tiles, picks one with 53 bits, reads it again and picks the class. One Philox call a row.
"race": a key log2(E) - y for each class, from 64 Philox bits, in float32; the two best of a tile are kept, and those
that float32 cannot tell from the best are evaluated again in float64. Ties go to the lower class, so the winner does
not depend on the tiles.
top-k and top-p: ``cut.py`` finds each row's threshold first; the other kernels apply it as they read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .cut import cut_kernel, dropped_bits
from .row import load_tile


@triton.jit
def _offset(rows_ptr, r, V: tl.constexpr, ROWS: tl.constexpr):
    if ROWS:
        offset = tl.load(rows_ptr + r) * V
    else:
        offset = r * V
    return offset


@triton.jit
def cat_tile_kernel(
    c_ptr, u_ptr, rows_ptr, params, cut_ptr, max_ptr, sum_ptr, tiles,
    V: tl.constexpr, MASK_ID: tl.constexpr, CFG: tl.constexpr, ROWS: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr,  # noqa: E501
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1)
    at = t * BLOCK + tl.arange(0, BLOCK)
    y = load_tile(c_ptr, u_ptr, params, cut_ptr, r, _offset(rows_ptr, r, V, ROWS), at, V, MASK_ID, CFG, CUT)
    top = tl.max(y, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    tl.store(max_ptr + r * tiles + t, top)
    tl.store(sum_ptr + r * tiles + t, tl.sum(tl.exp2(y - safe), 0))


@triton.jit
def _unit(hi, lo):
    bits = (hi.to(tl.uint64) << 21) | (lo.to(tl.uint64) >> 11)
    return (bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16


@triton.jit
def _key_words(key):
    wide = key.to(tl.uint64, bitcast=True)
    return (wide & 4294967295).to(tl.uint32), (wide >> 32).to(tl.uint32)


@triton.jit
def _pick(cumulative, total, target, at):
    """First index above ``target``, never one of zero weight."""
    chosen = tl.sum((cumulative <= target).to(tl.int32), 0)
    last = tl.sum((cumulative < total).to(tl.int32), 0)
    return tl.minimum(chosen, last)


@triton.jit
def cat_pick_kernel(
    c_ptr, u_ptr, rows_ptr, params, cut_ptr, max_ptr, sum_ptr, seed_ptr, keys_ptr, step_ptr, token_ptr, logprob_ptr, lse_ptr, tiles,  # noqa: E501
    V: tl.constexpr, MASK_ID: tl.constexpr, CFG: tl.constexpr, ROWS: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,  # noqa: E501
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    k_lo, k_hi = _key_words(tl.load(keys_ptr + r))
    step = tl.load(step_ptr).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), (k_lo * 0).to(tl.uint32), step, k_lo, k_hi)
    t = tl.arange(0, TILES)
    tops = tl.load(max_ptr + r * tiles + t, mask=t < tiles, other=float("-inf"))
    sums = tl.load(sum_ptr + r * tiles + t, mask=t < tiles, other=0.0).to(tl.float64)
    top = tl.max(tops, 0)
    dead = top == float("-inf")
    top = tl.where(dead, 0.0, top)
    running = tl.cumsum(sums * tl.exp2((tops - top).to(tl.float64)), 0)
    total = tl.max(running, 0)
    tile = _pick(running, total, _unit(r0, r1) * total, t)
    tile = tl.where(dead, 0, tile)
    inner = tl.arange(0, BLOCK)
    at = tile * BLOCK + inner
    y = load_tile(c_ptr, u_ptr, params, cut_ptr, r, _offset(rows_ptr, r, V, ROWS), at, V, MASK_ID, CFG, CUT)
    local = tl.max(y, 0)
    local = tl.where(local == float("-inf"), 0.0, local)
    cumulative = tl.cumsum(tl.exp2(y - local).to(tl.float64), 0)
    inside = _pick(cumulative, tl.max(cumulative, 0), _unit(r2, r3) * tl.max(cumulative, 0), inner)
    chosen = tl.sum(tl.where(inner == inside, y, 0.0), 0)
    lse2 = top.to(tl.float64) + tl.log2(total)
    tl.store(token_ptr + r, tl.where(dead, -1, tile * BLOCK + inside).to(tl.int64))
    tl.store(logprob_ptr + r, tl.where(dead, float("-inf"), (chosen - lse2) * 0.6931471805599453).to(tl.float32))
    tl.store(lse_ptr + r, tl.where(dead, float("-inf"), lse2 * 0.6931471805599453).to(tl.float32))


@triton.jit
def cat_race_kernel(
    c_ptr, u_ptr, rows_ptr, params, cut_ptr, max_ptr, sum_ptr, key_ptr, index_ptr, seed_ptr, keys_ptr, step_ptr, tiles,
    V: tl.constexpr, MASK_ID: tl.constexpr, CFG: tl.constexpr, ROWS: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr,  # noqa: E501
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1)
    at = t * BLOCK + tl.arange(0, BLOCK)
    y = load_tile(c_ptr, u_ptr, params, cut_ptr, r, _offset(rows_ptr, r, V, ROWS), at, V, MASK_ID, CFG, CUT)
    k_lo, k_hi = _key_words(tl.load(keys_ptr + r))
    pair = (t * (BLOCK // 2) + tl.arange(0, BLOCK // 2)).to(tl.uint32)
    zero = pair * 0
    step = tl.load(step_ptr).to(tl.uint32) | 2147483648
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), pair, zero + step, zero + k_lo, zero + k_hi)
    hi = tl.reshape(tl.join(r0, r2), (BLOCK,)).to(tl.uint32, bitcast=True)
    lo = tl.reshape(tl.join(r1, r3), (BLOCK,)).to(tl.uint32, bitcast=True)
    # v = bits / 2^64 is precise near 0 and w = 1 - v near 1; each half of the range uses its own.
    unit: tl.constexpr = 2.3283064365386963e-10
    v = (hi.to(tl.float32) + (lo.to(tl.float32) + 0.5) * unit) * unit
    w_far = ((4294967295 - hi).to(tl.float32) + ((4294967295 - lo).to(tl.float32) + 0.5) * unit) * unit
    w = 1.0 - v
    gap = 1.0 - w
    near = tl.where(gap == 0.0, v, -tl.log(tl.where(gap == 0.0, 0.5, w)) * (v / tl.where(gap == 0.0, 1.0, gap)))
    e = tl.where(hi < 2147483648, near, -tl.log(w_far))
    key = tl.where(y == float("-inf"), float("inf"), tl.log2(e) - y)
    best = tl.min(key, 0)
    winner = tl.min(tl.where(key == best, at, 2147483647), 0)
    rest = tl.where(at == winner, float("inf"), key)
    after = tl.min(rest, 0)
    top = tl.max(y, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    tl.store(key_ptr + 2 * (r * tiles + t), best)
    tl.store(key_ptr + 2 * (r * tiles + t) + 1, after)
    tl.store(index_ptr + 2 * (r * tiles + t), winner)
    tl.store(index_ptr + 2 * (r * tiles + t) + 1, tl.min(tl.where((rest == after) & (at != winner), at, 2147483647), 0))
    tl.store(max_ptr + r * tiles + t, top)
    tl.store(sum_ptr + r * tiles + t, tl.sum(tl.exp2(y - safe), 0))


@triton.jit
def cat_race_final_kernel(
    c_ptr, u_ptr, rows_ptr, params, cut_ptr, max_ptr, sum_ptr, key_ptr, index_ptr, seed_ptr, keys_ptr, step_ptr, token_ptr, logprob_ptr, lse_ptr, tiles,  # noqa: E501
    V: tl.constexpr, CFG: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    offset = _offset(rows_ptr, r, V, ROWS)
    t = tl.arange(0, TILES)
    tops = tl.load(max_ptr + r * tiles + t, mask=t < tiles, other=float("-inf"))
    sums = tl.load(sum_ptr + r * tiles + t, mask=t < tiles, other=0.0).to(tl.float64)
    top = tl.max(tops, 0)
    dead = top == float("-inf")
    top = tl.where(dead, 0.0, top)
    lse2 = top.to(tl.float64) + tl.log2(tl.sum(sums * tl.exp2((tops - top).to(tl.float64)), 0))
    # Two candidates of each tile: float32 key, and the bound of its error. The bound covers the rounding of the logit
    # (with guidance, of its parts), of the scale, of the variate and of two logarithms.
    two = tl.arange(0, 2 * TILES)
    keys = tl.load(key_ptr + 2 * r * tiles + two, mask=two < 2 * tiles, other=float("inf"))
    index = tl.load(index_ptr + 2 * r * tiles + two, mask=two < 2 * tiles, other=2147483647)
    live = keys < float("inf")
    c = tl.load(c_ptr + offset + index, mask=live, other=0.0).to(tl.float64)
    scale = tl.load(params)
    y = c
    size = tl.abs(c)
    if CFG:
        u = tl.load(u_ptr + offset + index, mask=live, other=0.0).to(tl.float64)
        gone = u == float("-inf")
        u = tl.where(gone, c, u)
        strength = tl.load(params + 1)
        y = c + strength * (c - u)
        size += tl.abs(strength) * (tl.abs(c) + tl.abs(u))
    y *= scale
    bound = 3e-5 + 5e-7 * size * scale
    close = live & (keys - bound <= tl.min(tl.where(live, keys + bound, float("inf")), 0))
    k_lo, k_hi = _key_words(tl.load(keys_ptr + r))
    zero = index.to(tl.uint32) * 0
    step = tl.load(step_ptr).to(tl.uint32) | 2147483648
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), (index // 2).to(tl.uint32), zero + step, zero + k_lo, zero + k_hi)
    odd = index % 2 == 1
    hi = tl.where(odd, r2, r0).to(tl.uint32, bitcast=True).to(tl.float64)
    lo = tl.where(odd, r3, r1).to(tl.uint32, bitcast=True).to(tl.float64)
    unit: tl.constexpr = 2.3283064365386963e-10
    v = tl.minimum((hi + (lo + 0.5) * unit) * unit, 0.9999999999999999)
    w = 1.0 - v
    gap = 1.0 - w
    e = tl.where(gap == 0.0, v, -tl.log(w) * (v / tl.where(gap == 0.0, 1.0, gap)))
    exact = tl.where(close, tl.log2(e) - y, float("inf"))
    token = tl.min(tl.where(close & (exact == tl.min(exact, 0)), index, 2147483647), 0)
    token = tl.where(dead, 0, token)
    chosen = tl.sum(tl.where(live & (index == token), y, 0.0), 0)
    tl.store(token_ptr + r, tl.where(dead, -1, token).to(tl.int64))
    tl.store(logprob_ptr + r, tl.where(dead, float("-inf"), (chosen - lse2) * 0.6931471805599453).to(tl.float32))
    tl.store(lse_ptr + r, tl.where(dead, float("-inf"), lse2 * 0.6931471805599453).to(tl.float32))


def _on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor made by fills, which a CUDA graph can capture, and not by a copy from the host, which it cannot."""
    made = torch.empty(len(values), dtype=dtype, device=device)
    for place, value in zip(made, values, strict=True):
        place.fill_(value)
    return made


def sample_categorical(
    logits, seed, keys, step, temperature, uncond, scale, rows, mask_id, method, top_k=None, top_p=None, block=None
):
    device, (_, width) = logits.device, logits.shape
    if logits.dtype == torch.float64:
        raise ValueError("logits: the Triton kernel takes float32, bfloat16 or float16; use backend='torch'")
    count = keys.shape[0]
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    logprob = torch.empty(count, dtype=torch.float32, device=device)
    lse = torch.empty_like(logprob)
    if count == 0:
        return tokens, logprob, lse
    block = block or (4096 if method == "tile" else 2048)
    tiles = triton.cdiv(width, block)
    stats = torch.empty((2, count, tiles), dtype=torch.float32, device=device)
    cfg, cut = uncond is not None, top_k is not None or top_p is not None
    numbers = [1.4426950408889634 / temperature, (1.0 if scale is None else scale) - 1.0, top_p or 1.0, top_k or width]
    params = _on_device(numbers, torch.float64, device)
    seed = seed if isinstance(seed, torch.Tensor) else _on_device([seed], torch.int64, device)
    at = step if isinstance(step, torch.Tensor) else _on_device([step], torch.int64, device)
    u = uncond if cfg else logits
    where = keys if rows is None else rows.contiguous()
    mask = -1 if mask_id is None or not 0 <= mask_id < width else mask_id
    full = triton.next_power_of_2(tiles)
    keys = keys.contiguous()
    common = {"V": width, "CFG": cfg, "ROWS": rows is not None, "num_warps": 4}
    limits = torch.empty((count, 2), dtype=torch.int64, device=device) if cut else keys
    head = (logits, u, where, params, limits)
    # Bits of float32 that these logits never use need not be searched; 0 where guidance makes new values.
    dropped = 0 if cfg else dropped_bits(logits.dtype)
    if cut:
        cut_kernel[(count,)](
            *head, MASK_ID=mask, TOP_K=top_k is not None and top_k < width,
            TOP_P=top_p is not None, DROP=dropped, BLOCK=min(2048, triton.next_power_of_2(width)), **common,
        )  # fmt: skip
    common["CUT"] = dropped + 1 if cut else 0
    head += (stats[0], stats[1])
    if method == "tile":
        cat_tile_kernel[(count, tiles)](*head, tiles, MASK_ID=mask, BLOCK=block, **common)
        cat_pick_kernel[(count,)](
            *head, seed, keys, at, tokens, logprob, lse, tiles, MASK_ID=mask, BLOCK=block, TILES=full,
            **(common | {"num_warps": 8}),
        )  # fmt: skip
    else:
        race_keys = torch.empty((count, tiles, 2), dtype=torch.float32, device=device)
        index = torch.empty((count, tiles, 2), dtype=torch.int32, device=device)
        cat_race_kernel[(count, tiles)](
            *head, race_keys, index, seed, keys, at, tiles, MASK_ID=mask, BLOCK=block, **common
        )
        del common["CUT"]
        cat_race_final_kernel[(count,)](
            *head, race_keys, index, seed, keys, at, tokens, logprob, lse, tiles, TILES=full, **common
        )
    return tokens, logprob, lse
