"""Calibrated solvers in a benchmark: the name becomes the solver with the values of its artifact, or a clear refusal.

Without ratios `dc(unipc)` is `unipc`, and so is `all(unipc)` without its table: a cell that ran it under the longer
name would be a false label. DualFast has a default law of its own and is run as it is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffsamp.errors import DiffsampError


def with_ratios(
    name: str, *, model: str, sha256: str, nfe: int, guidance_scale: float, folder: str | Path | None = None
) -> tuple[str, Any]:
    """(the name with its calibrated ratios, their artifact), or (name, None) for a solver that needs none.

    Raises DiffsampError for a missing artifact or setting; the message holds the command that makes one.
    """
    from diffsamp.calibrate.resolve import resolve_with
    from diffsamp.registry import solver

    if name.startswith("diffusers:") or solver(name).info.name == "dualfast":
        return name, None
    made, artifact = resolve_with(
        name, model=model, nfe=nfe, guidance_scale=guidance_scale, sha256=sha256, folder=folder
    )  # fmt: skip
    if artifact is None:
        return name, None
    # A table brings its own levels, and refuses another start itself.
    return made.name, None if artifact.method == "all" else artifact


def check_grid(name: str, artifact: Any, scheduler: Any, nfe: int, guidance_scale: float) -> None:
    """Refuse ratios on other noise levels than those that they were calibrated for."""
    if artifact is None:
        return
    try:
        artifact.check(scheduler.plan, artifact.setting(nfe, guidance_scale))
    except DiffsampError as error:
        raise DiffsampError(f"solver={name!r} at {nfe} calls: {error}; choose --grid, or calibrate on it") from None
