"""Trajectory error: how far a fast solver's samples are from a reference solver's, seed by seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.metrics.arrays import as_numpy


def trajectory_error(samples: Any, reference: Any) -> np.ndarray:
    """The root mean square difference [n] of each sample [n, ...] from the reference sample of the same seed."""
    a, b = as_numpy(samples).astype(np.float64), as_numpy(reference).astype(np.float64)
    if a.shape != b.shape or a.ndim < 2 or not len(a):
        raise DiffsampError(f"samples has shape {a.shape} and reference {b.shape}; accepted: equal shapes [n, ...]")
    return np.sqrt(((a - b) ** 2).reshape(len(a), -1).mean(1))
