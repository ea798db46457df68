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
    from diffsamp.calibrate import resolve
    from diffsamp.calibrate.resolve import nearest
    from diffsamp.registry import solver

    if name.startswith("diffusers:"):
        return name, None
    made = solver(name)
    if made.info.name == "all" and made.inner is not None and "values" not in dict(made.options):
        found = resolve(name, model=model, nfe=nfe, guidance_scale=guidance_scale, sha256=sha256, folder=folder)
        return found.name, None  # a table brings its own levels, and refuses another start itself
    if made.info.name not in ("dc", "dc-unipc") or made.inner is None or "ratios" in dict(made.options):
        return name, None
    artifact = nearest(
        "dc", made.inner.name, model=model, nfe=nfe, guidance_scale=guidance_scale, folder=folder
    )  # fmt: skip
    found = resolve(name, model=model, nfe=nfe, guidance_scale=guidance_scale, sha256=sha256, folder=folder)
    return found.name, artifact


def check_grid(name: str, artifact: Any, scheduler: Any, nfe: int, guidance_scale: float) -> None:
    """Refuse ratios on other noise levels than those that they were calibrated for."""
    if artifact is None:
        return
    try:
        artifact.check(scheduler.plan, artifact.setting(nfe, guidance_scale))
    except DiffsampError as error:
        raise DiffsampError(f"solver={name!r} at {nfe} calls: {error}; choose --grid, or calibrate on it") from None
