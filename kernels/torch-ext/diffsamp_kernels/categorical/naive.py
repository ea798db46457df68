"""The definition of the categorical draw, float64 and dense: a two-stage inverse CDF, or a race of one variate
per class."""

from __future__ import annotations

import math

import numpy as np
import torch

from .philox import philox, row_uniforms

TILE = 4096  # one uniform picks a tile of this many classes, a second one the class in it


def scaled_logits(logits, uncond, scale, rows, temperature, mask_id) -> torch.Tensor:
    """(u + w(c - u)) / T in float64 for the drawn rows; impossible where c is; u of minus infinity leaves c."""
    y = (logits if rows is None else logits[rows]).double()
    if uncond is not None:
        u = (uncond if rows is None else uncond[rows]).double()
        d = torch.where(torch.isneginf(u) | torch.isneginf(y), 0.0, y - u)
        y = y + (scale - 1.0) * d
    y = y / temperature
    if mask_id is not None and 0 <= mask_id < y.shape[1]:
        y[:, mask_id] = -math.inf
    return y


def cut(y: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Scaled logits with minus infinity outside top-k, then top-p of the mass that top-k leaves; ties by class."""
    if top_k is None and top_p is None:
        return y
    values, indices = y.sort(dim=1, descending=True, stable=True)
    keep = torch.ones_like(y, dtype=torch.bool)
    if top_k is not None:
        keep[:, top_k:] = False
    if top_p is not None:
        p = values.masked_fill(~keep, -math.inf).softmax(1)
        keep &= p.cumsum(1) - p < top_p
    return y.masked_fill(~torch.zeros_like(keep).scatter_(1, indices, keep), -math.inf)


def race_variates(seed: int, keys: np.ndarray, step: int, width: int) -> np.ndarray:
    """Exponential variates of 64 bits, (rows, width) float64; class j takes half of the words of counter j // 2."""
    wide = keys.astype(np.int64).view(np.uint64)[:, None]
    pair = np.arange((width + 1) // 2, dtype=np.uint64)[None, :] + 0 * wide
    one = np.ones_like(pair)
    low = np.uint64(0xFFFFFFFF)
    tag = np.uint64(step & 0xFFFFFFFF) | np.uint64(1 << 31)
    r = philox(seed, pair, one * tag, one * (wide & low), one * (wide >> np.uint64(32)))
    hi = np.stack([r[0], r[2]], 2).reshape(len(keys), -1)[:, :width].astype(np.float64)
    lo = np.stack([r[1], r[3]], 2).reshape(len(keys), -1)[:, :width].astype(np.float64)
    v = (hi + (lo + 0.5) * 2.0**-32) * 2.0**-32
    return -np.log1p(-np.minimum(v, 1.0 - 2.0**-53))


def pick(cumulative: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """First index whose running total exceeds u·total, never one of zero weight."""
    total = cumulative[:, -1:].contiguous()
    chosen = torch.searchsorted(cumulative, u * total, right=True)
    return torch.minimum(chosen, torch.searchsorted(cumulative, total))


def sample_categorical(
    logits, seed, keys, step, temperature, uncond, scale, rows, mask_id, method, top_k=None, top_p=None
):
    y = cut(scaled_logits(logits, uncond, scale, rows, temperature, mask_id), top_k, top_p)
    step = int(step)
    lse = y.logsumexp(1)
    host = keys.cpu().numpy()
    if method == "race":
        e = torch.from_numpy(race_variates(int(seed), host, step, y.shape[1])).to(y.device)
        tokens = (e.log() - y).argmin(1)
    else:
        u = torch.from_numpy(row_uniforms(int(seed), host, step)).to(y.device)
        p = torch.nn.functional.pad((y - y.amax(1, keepdim=True)).exp(), (0, -y.shape[1] % TILE)).unflatten(
            1, (-1, TILE)
        )
        start = pick(p.sum(2).cumsum(1), u[:, :1])
        inside = p.gather(1, start[:, :, None].expand(-1, 1, TILE)).squeeze(1).cumsum(1)
        tokens = (start * TILE + pick(inside, u[:, 1:])).squeeze(1).clamp_max(y.shape[1] - 1)
    logprob = y.gather(1, tokens[:, None]).squeeze(1) - lse
    tokens = torch.where(lse == -math.inf, -1, tokens)
    logprob = torch.where(lse == -math.inf, -math.inf, logprob)
    return tokens, logprob.float(), lse.float()
