"""Kernels of diffusion sampling: one folder per operation, each with its definition in plain torch (``naive.py``).

The package stands alone: it needs torch, and Triton only when a GPU tensor arrives.
"""

from __future__ import annotations

from .categorical import sample_categorical
from .dispatch import BackendError, choose
from .guided_step import guided_coefficients, guided_step
from .linear_step import linear_step
from .resample_gather import resample_gather

__all__ = [
    "BackendError",
    "choose",
    "guided_coefficients",
    "guided_step",
    "linear_step",
    "resample_gather",
    "sample_categorical",
]
