"""The categorical draw in Triton.

"tile": a streaming kernel stores (max, sum of 2^(y - max)) of each tile; a second one, one program per row, takes a
float64 running total over the tiles, picks one with 53 bits, reads it again and picks the class. One Philox call a row.
"race": a key log2(E) - y for each class, from 64 Philox bits; the smallest key wins, ties go to the lower class, so the
winner does not depend on the tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _load(c_ptr, u_ptr, params, offset, at, V: tl.constexpr, MASK_ID: tl.constexpr, CFG: tl.constexpr):
    """Logits of one tile times log2(e)/temperature; minus infinity outside the row and at the mask class."""
    ok = at < V
    y = tl.load(c_ptr + offset + at, mask=ok, other=float("-inf")).to(tl.float32)
    if CFG:
        u = tl.load(u_ptr + offset + at, mask=ok, other=float("-inf")).to(tl.float32)
        zero = (u == float("-inf")) | (y == float("-inf"))
        y = tl.where(zero, y, y + tl.load(params + 1) * (y - tl.where(zero, 0.0, u)))
    y = y * tl.load(params)
    if MASK_ID >= 0:
        y = tl.where(at == MASK_ID, float("-inf"), y)
    return y


@triton.jit
def cat_tile_kernel(
    c_ptr, u_ptr, rows_ptr, params, max_ptr, sum_ptr, tiles,
    V: tl.constexpr, MASK_ID: tl.constexpr, CFG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1)
    if ROWS:
        offset = tl.load(rows_ptr + r) * V
    else:
        offset = r * V
    y = _load(c_ptr, u_ptr, params, offset, t * BLOCK + tl.arange(0, BLOCK), V, MASK_ID, CFG)
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
    c_ptr, u_ptr, rows_ptr, params, max_ptr, sum_ptr, seed_ptr, keys_ptr, step_ptr, token_ptr, logprob_ptr, lse_ptr, tiles,  # noqa: E501
    V: tl.constexpr, MASK_ID: tl.constexpr, CFG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,  # noqa: E501
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    if ROWS:
        offset = tl.load(rows_ptr + r) * V
    else:
        offset = r * V
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
    y = _load(c_ptr, u_ptr, params, offset, at, V, MASK_ID, CFG)
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
    c_ptr, u_ptr, rows_ptr, params, max_ptr, sum_ptr, key_ptr, index_ptr, seed_ptr, keys_ptr, step_ptr, tiles,
    V: tl.constexpr, MASK_ID: tl.constexpr, CFG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1)
    if ROWS:
        offset = tl.load(rows_ptr + r) * V
    else:
        offset = r * V
    at = t * BLOCK + tl.arange(0, BLOCK)
    y = _load(c_ptr, u_ptr, params, offset, at, V, MASK_ID, CFG)
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
    top = tl.max(y, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    tl.store(key_ptr + r * tiles + t, best)
    tl.store(index_ptr + r * tiles + t, winner)
    tl.store(max_ptr + r * tiles + t, top)
    tl.store(sum_ptr + r * tiles + t, tl.sum(tl.exp2(y - safe), 0))


@triton.jit
def cat_race_final_kernel(
    c_ptr, u_ptr, rows_ptr, params, max_ptr, sum_ptr, key_ptr, index_ptr, token_ptr, logprob_ptr, lse_ptr, tiles,
    V: tl.constexpr, CFG: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    if ROWS:
        offset = tl.load(rows_ptr + r) * V
    else:
        offset = r * V
    t = tl.arange(0, TILES)
    ok = t < tiles
    keys = tl.load(key_ptr + r * tiles + t, mask=ok, other=float("inf"))
    index = tl.load(index_ptr + r * tiles + t, mask=ok, other=2147483647)
    tops = tl.load(max_ptr + r * tiles + t, mask=ok, other=float("-inf"))
    sums = tl.load(sum_ptr + r * tiles + t, mask=ok, other=0.0).to(tl.float64)
    top = tl.max(tops, 0)
    dead = top == float("-inf")
    top = tl.where(dead, 0.0, top)
    lse2 = top.to(tl.float64) + tl.log2(tl.sum(sums * tl.exp2((tops - top).to(tl.float64)), 0))
    token = tl.min(tl.where(keys == tl.min(keys, 0), index, 2147483647), 0)
    token = tl.where(dead, 0, token)
    chosen = _load(c_ptr, u_ptr, params, offset, token, V, -1, CFG)
    tl.store(token_ptr + r, tl.where(dead, -1, token).to(tl.int64))
    tl.store(logprob_ptr + r, tl.where(dead, float("-inf"), (chosen - lse2) * 0.6931471805599453).to(tl.float32))
    tl.store(lse_ptr + r, tl.where(dead, float("-inf"), lse2 * 0.6931471805599453).to(tl.float32))


def sample_categorical(logits, seed, keys, step, temperature, uncond, scale, rows, mask_id, method, block=None):
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
    stats = torch.empty((4, count, tiles), dtype=torch.float32, device=device)
    params = torch.tensor([1.4426950408889634 / temperature, (scale or 1.0) - 1.0], device=device)
    if not isinstance(seed, torch.Tensor):
        seed = torch.tensor([seed], dtype=torch.int64, device=device)
    at = torch.tensor([step], dtype=torch.int64, device=device)
    u = logits if uncond is None else uncond
    where = keys if rows is None else rows.contiguous()
    common = {"V": width, "CFG": uncond is not None, "ROWS": rows is not None, "num_warps": 4}
    mask = -1 if mask_id is None or not 0 <= mask_id < width else mask_id
    full = triton.next_power_of_2(tiles)
    head = (logits, u, where, params, stats[0], stats[1])
    keys = keys.contiguous()
    if method == "tile":
        cat_tile_kernel[(count, tiles)](*head, tiles, MASK_ID=mask, BLOCK=block, **common)
        cat_pick_kernel[(count,)](
            *head, seed, keys, at, tokens, logprob, lse, tiles, MASK_ID=mask, BLOCK=block, TILES=full,
            **(common | {"num_warps": 8}),
        )  # fmt: skip
    else:
        index = torch.empty((count, tiles), dtype=torch.int32, device=device)
        cat_race_kernel[(count, tiles)](
            *head, stats[2], index, seed, keys, at, tiles, MASK_ID=mask, BLOCK=block, **common
        )
        cat_race_final_kernel[(count,)](*head, stats[2], index, tokens, logprob, lse, tiles, TILES=full, **common)
    return tokens, logprob, lse
