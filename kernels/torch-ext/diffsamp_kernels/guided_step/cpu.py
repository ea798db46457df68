"""Guided step on a CPU: five sums (Sc, Sd, Scc, Scd, Sdd) give every guidance as alpha·c + beta·d.

Samples are handled in groups that stay in the last-level cache: the difference, the sums and, once a sample's sums are
known, the results. A sample that is larger than a group is read twice, as on a GPU. Sums are float32 in dot products
of at most 2^16 elements and float64 across.

Batches of many small samples, where the calls would cost more than the arithmetic, go through :mod:`.sums`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .sums import guided_step as whole_batch

UNIT = 1 << 18  # elements handled together
PIECE = 1 << 16  # elements of a dot product
SMALL = 1 << 12  # elements of a sample below which a batch of 4 or more is handled as a whole


def _accumulate(sums: list[float], c: torch.Tensor, d: torch.Tensor, means: bool) -> None:
    """Add a piece's (Sc, Sd, Scc, Scd, Sdd)."""
    if means:
        sums[0] += float(c.sum())
        sums[1] += float(d.sum())
    sums[2] += float(torch.dot(c, c))
    sums[3] += float(torch.dot(c, d))
    sums[4] += float(torch.dot(d, d))


def _weights(sums: Sequence[float], n: int, options: Sequence[float], guidance: str) -> tuple[float, float]:
    """(alpha, beta) of one sample of ``n`` elements."""
    _, _, w, eta, radius, _, share = options[:7]
    k = w - 1.0
    sc, sd, cc, cd, dd = sums
    if guidance == "apg":
        clamp = min(1.0, radius / max(math.sqrt(dd), 1e-30)) if radius > 0.0 else 1.0
        return 1.0 - k * (1.0 - eta) * clamp * cd / max(cc, 1e-60), k * clamp
    variance_c = max(cc / n - (sc / n) ** 2, 0.0)
    variance_g = max((cc + 2 * k * cd + k * k * dd) / n - ((sc + k * sd) / n) ** 2, 0.0)
    factor = share * math.sqrt(variance_c) / max(math.sqrt(variance_g), 1e-30) + 1.0 - share
    return factor, factor * k


def _add_up(out: torch.Tensor, one: torch.Tensor, weights: Sequence[float], blocks: Sequence[torch.Tensor]) -> None:
    """Write Σ weights·blocks into ``out`` of shape (1, n); blocks are (n,), the first may be (1, n) or ``out`` itself.

    Two terms go in one pass by an outer product with ``one``, the only operation of torch with two free coefficients;
    each further term is a pass in cache. Terms of weight zero are left out, but for the first two.
    """
    if len(blocks) == 1:
        torch.mul(blocks[0].view(1, -1), weights[0], out=out)
        return
    torch.addr(blocks[0], one, blocks[1], beta=weights[0], alpha=weights[1], out=out)
    for weight, block in zip(weights[2:], blocks[2:], strict=True):
        if weight != 0.0:
            out.add_(block, alpha=weight)


def guided_step(cond, uncond, x, history, coef, step, guidance, momentum, second):
    batch, sample = cond.shape[0], cond[0].numel() if cond.shape[0] else 0
    if cond.device.type != "cpu" or cond.numel() == 0 or (guidance != "cfg" and batch >= 4 and sample < SMALL):
        return whole_batch(cond, uncond, x, history, coef, step, guidance, momentum, second)
    numbers = coef[int(step)].tolist()
    p, q, w, beta = *numbers[:3], numbers[5]
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    made = [torch.empty_like(x) for _ in range(1 + second)]
    x0 = torch.empty_like(x)
    buffer = None if momentum is None else torch.empty_like(momentum)
    if guidance == "cfg":  # knows nothing of samples: the whole batch is one
        batch, sample = 1, cond.numel()
    group = max(1, UNIT // sample)  # samples handled together
    one = torch.ones(1, dtype=wide)
    # Work is done in the outputs themselves, or, for half types, in tensors of one group that are rounded at the end.
    old = () if momentum is None else (momentum,)
    direct = all(t.dtype == wide for t in (cond, uncond, x, *history, *old))
    spaces = [t.view(-1) for t in (x0, *made, *(() if buffer is None else (buffer,)))]
    work = spaces if direct else [torch.empty(group * sample, dtype=wide) for _ in spaces]
    d_work = work[-1] if buffer is not None else work[1]  # the new momentum, or where the next input will be
    c_in, u_in, *inputs = (t.view(-1) for t in (cond, uncond, x, *history))
    m_in = None if momentum is None else momentum.view(-1)
    # x0 comes first among the terms of a row, as the block that may have two axes.
    rows = [[numbers[b + 1], numbers[b], *numbers[b + 2 : b + 1 + len(inputs)]] for b in (8, 13)[: 1 + second]]

    for first in range(0, batch, group):
        low, high = first * sample, min(batch, first + group) * sample
        units = [slice(a, min(a + UNIT, high)) for a in range(low, high, UNIT)]
        shift = 0 if direct else low
        totals = [[0.0] * 5 for _ in range(low, high, sample)]
        for part in units if guidance != "cfg" else ():
            own = slice(part.start - shift, part.stop - shift)
            c, u, d = c_in[part], u_in[part], d_work[own]
            if not direct:
                c, u = work[0][own].copy_(c), u.to(wide)
            torch.sub(c, u, out=d)
            if m_in is not None:
                row = d.view(1, -1)
                torch.addr(row, one, m_in[part].to(wide), beta=q, alpha=beta, out=row)
            elif q != 1.0:
                d.mul_(q)
            if p != 0.0 or q != 1.0:
                row = work[0][own].view(1, -1)
                torch.addr(c if direct else row, one, inputs[0][part].to(wide), beta=q, alpha=p, out=row)
                c = work[0][own]
            for sums, at in zip(totals, range(0, high - low, sample), strict=True):
                for a in range(at, min(at + sample, c.shape[0]), PIECE):
                    piece = slice(a, min(a + PIECE, at + sample))
                    _accumulate(sums, c[piece], d[piece], guidance == "rescale")
        for part in units:
            own = slice(part.start - shift, part.stop - shift)
            terms = [work[0][own].view(1, -1), *(t[part].to(wide) for t in inputs)]
            if guidance == "cfg":
                sources = c_in[part].to(wide), u_in[part].to(wide), terms[1]
                _add_up(terms[0], one, (q * w, q * (1.0 - w), p), sources)
            else:
                out, d = terms[0], d_work[own]
                c = c_in[part] if direct and p == 0.0 and q == 1.0 else out
                for sums, at in zip(totals, range(0, high - low, sample), strict=True):
                    alpha, factor = _weights(sums, sample, numbers, guidance)
                    piece = slice(at, at + sample) if len(totals) > 1 else slice(None)
                    target = out[:, piece]
                    torch.addr(target if c is out else c[piece], one, d[piece], beta=alpha, alpha=factor, out=target)
            for weights, space in zip(rows, work[1 : 2 + second], strict=True):
                _add_up(space[own].view(1, -1), one, weights, terms)
        if not direct:
            for space, values in zip(spaces, work, strict=True):
                space[low:high].copy_(values[: high - low])
    return made[0], x0, buffer, made[1] if second else None
