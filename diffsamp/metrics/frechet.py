"""The Fréchet distance between two Gaussians, by symmetric eigenvalues.

    FD = |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)

With A = F F^T and B = G G^T from their eigenvectors, tr (A B)^(1/2) is the sum of the singular values of F^T G. No
square root of a product is ever taken, so nothing complex arises, and a rank-deficient covariance costs no accuracy:
the eigenvalues that are zero but for rounding are dropped before their square root makes 1e-8 out of 1e-16.

Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500, equation 6. The bias in n: Chong and Forsyth 2020,
arXiv:1911.07023.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.metrics.arrays import as_features, check_same_width
from diffsamp.metrics.moments import FrechetStats


def factor(covariance: np.ndarray) -> np.ndarray:
    """F [d, r] with F F^T = covariance, r its numerical rank."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(a: FrechetStats | Any, b: FrechetStats | Any, *, factor_b: np.ndarray | None = None) -> float:
    """The Fréchet distance of two feature sets [n, d], or of their `FrechetStats`.

    Rounding can make the distance of a set to itself very slightly negative; that is reported as it is.
    `factor_b` is `factor(b.covariance)`, for callers that compare many sets with one reference.
    Raises DiffsampError for different numbers of features or fewer than two pictures.
    """
    a = a if isinstance(a, FrechetStats) else FrechetStats.of(a)
    b = b if isinstance(b, FrechetStats) else FrechetStats.of(b)
    cov_a, cov_b = a.covariance, b.covariance
    check_same_width(a.mean, b.mean)
    left = factor(cov_a)
    right = factor(cov_b) if factor_b is None else factor_b
    cross = np.linalg.svd(left.T @ right, compute_uv=False).sum() if left.size and right.size else 0.0
    step = a.mean - b.mean
    return float(step @ step + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_infinity(features: Any, reference: FrechetStats, *, points: int = 8, seed: int = 0) -> float:
    """FD extrapolated to infinitely many pictures: a line through FD(n) against 1/n, read at 0.

    `points` subset sizes from n/8 to n, each a random subset. Raises DiffsampError with fewer than 16 pictures.
    """
    found = as_features(features)
    if len(found) < 16:
        raise DiffsampError(f"features holds {len(found)} pictures; accepted: at least 16 to extrapolate")
    rng = np.random.default_rng(seed)
    sizes = np.unique(np.linspace(max(len(found) // 8, 8), len(found), points).astype(int))
    right = factor(reference.covariance)
    distances = [
        frechet_distance(found[rng.permutation(len(found))[:size]], reference, factor_b=right) for size in sizes
    ]
    return float(np.polyfit(1 / sizes, distances, 1)[1])
