"""The categorical draw on a CPU: softmax in float32 while a few rows are in cache, tile sums, two uniforms per row.

``two_level(weights, uniforms)`` is the algorithm and ``draw_rows(logits, uniforms) -> (tokens, logprob, lse)`` its use
on logits (R, V), uniforms (R, 2) being float64 of 53 bits. Sums over tiles and inside the chosen tile are float64; a
class of probability p is drawn with p(1 + O(1e-6)).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .naive import TILE, cut, pick, scaled_logits
from .naive import sample_categorical as dense
from .philox import row_uniforms

_CHUNK = 1 << 18  # classes handled at a time
_HEAD = 256  # largest classes that top-p looks at first
_FEW = 8  # rows up to which NumPy, with less to do before each operation, ends the draw sooner


def two_level(weights: torch.Tensor, uniforms: torch.Tensor, tile: int = TILE) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse CDF of unnormalised weights in two stages; the second uniform alone where one tile holds all classes.

    Args:
        weights: (R, V) of float32 or float64, on any device. uniforms: (R, 2) float64 in [0, 1], same device.
        tile: classes in a tile; the law does not depend on it, the class that a uniform names does.

    Returns:
        Classes, int64 (R,), never one of weight zero if the row has another; float64 totals (R, 1).
    """
    count, width = weights.shape
    few = weights.is_cpu and count <= _FEW and not weights.requires_grad
    if width <= tile:
        if few:
            return _few_rows(weights.numpy(), None, uniforms.numpy(), tile)
        running = weights.cumsum(1, dtype=torch.float64)
        return pick(running, uniforms[:, 1:]).squeeze(1), running[:, -1:]
    tiles, rest = width // tile, width % tile
    sums = weights[:, : tiles * tile].unflatten(1, (tiles, tile)).sum(-1)
    if rest:
        sums = torch.cat([sums, weights[:, tiles * tile :].sum(1, keepdim=True)], 1)
    if few:
        return _few_rows(weights.numpy(), sums.numpy(), uniforms.numpy(), tile)
    running = sums.cumsum(1, dtype=torch.float64)
    chosen = pick(running, uniforms[:, :1]).clamp_max_(running.shape[1] - 1)  # a row with NaN stays inside
    start = chosen * tile
    if rest:
        index = start + torch.arange(tile, device=weights.device)
        inside = weights.gather(1, index.clamp_max(width - 1)).double()
        inside.masked_fill_(index >= width, 0.0)
    else:
        line = torch.arange(count, device=weights.device) * tiles + chosen.squeeze(1)
        inside = weights.reshape(-1, tile).index_select(0, line).double()
    return (start + pick(inside.cumsum_(1), uniforms[:, 1:])).squeeze(1), running[:, -1:]


