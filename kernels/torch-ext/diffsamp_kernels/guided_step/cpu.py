"""Guided step on a CPU: five sums (Sc, Sd, Scc, Scd, Sdd) give every guidance as alpha·c + beta·d.

The sums are dot products of rows that are in cache; the rest is one linear step. Sums of half-precision inputs are
float32
per row of at most 2^16 elements and float64 across.
"""

from __future__ import annotations

import math

import torch

from ..linear_step.cpu import combine

_PART = 1 << 16


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.fsum(float(torch.dot(s, t)) for s, t in zip(a.split(_PART), b.split(_PART), strict=True))


def _sum(a: torch.Tensor) -> float:
    return math.fsum(float(s.sum()) for s in a.split(_PART))


def _weights(c: torch.Tensor, d: torch.Tensor, options: list[float], guidance: str) -> tuple[float, float]:
    """(alpha, beta) of one sample, flat."""
    _, _, w, eta, radius, _, share, _ = options
    k = w - 1.0
    if guidance == "cfg":
        return 1.0, k
    n, cc, cd, dd = c.numel(), _dot(c, c), _dot(c, d), _dot(d, d)
    if guidance == "apg":
        clamp = min(1.0, radius / max(math.sqrt(dd), 1e-30)) if radius > 0.0 else 1.0
        return 1.0 - k * (1.0 - eta) * clamp * cd / max(cc, 1e-60), k * clamp
    sc, sd = _sum(c), _sum(d)
    variance_c = max(cc / n - (sc / n) ** 2, 0.0)
    variance_g = max((cc + 2 * k * cd + k * k * dd) / n - ((sc + k * sd) / n) ** 2, 0.0)
    factor = share * math.sqrt(variance_c) / max(math.sqrt(variance_g), 1e-30) + 1.0 - share
    return factor, factor * k


def guided_step(cond, uncond, x, history, coef, step, guidance, momentum, second):
    options = coef[int(step), :8].tolist()
    rows = coef[int(step), 8:].reshape(2, 5).tolist()[: 1 + second]
    p, q, w, _, _, beta, _, _ = options
    dtype = x.dtype
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    c, u, x = cond.to(wide), uncond.to(wide), x.to(wide)
    bank = [h.to(wide) for h in history]
    buffer = None
    if guidance == "cfg":
        terms = [q * w, q * (1.0 - w), p]
        x0 = combine([terms], [c, u, x])[0] if x.numel() else torch.empty_like(x)
    else:
        old = None if momentum is None else momentum.to(wide)
        d = torch.sub(c, u) if q == 1.0 else torch.sub(c, u).mul_(q)
        if p != 0.0 or q != 1.0:
            c = torch.mul(c, q).add_(x, alpha=p)
        if old is not None:
            buffer = d.add_(old, alpha=beta)
        x0 = torch.empty_like(c)
        for i in range(c.shape[0] if c.numel() else 0):
            alpha, factor = _weights(c[i].view(-1), d[i].view(-1), options, guidance)
            combine([[alpha, factor]], [c[i], d[i]], [x0[i]])
        if buffer is not None and momentum is not None:
            buffer = buffer.to(momentum.dtype)
    made = [m.to(dtype) for m in combine([r[: 2 + len(bank)] for r in rows], [x, x0, *bank])]
    return made[0], x0.to(dtype), buffer, made[1] if second else None
