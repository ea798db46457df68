"""Values that a solver holds per network call, in runs that have other calls than they were found for.

Ratios of DC-Solver and constants of DualFast belong to one number of calls. A scheduler is asked for any number, and to
begin anywhere (image-to-image): values for another number are not used, with a warning; a run that begins inside keeps
the values of its own steps, neutral where its history is still too short. A whole table cannot be entered inside.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import DiffsampError
from ..registry import Solver

# Option -> value that changes nothing.
_NEUTRAL = {"ratios": 1.0, "c": 0.0}


def for_run(made: Solver, calls: int, start: int = 0) -> Solver:
    """``made`` for a schedule of ``calls`` network calls that is entered at call ``start``."""
    inner = None if made.inner is None else for_run(made.inner, calls, start)
    options: dict[str, Any] = dict(made.options)
    table = options.get("values")
    if made.info.name == "all" and isinstance(table, Sequence):
        if start:
            raise DiffsampError(
                f"begin_index: got {start}; a calibrated table runs from its first call only, take another solver"
            )
        if len(table) != 2 * calls + 1 + calls * (calls + 1) // 2:
            warnings.warn(
                f"all: holds a table for another number of network calls than the {calls} of this run; using "
                f"{'its base' if inner is None else inner.name}. Calibrate for {calls} calls",
                stacklevel=2,
            )
            del options["values"]
    for name, neutral in _NEUTRAL.items():
        values = options.get(name)
        if not isinstance(values, Sequence) or isinstance(values, str) or not made.info.transform:
            continue
        if len(values) != calls:
            warnings.warn(
                f"{made.info.name}: has {name} for {len(values)} network calls, this run has {calls}; "
                f"using {neutral:g} everywhere, the base solver. Calibrate for {calls} calls",
                stacklevel=2,
            )
            options[name] = [neutral] * calls
        if start:
            short = int(options.get("k", 2)) if name == "ratios" else 1
            rest = list(options[name])[start:]
            options[name] = [neutral] * min(short, len(rest)) + rest[short:]
    return replace(made, options=tuple(sorted(options.items())), inner=inner)
