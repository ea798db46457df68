"""Teleportation under classifier-free guidance.

With class statistics the guided ODE is still linear,  dy/d ln s = y − [D_u + w·(D_c − D_u)],  y = x/alpha,
s = sigma/alpha, and is integrated with no network call. Without them one guided network call at the start gives the
mean that the guided model aims at:  D = (1 − A)·mu + A·y  per direction, A = lam/(lam + s²), solved for mu.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..errors import DiffsampError
from ..process import Level
from .maps import flatten, gaussian_map, spectral
from .statistics import Statistics


def guided_map(
    stats: Statistics,
    x: torch.Tensor,
    s: Level,
    t: Level,
    labels: torch.Tensor,
    guidance_scale: float,
    steps: int = 100,
) -> torch.Tensor:
    """The state at ``t`` of the guided linear ODE through ``x`` at ``s``; no network call.

    Args:
        stats: with class means.
        labels: class of each sample, (batch,).
        steps: of fourth-order Runge-Kutta in ln s.

    Raises:
        DiffsampError: no class statistics, or a start without signal (alpha = 0).
    """
    if s.alpha == 0.0 or t.sigma == 0.0:
        raise DiffsampError("s, t: the guided map needs alpha > 0 at the start and sigma > 0 at the end")
    conditional = stats.of_class(labels)
    y = flatten(stats, x) / s.alpha
    mean_u, mean_c = stats.mean.to(y), conditional.mean.to(y)

    def denoised(one: Statistics, mean: torch.Tensor, y: torch.Tensor, ratio: float) -> torch.Tensor:
        lam = one.eigenvalues.double()
        return mean + spectral(one, y - mean, lam / (lam + ratio**2), one.residual / (one.residual + ratio**2))

    def slope(log_ratio: float, y: torch.Tensor) -> torch.Tensor:
        ratio = math.exp(log_ratio)
        u = denoised(stats, mean_u, y, ratio)
        return y - (u + guidance_scale * (denoised(conditional, mean_c, y, ratio) - u))

    start, end = math.log(s.noise_to_signal), math.log(t.noise_to_signal)
    h = (end - start) / steps
    for i in range(steps):
        at = start + i * h
        k1 = slope(at, y)
        k2 = slope(at + h / 2, y + h / 2 * k1)
        k3 = slope(at + h / 2, y + h / 2 * k2)
        k4 = slope(at + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return (t.alpha * y).reshape(x.shape).to(x.dtype)


def one_call_map(stats: Statistics, x: torch.Tensor, denoised: torch.Tensor, s: Level, t: Level) -> torch.Tensor:
    """The closed form with the mean that one (guided) network call shows.

    D = [(s.sigma²)·mu + s.alpha·lam·x] / (s.alpha²·lam + s.sigma²) per direction, solved for mu; at pure noise
    (alpha = 0, a flow's start) the prediction is the mean itself.

    Args:
        denoised: x0 prediction of the network at (x, s), guided, shape of ``x``.

    Returns:
        the state at ``t``, shape and dtype of ``x``.
    """
    return gaussian_map(replace(stats, mean=implied_mean(stats, x, denoised, s)), x, s, t)


def implied_mean(stats: Statistics, x: torch.Tensor, denoised: torch.Tensor, s: Level) -> torch.Tensor:
    """(batch, d): the mean at which the denoiser of the statistics' Gaussian answers ``denoised`` at (x, s)."""
    flat, d = flatten(stats, x), flatten(stats, denoised)
    square = s.sigma**2
    lam = stats.eigenvalues.double()
    mean = spectral(stats, d, 1 + s.alpha**2 * lam / square, 1 + s.alpha**2 * stats.residual / square)
    return mean - spectral(stats, flat, s.alpha * lam / square, s.alpha * stats.residual / square)
