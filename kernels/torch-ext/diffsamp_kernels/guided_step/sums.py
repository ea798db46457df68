"""Guided step in whole tensors, by five sums: for many small samples, for other devices, and as what is compiled.

``totals`` is the reduction pass, ``weights`` turns its sums into two numbers per sample, ``results`` is the write pass.
Nothing is read on the host, so that a compiler sees one graph of each; numbers come from a row of the table.
"""

from __future__ import annotations

import torch

Optional = torch.Tensor | None


def _pair(cond: torch.Tensor, uncond: torch.Tensor, x: torch.Tensor, row: torch.Tensor, momentum: Optional):
    """(c, d) in the wide type, which is that of ``row``."""
    wide = row.dtype
    raw = cond.to(wide)
    c, d = row[1] * raw + row[0] * x.to(wide), row[1] * (raw - uncond.to(wide))
    return c, d if momentum is None else d + row[5] * momentum.to(wide)


def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _sum(a: torch.Tensor) -> torch.Tensor:
    """Per sample: over the last axis in the type of ``a``, over the others in float64."""
    inner = a.sum(-1) if a.ndim > 1 else a
    return inner.reshape(a.shape[0], -1).sum(1, dtype=torch.float64)


def totals(
    cond: torch.Tensor, uncond: torch.Tensor, x: torch.Tensor, row: torch.Tensor, momentum: Optional, means: bool
) -> torch.Tensor:
    """(batch, 5) float64: Sc, Sd (zero unless ``means``), Scc, Scd, Sdd.

    Sums run over the last axis in the wide type and over the others in float64.
    """
    c, d = _pair(cond, uncond, x, row, momentum)
    found = [_sum(a) for a in ((c, d) if means else ()) + (c * c, c * d, d * d)]
    return torch.stack(found if means else [torch.zeros_like(found[0])] * 2 + found, 1)


def weights(sums: torch.Tensor, row: torch.Tensor, n: int, guidance: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, beta) of each sample of ``n`` elements; ``row`` is float64."""
    sc, sd, cc, cd, dd = sums.unbind(1)
    k = row[2] - 1.0
    if guidance == "apg":
        clamp = torch.where(row[4] > 0.0, (row[4] / dd.sqrt().clamp_min(1e-30)).clamp_max(1.0), 1.0)
        return 1.0 - k * (1.0 - row[3]) * clamp * cd / cc.clamp_min(1e-60), k * clamp
    variance_c = (cc / n - (sc / n) ** 2).clamp_min(0.0)
    variance_g = ((cc + 2.0 * k * cd + k * k * dd) / n - ((sc + k * sd) / n) ** 2).clamp_min(0.0)
    factor = row[6] * variance_c.sqrt() / variance_g.sqrt().clamp_min(1e-30) + 1.0 - row[6]
    return factor, factor * k


def results(
    cond: torch.Tensor,
    uncond: torch.Tensor,
    x: torch.Tensor,
    history: tuple[torch.Tensor, ...],
    row: torch.Tensor,
    alpha: torch.Tensor,
    factor: torch.Tensor,
    momentum: Optional,
    second: bool,
) -> tuple[torch.Tensor, torch.Tensor, Optional, Optional]:
    """Next input, x0, momentum, second; ``alpha`` and ``factor`` are (batch,) or (1,)."""
    wide = row.dtype
    c, d = _pair(cond, uncond, x, row, momentum)
    x0 = _per_sample(alpha.to(wide), c) * c + _per_sample(factor.to(wide), c) * d
    made = []
    for base in (8, 13)[: 1 + second]:
        y = row[base] * x.to(wide) + row[base + 1] * x0
        for j, h in enumerate(history):
            y = y + row[base + 2 + j] * h.to(wide)
        made.append(y.to(x.dtype))
    buffer = None if momentum is None else d.to(momentum.dtype)
    return made[0], x0.to(x.dtype), buffer, made[1] if second else None


def whole(
    cond: torch.Tensor,
    uncond: torch.Tensor,
    x: torch.Tensor,
    history: tuple[torch.Tensor, ...],
    numbers: torch.Tensor,
    guidance: str,
    momentum: Optional,
    second: bool,
) -> tuple[torch.Tensor, torch.Tensor, Optional, Optional]:
    """The three passes; ``numbers`` is one row of coefficients, float64 of shape (18,)."""
    row = numbers.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if guidance == "cfg":
        return results(
            cond, uncond, x, history, row, torch.ones_like(numbers[:1]), numbers[2:3] - 1.0, momentum, second
        )
    found = totals(cond, uncond, x, row, momentum, guidance == "rescale")
    # Stacked, the weights are a tensor of their own to a compiler, which would else work them out for every element.
    pairs = torch.stack(weights(found, numbers, x.numel() // x.shape[0], guidance), 1)
    return results(cond, uncond, x, history, row, pairs[:, 0], pairs[:, 1], momentum, second)


def guided_step(cond, uncond, x, history, coef, step, guidance, momentum, second, run=whole):
    if x.numel() == 0:
        other = torch.empty_like(x) if second else None
        return torch.empty_like(x), torch.empty_like(x), None if momentum is None else momentum.clone(), other
    return run(cond, uncond, x, tuple(history), coef[step].view(-1), guidance, momentum, second)
