"""One-dimensional mixtures whose annealed, product, guided and tilted densities are integrated on a grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
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
        mu, v = torch.from_numpy(self.mu), torch.from_numpy(self.v)
        total = v + s * s
        logits = -0.5 * (xt - mu) ** 2 / total - 0.5 * torch.log(total) + torch.from_numpy(np.log(self.w))
        return (torch.softmax(logits, 1) * (mu + v / total * (xt - mu))).sum(1, keepdim=True)


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


def start(plan, n, seed, dims=1):
    generator = torch.Generator().manual_seed(seed)
    return plan.first_level.sigma * torch.randn(n, dims, generator=generator, dtype=torch.float64), generator


def estimates(result, alpha, groups):
    """(groups, 3): weighted mean, variance and mass above 0 of every group's particles in the variance clock."""
    x = (result.samples[:, 0].numpy() / alpha).reshape(groups, -1)
    w = result.weights
    mean = (w * x).sum(1)
    return np.stack([mean, (w * (x - mean[:, None]) ** 2).sum(1), (w * (x > 0)).sum(1)], 1)


def run_biases(corrector, experts, powers, process, *, n=200, groups=64, bare_groups=16, z=2.0, plan=None, extra=None):
    """(bias of the corrected run, bias of the drift alone) of mean, variance and mass above 0, against quadrature."""
    plan = plan or diffsamp.correctors.euler_maruyama(process, karras(process, n), z=z)
    made = []
    bare = replace(corrector, window=(1e9, 2e9))  # no step's weight counts
    for c, count in ((corrector, groups), (bare, bare_groups)):
        x, generator = start(plan, count * corrector.particles, 0)
        result = c.run(plan, denoiser(experts), x, generator=generator)
        made.append(estimates(result, plan.last_level.alpha, count).mean(0))
    exact = np.array(moments(experts, powers, plan.last_level.noise_to_signal, extra))
    return made[0] - exact, made[1] - exact
