"""Inception Score: exp of the mean divergence of p(class | picture) from p(class).

Source: Salimans et al. 2016, arXiv:1606.03498. It needs no real pictures and says nothing of likeness to them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.metrics.arrays import as_features


def inception_score(logits: Any, *, splits: int = 10, shuffle_seed: int | None = 2020) -> tuple[float, float]:
    """Mean and standard deviation over `splits` parts of the logits [n, classes].

    The score of a part grows with its size, so compare only equal n and splits. The default shuffle is
    torch-fidelity's.
    """
    found = as_features(logits, "logits")
    if not 1 <= splits <= len(found):
        raise DiffsampError(f"splits={splits}; accepted: 1 to {len(found)}, the number of pictures")
    if shuffle_seed is not None:
        found = found[np.random.RandomState(shuffle_seed).permutation(len(found))]
    shifted = found - found.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    p = np.exp(log_p)
    scores = []
    for i in range(splits):
        part = slice(i * len(found) // splits, (i + 1) * len(found) // splits)
        marginal = np.log(np.maximum(p[part].mean(0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p[part] * (log_p[part] - marginal)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
