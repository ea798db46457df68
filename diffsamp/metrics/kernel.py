"""Kernel distance (KID): the squared maximum mean discrepancy with the kernel (x.y / d + 1)^3.

Source: Binkowski et al. 2018, arXiv:1801.01401, equation 4. The estimator is unbiased, so a good model may score
slightly below zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.metrics.arrays import as_features, check_same_width


def _sum(x: np.ndarray, y: np.ndarray, block: int = 2048) -> float:
    total = 0.0
    for start in range(0, len(x), block):
        total += float(((x[start : start + block] @ y.T / x.shape[1] + 1.0) ** 3).sum())
    return total


def _diagonal(x: np.ndarray) -> float:
    return float((((x * x).sum(1) / x.shape[1] + 1.0) ** 3).sum())


def within(x: np.ndarray) -> float:
    """The mean kernel value of two different rows of x [n, d], float64."""
    return (_sum(x, x) - _diagonal(x)) / (len(x) * (len(x) - 1))


def kernel_distance(a: Any, b: Any, *, within_b: float | None = None) -> float:
    """The unbiased estimate from all pictures, computed in blocks: memory does not grow with n squared.

    `within_b` is `within(b)`, for callers that compare many sets with one reference.
    Raises DiffsampError for different numbers of features or fewer than two pictures.
    """
    a, b = as_features(a), as_features(b, "reference")
    check_same_width(a, b)
    if min(len(a), len(b)) < 2:
        raise DiffsampError(f"features holds {len(a)} pictures and the reference {len(b)}; accepted: at least 2 each")
    return within(a) + (within(b) if within_b is None else within_b) - 2 * _sum(a, b) / (len(a) * len(b))


def kernel_distance_subsets(
    a: Any, b: Any, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets: the figure that torch-fidelity prints for the same seed.

    Raises DiffsampError when a set is smaller than `subset_size`.
    """
    a, b = as_features(a), as_features(b, "reference")
    check_same_width(a, b)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise DiffsampError(f"subset_size={subset_size}; accepted: 2 to {min(len(a), len(b))}, the smaller set")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        rows = rng.choice(len(a), subset_size, replace=False)
        other = rng.choice(len(b), subset_size, replace=False)
        values.append(kernel_distance(a[rows], b[other]))
    return float(np.mean(values)), float(np.std(values))
