"""Integrals of exponential integrators, stable for any step in log-SNR.

A step in lambda solves  x' = linear part + ∫ exp(...)·m(lambda) dlambda  exactly for polynomial m; the weights are
phi functions (Hochbruck and Ostermann 2010, Section 2.1) or exponential moments of Lagrange polynomials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..process import Level


def phi(k: int, u: float) -> float:
    """phi_k(u) = ∫_0^1 exp((1−θ)u) θ^(k−1)/(k−1)! dθ for k >= 1; phi_0 = exp(u)."""
    if abs(u) < 1.0:
        term = total = 1.0 / math.factorial(k)
        j = 0
        while abs(term) > 1e-18 * abs(total):
            j += 1
            term *= u / (j + k)
            total += term
        return total
    value = math.exp(u)
    for j in range(k):
        value = (value - 1.0 / math.factorial(j)) / u
    return value


def lagrange(nodes: Sequence[float]) -> np.ndarray:
    """Coefficients of the Lagrange polynomials of ``nodes``: row j, column k multiplies v^k."""
    rows = []
    for j, node in enumerate(nodes):
        poly = np.array([1.0])
        for i, other in enumerate(nodes):
            if i != j:
                poly = np.convolve(poly, np.array([-other, 1.0])) / (node - other)
        rows.append(poly)
    return np.array(rows)


_X, _W = np.polynomial.legendre.leggauss(24)


def moments(rate: float, h: float, count: int) -> np.ndarray:
    """∫_{−h}^0 exp(rate·v)·v^k dv for k = 0..count−1; h may be infinite where rate > 0."""
    if abs(rate) * h < 2.0:
        v = 0.5 * h * (_X - 1.0)
        return np.array([0.5 * h * float(np.sum(_W * np.exp(rate * v) * v**k)) for k in range(count)])
    values = []
    edge = 0.0 if math.isinf(h) else math.exp(-rate * h)
    for k in range(count):
        boundary = 0.0 if edge == 0.0 else edge * (-h) ** k
        values.append(((1.0 if k == 0 else 0.0) - boundary - (k * values[-1] if k else 0.0)) / rate)
    return np.array(values)


def weights(form: str, s: Level, t: Level, k: int) -> float:
    """Weight of the k-th derivative term of a step s → t: x' = carry(form)·x + Σ_k weights(k)·h^(k−1) m^(k−1).

    ``form`` x0: alpha_t·h·phi_k(−h); epsilon: −sigma_t·h·phi_k(h). k = 1 is finite also at sigma_t = 0.
    """
    h = t.lambda_ - s.lambda_
    if k == 1:
        if form == "x0":
            return -t.alpha * math.expm1(-h)
        if math.isinf(h) or h > 30:
            return t.sigma - t.alpha * s.sigma / s.alpha
        return -t.sigma * math.expm1(h)
    return t.alpha * h * phi(k, -h) if form == "x0" else -t.sigma * h * phi(k, h)


def carry(form: str, s: Level, t: Level) -> float:
    """Coefficient of the sample in a step s → t: sigma_t/sigma_s (x0 form) or alpha_t/alpha_s (epsilon form)."""
    return t.sigma / s.sigma if form == "x0" else t.alpha / s.alpha


def order_at(i: int, n: int, order: int, lower_order_final: bool | None, data_end: bool) -> int:
    """Order of step i of n: warm-up at the start, lowered at the end.

    ``lower_order_final`` None lowers the last steps of runs below 15 steps, as diffusers does; a step that ends at the
    data is of order 1 in any case, since a log-SNR of infinity has no higher differences.
    """
    low = n < 15 if lower_order_final is None else lower_order_final
    allowed = min(order, i + 1)
    if low:
        allowed = min(allowed, n - i)
    return 1 if i == n - 1 and data_end else allowed
