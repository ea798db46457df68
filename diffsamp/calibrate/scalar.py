"""Minimising one bounded variable: in closed form where the loss is a polynomial, else a grid and parabolas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch


def polynomial_minimum(
    point: Callable[[float], torch.Tensor], target: torch.Tensor, degree: int, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Global minimum of mean |point(v) − target|² where ``point`` is a polynomial of ``degree`` in v.

    Its loss is a polynomial of twice the degree (a quartic for DC-Solver), found from degree + 1 evaluations.

    Returns:
        (v, loss at v), v within ``bounds``.
    """
    low, high = bounds
    nodes = np.linspace(low, high, degree + 1)
    centre, scale = 0.5 * (low + high), 0.5 * (high - low)
    differences = torch.stack([(point(float(v)) - target).double().flatten() for v in nodes])
    inverse = torch.from_numpy(np.linalg.inv(np.vander((nodes - centre) / scale, degree + 1, increasing=True)))
    coefficients = inverse.to(differences.device) @ differences
    gram = (coefficients @ coefficients.T / differences.shape[1]).cpu().numpy()
    loss = np.zeros(2 * degree + 1)
    for i in range(degree + 1):
        for j in range(degree + 1):
            loss[i + j] += gram[i, j]
    curve = np.polynomial.Polynomial(loss)
    roots = curve.deriv().roots()
    real = roots[np.abs(roots.imag) < 1e-8].real
    candidates = [-1.0, 1.0, *real[(real > -1) & (real < 1)]]
    best = min(candidates, key=lambda u: float(curve(u)))
    return centre + scale * float(best), max(float(curve(best)), 0.0)


def bounded_minimum(
    loss: Callable[[float], float], start: Sequence[float], bounds: tuple[float, float], evaluations: int
) -> tuple[float, float, dict[float, float]]:
    """Best of the points of ``start`` and of parabolas through the best and its neighbours.

    Returns:
        (v, loss at v, loss of every point tried). The best point ever seen is kept, so it is no worse than any of
        ``start``.
    """
    low, high = bounds
    seen: dict[float, float] = {}
    for v in start:
        seen[float(v)] = loss(float(v))
    while len(seen) < evaluations:
        points = sorted(seen)
        best = min(points, key=seen.__getitem__)
        i = points.index(best)
        if i == 0 or i == len(points) - 1:
            edge = low if i == 0 else high
            v = best + (edge - best) * 0.5
        else:
            a, b, c = points[i - 1 : i + 2]
            fa, fb, fc = seen[a], seen[b], seen[c]
            top = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
            under = (b - a) * (fb - fc) - (b - c) * (fb - fa)
            v = b - 0.5 * top / under if under != 0 else 0.5 * (a + c)
            if not a < v < c or abs(v - b) < 0.05 * min(b - a, c - b):
                v = 0.5 * (b + (a if b - a > c - b else c))
            if c - a < 0.01:
                break
        if v in seen or abs(v - best) < 1e-3:
            break
        seen[v] = loss(v)
    best = min(seen, key=seen.__getitem__)
    return best, seen[best], seen
