"""Metrics of generated pictures: on features, in float64, with intervals, and correct for uneven and empty ranks.

The functions take numpy arrays or tensors; the classes are `torchmetrics.Metric` (they load torch and torchmetrics when
they are first asked for). `diffsamp.metrics.names()` lists what `diffsamp bench --metrics` accepts.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "FrechetStats": "moments",
    "frechet_distance": "frechet",
    "frechet_infinity": "frechet",
    "kernel_distance": "kernel",
    "kernel_distance_subsets": "kernel",
    "inception_score": "score",
    "precision_recall": "manifold",
    "class_accuracy": "accuracy",
    "trajectory_error": "trajectory",
    "bootstrap": "intervals",
    "Interval": "intervals",
    "wilson": "intervals",
    "FrechetDistance": "states",
    "KernelDistance": "states",
    "InceptionScore": "states",
    "PrecisionRecall": "states",
    "ClassAccuracy": "states",
    "TrajectoryError": "states",
    "InceptionFID": "inception",
    "extractor": "extractors",
    "Extractor": "extractors",
    "Reference": "references",
    "reference": "references",
    "Protocol": "protocol",
    "check_metrics": "table",
    "evaluate": "table",
    "names": "table",
}
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"diffsamp.metrics.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
