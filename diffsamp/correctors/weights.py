"""Log-weights of groups of particles: pure functions in float64, arrays of shape (groups, particles)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DiffsampError


def check(log_weights: Any) -> np.ndarray:
    """The log-weights as float64 of shape (groups, particles); a flat array is one group.

    -inf (weight zero) is accepted as long as some particle of the group has weight.

    Raises:
        DiffsampError: NaN, +inf, or a group without weight; the message names the group.
    """
    found = np.atleast_2d(np.asarray(log_weights, dtype=np.float64))
    bad = np.isnan(found) | (found == np.inf)
    if bad.any():
        group, particle = (int(v) for v in np.argwhere(bad)[0])
        raise DiffsampError(
            f"log_weights: got {found[group, particle]} for particle {particle} of group {group}; needs finite or -inf"
        )
    empty = ~np.isfinite(found).any(1)
    if empty.any():
        raise DiffsampError(f"log_weights: all of group {int(empty.argmax())} have weight 0; needs one above 0")
    return found


def normalise(log_weights: Any) -> np.ndarray:
    """Weights that sum to 1 in every group."""
    found = check(log_weights)
    weights = np.exp(found - found.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def log_mean(log_weights: Any) -> np.ndarray:
    """log of the mean weight of every group, shape (groups,): one factor of the normalising constant."""
    found = check(log_weights)
    top = found.max(1, keepdims=True)
    return top[:, 0] + np.log(np.exp(found - top).mean(1))


def ess(log_weights: Any) -> np.ndarray:
    """Effective sample size 1/Σ w² of every group, shape (groups,), in 1..particles.

    Source: Kong, Liu and Wong 1994.
    """
    return 1.0 / (normalise(log_weights) ** 2).sum(1)


def unique(ancestors: np.ndarray) -> np.ndarray:
    """Distinct entries in every row of (groups, particles), as counts of shape (groups,)."""
    ordered = np.sort(np.atleast_2d(ancestors), 1)
    return 1 + (np.diff(ordered, axis=1) != 0).sum(1)
