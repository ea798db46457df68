"""Class accuracy: how often a classifier sees the class that was asked for."""

from __future__ import annotations

from typing import Any

from diffsamp.errors import DiffsampError
from diffsamp.metrics.arrays import as_features, as_numpy


def class_accuracy(logits: Any, labels: Any) -> float:
    """The share 0..1 of pictures whose largest logit [n, classes] is the asked label [n]."""
    logits, labels = as_features(logits, "logits"), as_numpy(labels)
    if labels.shape != (len(logits),) or not len(labels):
        raise DiffsampError(f"labels has shape {labels.shape}; accepted: one label for each of {len(logits)} pictures")
    return float((logits.argmax(1) == labels).mean())
