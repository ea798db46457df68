"""The metrics by name, and their evaluation on the arrays of one cell of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.metrics.accuracy import class_accuracy
from diffsamp.metrics.frechet import frechet_distance, frechet_infinity
from diffsamp.metrics.intervals import Z95, Interval, bootstrap, mean_interval, wilson
from diffsamp.metrics.kernel import kernel_distance, within
from diffsamp.metrics.manifold import precision_recall
from diffsamp.metrics.moments import FrechetStats
from diffsamp.metrics.references import Reference
from diffsamp.metrics.score import inception_score
from diffsamp.metrics.trajectory import trajectory_error

# name: (what it is, whether less is better)
METRICS = {
    "fd": ("Fréchet distance of the features (FID with the FID Inception)", True),
    "fd-infinity": ("Fréchet distance extrapolated to infinitely many pictures", True),
    "kid": ("kernel distance, unbiased, from all pictures", True),
    "is": ("Inception Score of the extractor's classes", False),
    "precision": ("share of pictures that look like real ones", False),
    "recall": ("share of real pictures that the samples cover", False),
    "accuracy": ("share of pictures classified as the class asked for", False),
    "trajectory": ("root mean square distance to the reference solver's sample of the same seed", True),
}


def names() -> tuple[str, ...]:
    """The metrics that `--metrics` accepts."""
    return tuple(METRICS)


def check_metrics(wanted: Sequence[str]) -> tuple[str, ...]:
    """The names, or DiffsampError for an unknown one or an empty list."""
    for name in wanted:
        if name not in METRICS:
            raise DiffsampError(f"metrics holds {name!r}; accepted: {', '.join(METRICS)}")
    if not wanted:
        raise DiffsampError(f"metrics is empty; accepted: {', '.join(METRICS)}")
    return tuple(dict.fromkeys(wanted))


def evaluate(
    wanted: Sequence[str],
    arrays: dict[str, np.ndarray],
    reference: Reference | None,
    *,
    samples_reference: np.ndarray | None = None,
    replicates: int = 50,
    seed: int = 0,
) -> dict[str, Interval]:
    """The wanted metrics of one cell as estimates with 95 % intervals.

    `arrays` holds features [n, d] and, where there are any, logits, labels and samples. A metric whose input this cell
    does not have (accuracy without labels, precision without reference features) is left out.
    """
    wanted = check_metrics(wanted)
    features = arrays["features"].astype(np.float64)
    n = len(features)
    found: dict[str, Interval] = {}
    if reference is not None and features.shape[1] != reference.stats.width:
        raise DiffsampError(
            f"reference {reference.name!r} has {reference.stats.width} features per picture and the run "
            f"{features.shape[1]}"
        )
    for name in wanted:
        value = _one(name, features, arrays, reference, samples_reference, replicates, seed, n)
        if value is not None:
            found[name] = value
    return found


def _one(
    name: str,
    features: np.ndarray,
    arrays: dict[str, np.ndarray],
    reference: Reference | None,
    samples_reference: np.ndarray | None,
    replicates: int,
    seed: int,
    n: int,
) -> Interval | None:
    real = None if reference is None else reference.features
    if name == "fd" and reference is not None:

        def distance(rows: np.ndarray) -> float:
            return frechet_distance(FrechetStats.of(features[rows]), reference.stats, factor_b=reference.factor)

        return bootstrap(n, distance, replicates=replicates, seed=seed)
    if name == "fd-infinity" and reference is not None and n >= 16:
        values = [frechet_infinity(features, reference.stats, seed=seed + i) for i in range(4)]
        spread = Z95 * float(np.std(values, ddof=1))
        return Interval(float(np.mean(values)), float(np.mean(values)) - spread, float(np.mean(values)) + spread)
    if name == "kid" and reference is not None and real is not None:
        return _kid(features, real, reference.within, seed)
    if name == "is" and "logits" in arrays and n >= 10:
        value, spread = inception_score(arrays["logits"])
        half = Z95 * spread / np.sqrt(10)
        return Interval(value, value - half, value + half)
    if name in ("precision", "recall") and real is not None and n > 4:
        # Both sets must be of one size, or the larger one's smaller balls decide the figure.
        rows = np.random.default_rng(seed).permutation(len(real))[:n]
        pair = precision_recall(features, real[rows])
        return wilson(pair[name == "recall"], n)
    if name == "accuracy" and {"logits", "labels"} <= arrays.keys():
        return wilson(class_accuracy(arrays["logits"], arrays["labels"]), n)
    if name == "trajectory" and samples_reference is not None and "samples" in arrays:
        count = min(len(arrays["samples"]), len(samples_reference))
        return mean_interval(trajectory_error(arrays["samples"][:count], samples_reference[:count]))
    return None


def _kid(features: np.ndarray, real: np.ndarray, real_within: float | None, seed: int) -> Interval:
    """All pictures for the estimate; ten disjoint tenths of the generated ones for its spread."""
    value = kernel_distance(features, real, within_b=real_within)
    parts = np.array_split(np.random.default_rng(seed).permutation(len(features)), 10)
    if len(parts[-1]) < 2:
        return Interval(value, float("nan"), float("nan"))
    sample = real[np.random.default_rng(seed).permutation(len(real))[:2000]].astype(np.float64)
    own = within(sample)
    spread = float(np.std([kernel_distance(features[rows], sample, within_b=own) for rows in parts], ddof=1))
    half = Z95 * spread / float(np.sqrt(10))
    return Interval(value, value - half, value + half)
