"""A class-conditional model with a closed form: one Gaussian per handwritten digit (scikit-learn's 8x8 digits)."""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits

from diffsamp.process import Level

# Noise-to-signal ratios of 20 steps, even in log-SNR.
RATIOS = torch.exp(torch.linspace(torch.tensor(80.0).log(), torch.tensor(0.02).log(), 20, dtype=torch.float64)).tolist()


class DigitMixture:
    """Exact denoiser of a mixture of ten Gaussians in 64 dimensions, data in [-1, 1]."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        data = torch.tensor(images / 8.0 - 1.0, dtype=torch.float64)
        labels = torch.tensor(labels)
        parts = [data[labels == k] for k in range(10)]
        self.mean = torch.stack([part.mean(0) for part in parts])
        values, self.vectors = torch.linalg.eigh(torch.stack([torch.cov(part.T) for part in parts]))
        self.values = values.clamp(min=1e-3)
        self.log_weight = torch.log(torch.tensor([len(part) / len(data) for part in parts], dtype=torch.float64))

    def predict(self, x: torch.Tensor, level: Level, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(conditional, unconditional) x0 of x, shape (batch, 64)."""
        a, s = level.alpha, level.sigma
        spread = a * a * self.values + s * s
        offset = torch.einsum("kde,kbd->kbe", self.vectors, x[None] - a * self.mean[:, None])
        gain = (a * self.values / spread)[:, None]
        x0 = self.mean[:, None] + torch.einsum("kde,kbe->kbd", self.vectors, gain * offset)
        log_density = -0.5 * ((offset**2 / spread[:, None]).sum(-1) + spread.log().sum(-1)[:, None])
        weight = torch.softmax(self.log_weight[:, None] + log_density, 0)
        return x0[labels, torch.arange(len(x))], torch.einsum("kb,kbd->bd", weight, x0)


@functools.cache
def mixture() -> DigitMixture:
    return DigitMixture()


def levels() -> list[Level]:
    """Variance-preserving levels, noise first; the data level last."""
    made = [Level(s, (1 + s * s) ** -0.5, s * (1 + s * s) ** -0.5, i) for i, s in enumerate(RATIOS)]
    return [*made, Level(0.0, 1.0, 0.0, len(made))]


def run(guidance, *, batch: int = 300, seed: int = 0, space: str = "x0") -> torch.Tensor:
    """DDIM samples, shape (batch, 64); ``space="epsilon"`` hands the guidance epsilons in place of x0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 64, generator=generator, dtype=torch.float64)
    labels = torch.arange(batch) % 10
    state, steps = guidance.init(batch), levels()
    for here, after in zip(steps[:-1], steps[1:], strict=True):
        cond, uncond = mixture().predict(x, here, labels)
        if space == "epsilon":
            noise = [(x - here.alpha * part) / here.sigma for part in (cond, uncond)]
            epsilon, state = guidance(state, *noise, x, here)
            x0 = (x - here.sigma * epsilon) / here.alpha
        else:
            x0, state = guidance(state, cond, uncond, x, here)
            epsilon = (x - here.alpha * x0) / here.sigma
        x = after.alpha * x0 + after.sigma * epsilon
    return x
