"""Denoising problems whose probability-flow trajectories are known in closed form, in one dimension and float64.

Each gives the exact x0 prediction at any level and the exact sample at any level of the trajectory that starts at a
given sample. They are what the order suite measures solvers against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..process import Level


class Problem(Protocol):
    """A one-dimensional denoising problem."""

    def denoise(self, x: np.ndarray, level: Level) -> np.ndarray:
        """Exact x0 prediction."""
        ...

    def trajectory(self, x: np.ndarray, start: Level, level: Level) -> np.ndarray:
        """Exact sample at ``level`` on the trajectory through ``x`` at ``start``."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, variance): x stays at the same number of standard deviations."""

    mean: float = 0.7
    variance: float = 0.3

    def denoise(self, x: np.ndarray, level: Level) -> np.ndarray:
        a, s = level.alpha, level.sigma
        return self.mean + a * self.variance / (a * a * self.variance + s * s) * (x - a * self.mean)

    def trajectory(self, x: np.ndarray, start: Level, level: Level) -> np.ndarray:
        def spread(at: Level) -> float:
            return math.sqrt(at.alpha**2 * self.variance + at.sigma**2)

        return level.alpha * self.mean + spread(level) / spread(start) * (x - start.alpha * self.mean)


@dataclass(frozen=True)
class Mixture:
    """Two Gaussians in one dimension: x stays at the same quantile of the noisy mixture."""

    means: tuple[float, ...] = (-1.0, 0.8)
    variances: tuple[float, ...] = (0.25, 0.5)
    weights: tuple[float, ...] = (0.4, 0.6)

    def _parts(self, level: Level) -> tuple[np.ndarray, np.ndarray]:
        means = level.alpha * np.array(self.means)
        return means, np.sqrt(level.alpha**2 * np.array(self.variances) + level.sigma**2)

    def denoise(self, x: np.ndarray, level: Level) -> np.ndarray:
        means, spread = self._parts(level)
        z = (x[..., None] - means) / spread
        log = np.log(self.weights) - np.log(spread) - 0.5 * z**2
        share = np.exp(log - log.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        gain = level.alpha * np.array(self.variances) / spread**2
        return (share * (np.array(self.means) + gain * (x[..., None] - means))).sum(-1)

    def _cdf(self, x: float, level: Level) -> float:
        means, spread = self._parts(level)
        return sum(
            w * 0.5 * math.erfc(-(x - m) / s / math.sqrt(2))
            for w, m, s in zip(self.weights, means, spread, strict=True)
        )

    def trajectory(self, x: np.ndarray, start: Level, level: Level) -> np.ndarray:
        from scipy.optimize import brentq

        def root(value: float) -> float:
            quantile = self._cdf(value, start)
            ends: Any = (-30.0, 30.0)
            found: Any = brentq(lambda y: self._cdf(y, level) - quantile, *ends, xtol=1e-15, rtol=np.float64(1e-15))
            return float(found)

        flat = [root(float(value)) for value in np.ravel(x)]
        return np.reshape(np.array(flat), np.shape(x))


@dataclass(frozen=True)
class Drift:
    """An x0 prediction that depends on the level alone, cos(rate·lambda): the trajectory is an integral.

    x_t/sigma_t = x_s/sigma_s + ∫ e^lambda cos(rate·lambda) dlambda
    """

    rate: float = 0.9

    def denoise(self, x: np.ndarray, level: Level) -> np.ndarray:
        return np.full_like(x, math.cos(self.rate * level.lambda_))

    def trajectory(self, x: np.ndarray, start: Level, level: Level) -> np.ndarray:
        def integral(lam: float) -> float:
            w = self.rate
            return math.exp(lam) * (math.cos(w * lam) + w * math.sin(w * lam)) / (1 + w * w)

        gained = integral(level.lambda_) - integral(start.lambda_)
        return level.sigma * (x / start.sigma + gained)


PROBLEMS: dict[str, Problem] = {"gaussian": Gaussian(), "mixture": Mixture(), "drift": Drift()}
