"""Precision and recall by nearest-neighbour balls.

Precision: the share of generated pictures that lie inside the ball of some real one; recall the other way round. A ball
reaches to the k-th nearest neighbour in the same set. Source: Kynkäänniemi et al. 2019, arXiv:1904.06991.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.metrics.arrays import as_features, check_same_width

BLOCK = 1024


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squared = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * (x @ y.T)
    return np.sqrt(np.maximum(squared, 0.0, out=squared), out=squared)


def radii(features: np.ndarray, k: int) -> np.ndarray:
    """The distance [n] of each picture to its k-th nearest neighbour in the set, itself not counted."""
    found = np.empty(len(features))
    for start in range(0, len(features), BLOCK):
        rows = slice(start, start + BLOCK)
        distances = _distances(features[rows], features)
        # A picture's distance to itself is zero, whatever rounding makes of it.
        distances[np.arange(len(distances)), np.arange(start, start + len(distances))] = 0.0
        found[rows] = np.partition(distances, k, axis=1)[:, k]
    return found


def _inside(points: np.ndarray, centres: np.ndarray, reach: np.ndarray) -> float:
    hits = 0
    for start in range(0, len(points), BLOCK):
        hits += int((_distances(points[start : start + BLOCK], centres) <= reach).any(1).sum())
    return hits / len(points)


def precision_recall(generated: Any, real: Any, *, k: int = 3) -> tuple[float, float]:
    """Precision and recall in 0..1 of generated features against real ones.

    Raises DiffsampError for different numbers of features, or sets with no more than `k` pictures.
    """
    generated, real = as_features(generated), as_features(real, "reference")
    check_same_width(generated, real)
    if not 1 <= k < min(len(generated), len(real)):
        raise DiffsampError(f"k={k}; accepted: 1 to {min(len(generated), len(real)) - 1}, less than the smaller set")
    centre = real.mean(0)  # distances are differences: centring first keeps the digits that |x|^2 would eat
    generated, real = generated - centre, real - centre
    return _inside(generated, real, radii(real, k)), _inside(real, generated, radii(generated, k))
