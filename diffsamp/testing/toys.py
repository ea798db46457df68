"""Analytic models: exact class-conditional denoisers of Gaussian mixtures, with seeds. Nothing here is learned.

A mixture whose components share one covariance, diagonal in the coordinates at hand, has the posterior mean

    E[x0 | x] = Σ_j r_j·mu_j·(1 − g) + (g/alpha)·x,   g = alpha²·w / (alpha²·w + sigma²)

with responsibilities r_j from the likelihood of x under alpha·mu_j. Guidance acts on x0: u + scale·(c − u).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import DiffsampError
from ..process import Level


@dataclass(frozen=True)
class Mixture:
    """Mixture of Gaussians with a shared diagonal covariance.

    Attributes:
        means: float64, shape (components, d).
        labels: class of each component, shape (components,).
        variance: float64, shape (d,): variance of every component along each coordinate.
        shape: shape of one sample; its product is d.
    """

    means: torch.Tensor
    labels: torch.Tensor
    variance: torch.Tensor
    shape: tuple[int, ...]

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def x0(self, x: torch.Tensor, level: Level, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Posterior mean of x0, shape of ``x`` (batch, *shape); ``labels`` (batch,) conditions on a class."""
        a, s = level.alpha, level.sigma
        flat = x.reshape(len(x), -1)
        means, variance = self.means.to(flat.dtype), self.variance.to(flat.dtype)
        total = a * a * variance + s * s
        logits = a * (flat / total) @ means.T - 0.5 * a * a * (means * means / total).sum(1)
        if labels is not None:
            logits = logits.masked_fill(labels[:, None] != self.labels[None], -torch.inf)
        gain = a * a * variance / total
        pull = (torch.softmax(logits, 1) @ means) * (1 - gain)
        return (pull + a * variance / total * flat).reshape(x.shape)

    def denoiser(
        self, labels: torch.Tensor | None = None, guidance_scale: float = 1.0
    ) -> Callable[[torch.Tensor, Level], torch.Tensor]:
        """``denoiser(x, level) -> x0`` of given classes under classifier-free guidance."""
        if guidance_scale != 1.0 and labels is None:
            raise DiffsampError("labels: guidance needs the class of each sample")

        def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
            conditional = self.x0(x, level, labels)
            if guidance_scale == 1.0:
                return conditional
            unconditional = self.x0(x, level)
            return unconditional + guidance_scale * (conditional - unconditional)

        return denoise

    def sample(self, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``n`` draws: (x0 of shape (n, *shape), class labels)."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.means), (n,), generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[chosen] + self.variance.sqrt() * noise).reshape(n, *self.shape), self.labels[chosen]

    def noise(self, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Start of a run: (unit noise of shape (n, *shape), float64; random class labels)."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(self.classes, (n,), generator=generator)
        return torch.randn(n, *self.shape, generator=generator, dtype=torch.float64), labels


def gaussian(d: int = 8, seed: int = 0) -> Mixture:
    """One Gaussian with variances falling as 1/k² and a random mean."""
    generator = np.random.default_rng(seed)
    variance = 1.0 / np.arange(1, d + 1) ** 2
    mean = generator.normal(size=(1, d))
    return Mixture(torch.tensor(mean), torch.zeros(1, dtype=torch.long), torch.tensor(variance), (d,))


def point(d: int = 4, seed: int = 0) -> Mixture:
    """All data at one point."""
    mean = np.random.default_rng(seed).normal(size=(1, d))
    return Mixture(torch.tensor(mean), torch.zeros(1, dtype=torch.long), torch.zeros(d, dtype=torch.float64), (d,))


def img(seed: int = 0, within: float = 0.6, classes: int = 10, components: int = 4) -> Mixture:
    """8×8 "pictures": classes of a few Gaussians each, spectrum 1/f², unit variance per pixel in all.

    The coordinates are those of the orthonormal cosine transform, where the covariance is diagonal; distances are the
    same as between pixels. ``within`` is the share of the variance inside a component.
    """
    generator = np.random.default_rng(seed)
    f = np.hypot(*np.meshgrid(np.arange(8), np.arange(8)))
    spectrum = 1.0 / np.maximum(f, 1.0).reshape(-1) ** 2
    spectrum *= 64 / spectrum.sum()
    means = generator.normal(size=(classes * components, 64)) * np.sqrt((1 - within) * spectrum)
    labels = torch.arange(classes).repeat_interleave(components)
    return Mixture(torch.tensor(means), labels, torch.tensor(within * spectrum), (1, 8, 8))


def rings(modes: int = 8, spread: float = 0.1) -> Mixture:
    """``modes`` small 2-D Gaussians on the unit circle; class = which half."""
    angle = np.arange(modes) * 2 * np.pi / modes
    means = np.stack([np.cos(angle), np.sin(angle)], 1)
    labels = torch.arange(modes) * 2 // modes
    return Mixture(torch.tensor(means), labels, torch.full((2,), spread**2, dtype=torch.float64), (2,))
