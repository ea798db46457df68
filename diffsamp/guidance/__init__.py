"""Guidance: how the predictions with and without a condition become one."""

from __future__ import annotations

from .base import Guidance, GuidanceBase, GuidanceState

__all__ = ["Guidance", "GuidanceBase", "GuidanceState"]
