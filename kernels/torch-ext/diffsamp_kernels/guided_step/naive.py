"""The definition of the guided step, float64 inside, each guidance as its paper writes it."""

from __future__ import annotations

import torch


def guided_step(cond, uncond, x, history, coef, step, guidance, momentum, second):
    p, q, w, eta, radius, beta, share, _ = coef[int(step), :8].tolist()
    rows = coef[int(step), 8:].reshape(2, 5).tolist()
    shape = cond.shape
    if shape.numel() == 0:
        return torch.empty_like(x), torch.empty_like(x), momentum, torch.empty_like(x) if second else None
    x64 = x.double().flatten(1)
    c = p * x64 + q * cond.double().flatten(1)
    u = p * x64 + q * uncond.double().flatten(1)
    d, buffer = c - u, None
    if momentum is not None:
        d = d + beta * momentum.double().flatten(1)
        buffer = d.reshape(shape).to(momentum.dtype)
    if guidance == "cfg":
        x0 = c + (w - 1.0) * d
    elif guidance == "rescale":
        x0 = c + (w - 1.0) * d
        factor = c.std(1, keepdim=True, correction=0) / x0.std(1, keepdim=True, correction=0).clamp_min(1e-30)
        x0 = share * factor * x0 + (1.0 - share) * x0
    else:
        if radius > 0.0:
            d = d * (radius / d.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
        unit = c / c.norm(dim=1, keepdim=True).clamp_min(1e-30)
        parallel = (d * unit).sum(1, keepdim=True) * unit
        x0 = c + (w - 1.0) * (d - parallel + eta * parallel)
    bank = [x64, x0, *(h.double().flatten(1) for h in history)]
    made = []
    for row in rows[: 1 + second]:
        mixed = torch.zeros_like(x64)
        for weight, register in zip(row, bank, strict=False):
            mixed = mixed + weight * register
        made.append(mixed.reshape(shape).to(x.dtype))
    return made[0], x0.reshape(shape).to(x.dtype), buffer, made[1] if second else None
