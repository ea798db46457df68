"""Feature arrays as the metrics see them: float64, two axes, finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffsamp.errors import DiffsampError


def as_numpy(values: Any) -> np.ndarray:
    """A tensor of any device, or an array, as a numpy array (no copy where none is needed)."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def as_features(values: Any, name: str = "features") -> np.ndarray:
    """Features [n, d] in float64; raises DiffsampError for another shape or for values that are not finite."""
    found = as_numpy(values)
    if found.ndim != 2 or not found.shape[1]:
        raise DiffsampError(f"{name} has shape {found.shape}; accepted: [n, d] with one row per picture")
    if not (np.issubdtype(found.dtype, np.floating) or np.issubdtype(found.dtype, np.integer)):
        raise DiffsampError(f"{name} has dtype {found.dtype}; accepted: floating point or integer")
    found = found.astype(np.float64, copy=False)
    if not np.isfinite(found).all():
        row = int(np.argwhere(~np.isfinite(found).all(1))[0, 0])
        raise DiffsampError(f"{name} holds a value that is not finite (first in row {row}); accepted: finite numbers")
    return found


def check_same_width(a: np.ndarray, b: np.ndarray) -> None:
    """Raises DiffsampError when two feature sets have different numbers of columns."""
    if a.shape[-1] != b.shape[-1]:
        raise DiffsampError(
            f"features have {a.shape[-1]} columns and the reference has {b.shape[-1]}; both must come from one "
            "extractor"
        )
