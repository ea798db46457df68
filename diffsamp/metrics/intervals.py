"""Intervals of metrics: bootstrap over pictures, Wilson for shares.

The Fréchet distance is biased upwards in 1/n and a bootstrap resample holds fewer distinct pictures, so its replicates
lie above the estimate and the percentile interval would miss it. The spread is right: the interval is the estimate
plus and minus z standard deviations of the replicates, and the bias is left to `frechet_infinity` and the floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffsamp.errors import DiffsampError

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(n: int, statistic: Callable[[np.ndarray], float], *, replicates: int = 50, seed: int = 0) -> Interval:
    """The 95 % interval of `statistic(rows)`, where rows indexes n pictures; symmetric, by the replicates' spread."""
    if n < 2 or replicates < 2:
        raise DiffsampError(f"n={n}, replicates={replicates}; accepted: at least 2 of each")
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(n))
    spread = float(np.std([statistic(rng.integers(0, n, n)) for _ in range(replicates)], ddof=1))
    return Interval(value, value - Z95 * spread, value + Z95 * spread)


def mean_interval(values: np.ndarray) -> Interval:
    """The mean of values [n] with its normal 95 % interval."""
    mean = float(np.mean(values))
    half = Z95 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Interval(mean, mean - half, mean + half)


def wilson(share: float, n: int) -> Interval:
    """The 95 % Wilson interval of a share 0..1 among n pictures."""
    if n < 1 or not 0 <= share <= 1:
        raise DiffsampError(f"share={share}, n={n}; accepted: a share from 0 to 1 and at least 1 picture")
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    return Interval(share, centre - half, centre + half)