def _few_rows(
    weights: np.ndarray, sums: np.ndarray | None, uniforms: np.ndarray, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The end of :func:`two_level` row by row: the same additions in the same order, so the same classes."""
    count = len(weights)
    tokens, totals = np.empty(count, np.int64), np.empty((count, 1))
    for i in range(count):
        row, start = weights[i], 0
        if sums is not None:
            chosen, totals[i] = _pick_one(sums[i], uniforms[i, 0])
            start = min(chosen, sums.shape[1] - 1) * tile  # a row with NaN stays inside
            row = row[start : start + tile]
        chosen, total = _pick_one(row, uniforms[i, 1])
        tokens[i] = start + chosen
        if sums is None:
            totals[i] = total
    return torch.from_numpy(tokens), torch.from_numpy(totals)


def _pick_one(weights: np.ndarray, u: float) -> tuple[int, float]:
    """:func:`pick` by the running total of one row, and the row's total."""
    running = weights.cumsum(dtype=np.float64)
    total = running[-1]
    return min(int(running.searchsorted(u * total, "right")), int(running.searchsorted(total))), float(total)


def draw_rows(logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token per row; logits are scaled already and nothing is checked."""
    count, width = logits.shape
    tokens = torch.empty(count, dtype=torch.int64)
    logprob, lse = torch.empty(count), torch.empty(count)
    rows = max(1, _CHUNK // width)
    for first in range(0, count, rows):
        part = slice(first, min(count, first + rows))
        p = logits[part].softmax(1, dtype=torch.float32)
        token, total = two_level(p, uniforms[part])
        tokens[part] = token
        chosen = p.gather(1, token.clamp_max(width - 1)[:, None]).double() / total
        logprob[part] = chosen.log_().squeeze(1).float()
    token = tokens.clamp(0, width - 1)[:, None]
    lse = logits.gather(1, token).squeeze(1).float() - logprob
    dead = ~torch.isfinite(logprob)
    if bool(dead.any()):
        bad = dead.nonzero().squeeze(1)
        gone = logits[bad].isneginf().all(1)
        tokens[bad[gone]] = -1
        logprob[bad[gone]], lse[bad[gone]] = -math.inf, -math.inf
    return tokens, logprob, lse


def draw_cut(
    y: torch.Tensor, uniforms: torch.Tensor, top_k: int | None, top_p: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`draw_rows` of what top-k and top-p leave of float32 rows, from the largest values alone.

    No row is sorted whole: as many of the largest values are taken as top-k allows, or as hold the mass. Where more
    classes are equal to the last that is kept than there are places, the definition decides, since the choice of
    ``torch.topk`` among equals is not fixed.
    """
    count, width = y.shape
    most = min(top_k or width, width)
    size = most if top_p is None or top_k is not None else min(most, _HEAD)
    whole = None if top_p is None or top_k is not None else y.logsumexp(1, keepdim=True).double()
    while True:
        values, index = y.topk(min(size + 1, width), 1)  # one more than needed, to see equals of the last
        if top_p is None:
            kept = torch.full((count, 1), most)
            break
        mass = values[:, :most].logsumexp(1, keepdim=True).double() if whole is None else whole
        p = (values[:, :size].double() - mass).exp_()
        kept = (p.cumsum(1) - p < top_p).sum(1, keepdim=True).clamp_min_(1)
        if size == most or bool((kept < size).all()):
            break
        size = min(most, 8 * size)
    following = values.gather(1, kept.clamp_max(values.shape[1] - 1))
    if bool(((following == values.gather(1, kept - 1)) & (kept < width) & ~following.isneginf()).any()):
        return draw_rows(cut(y.double(), top_k, top_p).float(), uniforms)
    top = values[:, :1]
    weights = (values - torch.where(top.isneginf(), 0.0, top)).double().exp_()
    weights.masked_fill_(torch.arange(values.shape[1]) >= kept, 0.0)
    index, order = index.sort(1)
    weights = weights.gather(1, order)
    tile_of = index // TILE
    sums = weights.new_zeros((count, (width - 1) // TILE + 1)).scatter_add_(1, tile_of, weights)
    running = sums.cumsum_(1)
    inside = weights.masked_fill(tile_of != pick(running, uniforms[:, :1]), 0.0)
    place = pick(inside.cumsum(1), uniforms[:, 1:]).clamp_max_(index.shape[1] - 1)
    total = running[:, -1:]
    logprob = (weights.gather(1, place) / total).log_()
    dead = top.isneginf()
    tokens = index.gather(1, place).masked_fill_(dead, -1)
    lse = (top + total.log()).masked_fill_(dead, -math.inf)
    return tokens.squeeze(1), logprob.masked_fill_(dead, -math.inf).squeeze(1).float(), lse.squeeze(1).float()


def sample_categorical(
    logits, seed, keys, step, temperature, uncond, scale, rows, mask_id, method, top_k=None, top_p=None
):
    if method == "race":
        return dense(logits, seed, keys, step, temperature, uncond, scale, rows, mask_id, method, top_k, top_p)
    uniforms = torch.from_numpy(row_uniforms(int(seed), keys.cpu().numpy(), int(step)))
    masked = mask_id is not None and 0 <= mask_id < logits.shape[1]
    if uncond is not None:
        y = scaled_logits(logits, uncond, scale, rows, temperature, mask_id).float()
    else:
        y = logits if rows is None else logits[rows]
        if temperature != 1.0:
            y = y.float() / temperature
        if masked:
            y = y.clone() if y is logits else y
            y[:, mask_id] = -math.inf
    home, y = y.device, y.cpu()
    if top_k is not None or top_p is not None:
        rows_at_once = max(1, 4 * _CHUNK // y.shape[1])
        parts = zip(y.split(rows_at_once), uniforms.split(rows_at_once), strict=True)
        made = [draw_cut(part.float(), u, top_k, top_p) for part, u in parts]
        tokens, logprob, lse = (torch.cat(column) for column in zip(*made, strict=True))
    else:
        tokens, logprob, lse = draw_rows(y, uniforms)
    return tokens.to(home), logprob.to(home), lse.to(home)
