"""Guidance: how the predictions with and without a condition become one.

Every method is a frozen dataclass (its options) with ``init(batch, steps) -> state`` and
``__call__(state, cond_x0, uncond_x0, x, level) -> (x0, state)``, and a pure function beside it.
"""

from __future__ import annotations

from .apg import APG, apg
from .autoguidance import AutoGuidance, pair
from .base import Guidance, GuidanceBase, GuidanceState
from .cfg import CFG, cfg
from .cfg_zero import CFGZeroStar, cfg_zero
from .fdg import FrequencyDecoupled, fdg
from .interval import Interval
from .parse import METHODS, names, parse, written
from .perp_neg import PerpNeg, perp_neg
from .presets import PRESETS, preset
from .rescale import RescaledCFG, rescale

__all__ = [
    "APG",
    "CFG",
    "METHODS",
    "PRESETS",
    "AutoGuidance",
    "CFGZeroStar",
    "FrequencyDecoupled",
    "Guidance",
    "GuidanceBase",
    "GuidanceState",
    "Interval",
    "PerpNeg",
    "RescaledCFG",
    "apg",
    "cfg",
    "cfg_zero",
    "fdg",
    "names",
    "pair",
    "parse",
    "perp_neg",
    "preset",
    "rescale",
    "written",
]
