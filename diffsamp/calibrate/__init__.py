"""Calibration: searches on the user's own model that produce small safetensors artifacts with their provenance."""

from __future__ import annotations

from .artifact import Artifact, Setting, find
from .cpr import Cascade, fit_cascade
from .dc import calibrate_dc
from .dualfast import calibrate_dualfast
from .grid import calibrate_grid
from .joint import calibrate_all
from .model import Model, embedded
from .reference import Reference
from .resolve import resolve
from .search import Result, search_constants, search_ratios

__all__ = [
    "Artifact", "Cascade", "Model", "Reference", "Result", "Setting", "calibrate_all", "calibrate_dc",
    "calibrate_dualfast", "calibrate_grid", "embedded", "find", "fit_cascade", "resolve", "search_constants", "search_ratios",  # noqa: E501
]  # fmt: skip
