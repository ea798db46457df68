"""From the name of a calibrated solver to the solver with its values: what ``dc-unipc`` means for a model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DiffsampError
from ..registry import Solver
from ..registry import solver as by_name
from .artifact import SHIPPED, Artifact, filename, find

# Method of an artifact: the option of its transform that takes the values.
_OPTION = {"dc": "ratios", "dualfast": "c", "all": "values"}


def resolve(name: str, **run: Any) -> Solver:
    """The solver alone of :func:`resolve_with`, which says what ``run`` takes."""
    return resolve_with(name, **run)[0]


def resolve_with(
    name: str,
    *,
    model: str,
    nfe: int,
    guidance_scale: float | None,
    sha256: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    uncalibrated: bool = False,
) -> tuple[Solver, Artifact | None]:
    """The solver of ``name`` with calibrated values bound, where it is a transform that has none, and their artifact.

    Args:
        name: registry name. ``dc-unipc``, ``dualfast(ddim)``, ``all(unipc)`` are looked up; with values given, or
            without a transform, the name is taken as it is.
        model: name of the model in the artifact's file name.
        nfe, guidance_scale: of the run; a scale of None is refused where it is needed.
        sha256: the model's fingerprint; another than the artifact's gives a warning.
        folder: where artifacts are. None: the current folder, where ``diffsamp calibrate`` writes, then those shipped
            with the embedded models.
        uncalibrated: accept ratio 1 (dc), the base (all) or this project's default constant (dualfast) where there is
            no artifact.

    Returns:
        (solver, artifact); None for the artifact of a name that is taken as it is.

    Raises:
        DiffsampError: no artifact or setting; the message holds the command that makes one.
    """
    made = by_name(name)
    method = {"dc": "dc", "dc-unipc": "dc", "dualfast": "dualfast", "all": "all"}.get(made.info.name)
    given = {key for key, _ in made.options}
    if method is None or made.inner is None or given & set(_OPTION.values()) or uncalibrated:
        return made, None
    if guidance_scale is None:
        raise DiffsampError(
            f"guidance_scale: is needed by {name}, whose values belong to one scale; give it, or take them uncalibrated"
        )
    artifact = _nearest(method, made.inner.name, model, folder, f"{nfe}/{guidance_scale:g}")
    setting = artifact.setting(nfe, guidance_scale)
    artifact.warn_model(sha256)
    # The artifact also notes how the values were found; the solver needs what they mean.
    meaning = {name: value for name, value in artifact.options.items() if name in made.info.options}
    options = {**dict(made.options), **meaning, _OPTION[method]: setting.values}
    return replace(made, options=tuple(sorted(options.items()))), artifact


def _nearest(method: str, inner: str, model: str, folder: str | os.PathLike[str] | None, setting: str) -> Artifact:
    """The artifact in ``folder``, or the first of the known places whose artifact has the setting."""
    if folder is not None:
        return find(method, inner, model=model, folder=folder)
    own = Path.cwd()
    if (own / filename(model, method, inner)).is_file():
        artifact = find(method, inner, model=model, folder=own)
        if setting in artifact.settings or not (SHIPPED / filename(model, method, inner)).is_file():
            return artifact
    return find(method, inner, model=model)
