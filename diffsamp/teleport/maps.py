"""The closed-form flow of Gaussian data between two noise levels.

    x_t = a_t·mu + [g_res + U·(g − g_res)·U^T]·(x_s − a_s·mu),   g = sqrt((a_t²·lam + s_t²) / (a_s²·lam + s_s²))

exact for the probability-flow ODE, for VP, VE and flow processes alike; regular at alpha = 0.
Source: arXiv:2412.09726 (VE); the other processes follow by scaling.
"""

from __future__ import annotations

import torch

from ..errors import DiffsampError
from ..process import Level
from .statistics import Statistics


def _work(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def flatten(stats: Statistics, x: torch.Tensor) -> torch.Tensor:
    """(batch, d) in float32 or better; refuses samples of another shape."""
    if tuple(x.shape[1:]) != tuple(stats.shape):
        raise DiffsampError(f"x: has samples of shape {tuple(x.shape[1:])}, the statistics are of {tuple(stats.shape)}")
    return _work(x).reshape(len(x), -1)


def spectral(stats: Statistics, z: torch.Tensor, gains: torch.Tensor, outside: float) -> torch.Tensor:
    """[outside·(I − U U^T) + U diag(gains) U^T]·z for rows z of shape (batch, d)."""
    basis = stats.basis.to(z)
    return outside * z + ((z @ basis) * (gains.to(z) - outside)) @ basis.T


def gaussian_map(stats: Statistics, x: torch.Tensor, s: Level, t: Level) -> torch.Tensor:
    """The state at ``t`` of the ODE through ``x`` at ``s``, under the Gaussian of ``stats``; dtype of ``x``.

    ``x`` has shape (batch, *stats.shape). Computed in float32 or better whatever the dtype.
    """
    flat = flatten(stats, x)
    mean = stats.mean.to(flat)

    def gain(lam: torch.Tensor) -> torch.Tensor:
        return ((t.alpha**2 * lam + t.sigma**2) / (s.alpha**2 * lam + s.sigma**2)).sqrt()

    outside = float(gain(torch.tensor(stats.residual, dtype=torch.float64)))
    moved = spectral(stats, flat - s.alpha * mean, gain(stats.eigenvalues.double()), outside)
    return (t.alpha * mean + moved).reshape(x.shape).to(x.dtype)


def gaussian_denoiser(stats: Statistics, x: torch.Tensor, level: Level) -> torch.Tensor:
    """E[x0 | x] under the Gaussian of ``stats``, shape of ``x``."""
    flat = flatten(stats, x)
    mean, a, s = stats.mean.to(flat), level.alpha, level.sigma

    def gain(lam: torch.Tensor) -> torch.Tensor:
        return a * lam / (a * a * lam + s * s)

    outside = float(gain(torch.tensor(stats.residual, dtype=torch.float64)))
    return (mean + spectral(stats, flat - a * mean, gain(stats.eigenvalues.double()), outside)).reshape(x.shape)
