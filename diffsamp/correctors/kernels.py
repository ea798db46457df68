"""Stochastic kernels as plans: one or two steps of memory with any amount of noise, and Heun with churn.

The log-weights do not depend on how much noise is injected, so more of it is free in mathematics; it lets duplicates
part and lowers the bias at many steps (at few it is unstable). Ancestral, DDPM (fixed small variance) and first-order
SDE-DPM-Solver++ are one map in the variance clock: ``diffsamp.solver("sde-dpmpp-1")``.

With many particles what is left of the error is the step's. For the annealed unit Gaussian it can be computed for
K → ∞ (200 steps from 20 to .02, z = 2, trapezoid): its variance of 2 at beta = 1/2 is off by +.0330 with
:func:`euler_maruyama` and by −.0004 with :func:`adams_maruyama`, which costs no more calls.

Sources: Skreta et al. 2025, arXiv:2503.02819; Karras et al. 2022, arXiv:2206.00364, Algorithm 2; Buckwar and Winkler
2006, SIAM J. Numer. Anal. 44(2), 779-803 (multistep methods for stochastic differential equations).
"""

from __future__ import annotations

import math

from ..errors import DiffsampError
from ..grids import Grid
from ..plan import Mix, Plan, Row
from ..process import Level, Process


def euler_maruyama(process: Process, grid: Grid, *, z: float = 1.0) -> Plan:
    """xt += h·(1 + z)/2·score + √(z·h)·noise in the variance clock; a last step to the data goes to x0.

    ``z`` is the injected noise variance relative to the forward process. First order; at z = 0 it is Euler's method on
    h = s0² − s1². The spread is right to first order in h only, so the point-mass invariant of plans holds in the limit
    of small steps and is not checked.
    """
    _check_start(grid, z)
    rows = []
    for s, t in grid.intervals():
        s0, s1 = s.noise_to_signal, t.noise_to_signal
        h = (s0 - s1) * (s0 + s1)
        c = 1.0 if s1 == 0.0 else (1.0 + z) / 2.0 * h / s0**2
        noise = 0.0 if s1 == 0.0 else math.sqrt(z * h)
        rows.append(Row(s, t, Mix(base=t.alpha / s.alpha * (1.0 - c), m=(t.alpha * c,), noise=t.alpha * noise)))
    return Plan(tuple(rows), process, grid, solver=f"euler-maruyama:z={z:g}", order=1, check=False)


def adams_maruyama(process: Process, grid: Grid, *, z: float = 2.0) -> Plan:
    """Two-step Adams-Bashforth-Maruyama: dxt = (1 + z)·epsilon ds + √z·noise, epsilon extrapolated linearly in s.

    With steps D = s0 − s1 and D' before it,

        xt += −(1 + z)·D·[(1 + D/2D')·epsilon_0 − D/(2D')·epsilon_1] + √(z·(s0² − s1²))·noise.

    Weak order 2 in a noise that is additive, with the call per step of :func:`euler_maruyama`. Epsilon in s is the pair
    that is smooth at both ends: linear in s below the scale of the data, constant far above it. The first step holds
    the score; a step that would go more than the whole way to x0, (1 + z)·D > s0, holds x0 and decays towards it
    exactly, so that coarse grids do not overshoot. A last step to the data goes to x0. As with Euler-Maruyama, the
    point-mass invariant of plans holds in the limit of small steps and is not checked.
    """
    _check_start(grid, z)
    p, rows = 1.0 + z, []
    pairs = [(s, t, s.noise_to_signal, t.noise_to_signal) for s, t in grid.intervals()]
    for i, (s, t, s0, s1) in enumerate(pairs):
        step, h = s0 - s1, (s0 - s1) * (s0 + s1)
        weights, noise = (-p * h / (2.0 * s0),), math.sqrt(z * h)
        if p * step > s0:
            weights, noise = (-s0 * (1.0 - (s1 / s0) ** p),), s1 * math.sqrt(1.0 - (s1 / s0) ** (2.0 * z))
        elif i > 0:
            share = step / (2.0 * (pairs[i - 1][2] - s0))
            weights = (-p * step * (1.0 + share), p * step * share)
        m = tuple(t.alpha * w for w in weights)
        rows.append(Row(s, t, Mix(base=t.alpha / s.alpha, m=m, noise=t.alpha * noise)))
    name = f"adams-maruyama:z={z:g}"
    return Plan(tuple(rows), process, grid, form="epsilon", solver=name, order=2, check=False)


def _check_start(grid: Grid, z: float) -> None:
    if not (math.isfinite(z) and z > 0):
        raise DiffsampError(f"z: got {z}; must be a finite number above 0")
    if not math.isfinite(grid.levels[0].noise_to_signal):
        raise DiffsampError("grid: starts at alpha = 0, where sigma/alpha is infinite; start one level later")


def churned_heun(process: Process, grid: Grid, *, churn: float = 40.0) -> Plan:
    """Heun with churn for VE processes: up by noise, one Heun step down; two network calls per interval.

    The network sees the raised level; the net move per interval is from s to s', which is what weights must count.
    """
    if process.kind != "ve":
        raise DiffsampError(f"process: churned_heun needs a VE process, got {process.kind}")
    if not (math.isfinite(churn) and churn >= 0):
        raise DiffsampError(f"churn: got {churn}; must be a finite number of 0 or above")
    gain = 1.0 + min(churn / len(grid), math.sqrt(2.0) - 1.0)

    def raised(level: Level) -> Level:
        return process.level(level.noise_to_signal * gain, level.index)

    pairs = list(grid.intervals())
    rows = []
    for i, (s, t) in enumerate(pairs):
        up = raised(s) if i else s
        r = t.sigma / up.sigma
        if t.sigma == 0.0:
            rows.append(Row(up, t, Mix(m=(1.0,))))
            continue
        rows.append(Row(up, t, Mix(input=r, m=(1.0 - r,)), correct=Mix(input=1.0), base_level=up, committed=False))
        # Heun: x' = x + (s' − s)/2·(d + d'), d = (x − D)/s, d' = (x_euler − D')/s'
        step = (t.sigma - up.sigma) / 2
        heun = Mix(base=1.0 + step / up.sigma, input=step / t.sigma, m=(-step / t.sigma, -step / up.sigma))
        following = raised(t)
        noise = math.sqrt(max(following.sigma**2 - t.sigma**2, 0.0))
        last = i == len(pairs) - 1
        rows.append(
            Row(t, t if last else following, Mix(base=1.0, noise=0.0 if last else noise), correct=heun, base_level=t)
        )
    return Plan(tuple(rows), process, grid, solver=f"churned-heun:churn={churn:g}", order=2)
