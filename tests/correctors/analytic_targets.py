"""One-dimensional mixtures whose annealed, product, guided and tilted densities are integrated on a grid."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import scipy.stats
import torch

import diffsamp

GRID = np.linspace(-25, 25, 20001)


class Mixture:
    """Σ w_j N(mu_j, v_j) with its exact denoiser in the variance clock."""

    def __init__(self, weights, means, variances):
        self.w, self.mu, self.v = (np.asarray(a, dtype=np.float64) for a in (weights, means, variances))

    def log_density(self, x, s):
        total = self.v + s * s
        parts = -0.5 * (x[..., None] - self.mu) ** 2 / total - 0.5 * np.log(2 * np.pi * total) + np.log(self.w)
        top = parts.max(-1, keepdims=True)
        return top[..., 0] + np.log(np.exp(parts - top).sum(-1))

    def x0(self, xt, s):
        """Posterior mean of x0 for tensors (n, 1)."""
        total = self.v + s * s
        means = [m + v / c * (xt - m) for m, v, c in zip(self.mu, self.v, total, strict=True)]
        if len(means) == 1:
            return means[0]
        logits = [
            math.log(w) - 0.5 * math.log(c) - 0.5 / c * (xt - m).square()
            for w, m, c in zip(self.w, self.mu, total, strict=True)
        ]
        top = logits[0]
        for other in logits[1:]:
            top = torch.maximum(top, other)
        shares = [(one - top).exp_() for one in logits]
        return sum(p * m for p, m in zip(shares, means, strict=True)) / sum(shares)


def moments(experts, powers, s, extra=None):
    """(mean, variance, mass above 0) of Π q_i^b_i·exp(extra) at noise s by quadrature."""
    log_p = sum(b * q.log_density(GRID, s) for b, q in zip(powers, experts, strict=True))
    if extra is not None:
        log_p = log_p + extra(GRID)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * GRID).sum()
    return mean, (p * (GRID - mean) ** 2).sum(), p[GRID > 0].sum()


def process_of(kind):
    return {
        "ve": diffsamp.Process.ve(0.002, 80.0),
        "vp": diffsamp.Process.vp_continuous(0.002, 80.0),
        "flow": diffsamp.Process.flow(),
    }[kind]


def karras(process, n, high=20.0, low=0.02):
    """Karras grid in the noise-to-signal ratio from ``high`` to ``low``, without a step to the data."""
    ramp = np.linspace(0, 1, n + 1)
    s = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return diffsamp.Grid(process, tuple(process.level(float(v), i) for i, v in enumerate(s)))


def denoiser(experts):
    def evaluate(x, level):
        xt, s = x / level.alpha, level.noise_to_signal
        return tuple(q.x0(xt, s) for q in experts)

    return evaluate


def start(plan, n, seed, dims=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return plan.first_level.sigma * torch.randn(n, dims, generator=generator, dtype=dtype), generator


def estimates(result, alpha, groups):
    """(groups, 3): weighted mean, variance and mass above 0 of every group's particles in the variance clock."""
    x = (result.samples[:, 0].double().numpy() / alpha).reshape(groups, -1)
    w = result.weights
    mean = (w * x).sum(1)
    return np.stack([mean, (w * (x - mean[:, None]) ** 2).sum(1), (w * (x > 0)).sum(1)], 1)


def estimated(corrector, experts, powers, process, *, n=200, groups=64, bare=64, seed=0, z=2.0, extra=None):
    """(estimates of the corrected run, of the drift alone, exact moments by quadrature); samples in float32."""
    plan = diffsamp.correctors.adams_maruyama(process, karras(process, n), z=z)
    made = []
    for c, count in ((corrector, groups), (without_weights(corrector), bare)):
        x, generator = start(plan, count * corrector.particles, seed, dtype=torch.float32)
        result = c.run(plan, denoiser(experts), x, generator=generator)
        made.append(estimates(result, plan.last_level.alpha, count))
    return made[0], made[1], np.array(moments(experts, powers, plan.last_level.noise_to_signal, extra))


def without_weights(corrector):
    """The drift alone: no step's weight counts."""
    return replace(corrector, window=(1e9, 2e9))


# A test of a mean that is right fails by chance at most this often when its seed is changed.
FALSE_ALARM = 1e-5
ERRORS = float(scipy.stats.norm.isf(FALSE_ALARM / 2))  # 4.42 standard errors


def bias_and_error(found, exact):
    """(bias of the mean over independent groups, its standard error), for (groups, k) and (k,)."""
    return found.mean(0) - exact, found.std(0, ddof=1) / math.sqrt(len(found))


def assert_right(found, exact, bars):
    """|bias| below its bar, and the bar at least ``ERRORS`` standard errors wide: false alarms are below 1e-5."""
    bias, error = bias_and_error(found, exact)
    alarm = 2 * scipy.stats.norm.sf(np.asarray(bars) / error)
    assert (alarm <= FALSE_ALARM).all(), f"too few groups: false alarms {alarm}"
    assert (np.abs(bias) < bars).all(), (bias, error)


def assert_wrong(found, exact, floors):
    """|bias| above its floor by ``ERRORS`` standard errors; a floor of 0 asks nothing."""
    bias, error = bias_and_error(found, exact)
    floors = np.asarray(floors)
    assert ((np.abs(bias) - ERRORS * error > floors) | (floors == 0)).all(), (bias, error)
