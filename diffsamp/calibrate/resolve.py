"""From the name of a calibrated solver to the solver with its values: what ``dc-unipc`` means for a model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..errors import DiffsampError
from ..registry import Solver
from ..registry import solver as by_name
from .artifact import SHIPPED, Artifact, filename, find

# Method of an artifact: the option of its transform that takes the values.
_OPTION = {"dc": "ratios", "dualfast": "c", "all": "values"}


def resolve(
    name: str,
    *,
    model: str,
    nfe: int,
    guidance_scale: float | None,
    sha256: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    uncalibrated: bool = False,
) -> Solver:
    """The solver of ``name`` with calibrated values bound, where it is a transform that has none.

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

    Raises:
        DiffsampError: no artifact or setting; the message holds the command that makes one.
    """
    made = by_name(name)
    method = _method(made)
    if method is None or made.inner is None or uncalibrated:
        return made
    if guidance_scale is None:
        raise DiffsampError(
            f"guidance_scale: is needed by {name}, whose values belong to one scale; give it, or take them uncalibrated"
        )
    artifact = nearest(method, made.inner.name, model=model, nfe=nfe, guidance_scale=guidance_scale, folder=folder)
    setting = artifact.setting(nfe, guidance_scale)
    artifact.warn_model(sha256)
    # The artifact also notes how the values were found; the solver needs what they mean.
    meaning = {name: value for name, value in artifact.options.items() if name in made.info.options}
    options = {**dict(made.options), **meaning, _OPTION[method]: setting.values}
    return replace(made, options=tuple(sorted(options.items())))


def _method(made: Solver) -> str | None:
    """The kind of artifact that a solver lacks, or None."""
    method = {"dc": "dc", "dc-unipc": "dc", "dualfast": "dualfast", "all": "all"}.get(made.info.name)
    return None if {key for key, _ in made.options} & set(_OPTION.values()) else method


def artifact_for(
    name: str, *, model: str, nfe: int, guidance_scale: float, folder: str | os.PathLike[str] | None = None
) -> Artifact | None:
    """The artifact that :func:`resolve` takes the values of ``name`` from; None for a name that needs none.

    Raises:
        DiffsampError: there is none.
    """
    made = by_name(name)
    method = _method(made)
    if method is None or made.inner is None:
        return None
    return nearest(method, made.inner.name, model=model, nfe=nfe, guidance_scale=guidance_scale, folder=folder)


def nearest(
    method: str,
    inner: str,
    *,
    model: str,
    nfe: int,
    guidance_scale: float,
    folder: str | os.PathLike[str] | None = None,
) -> Artifact:
    """The artifact in ``folder``, or the first of the known places whose artifact has the setting.

    Raises:
        DiffsampError: there is none.
    """
    setting = f"{nfe}/{guidance_scale:g}"
    if folder is not None:
        return find(method, inner, model=model, folder=folder)
    own = Path.cwd()
    if (own / filename(model, method, inner)).is_file():
        artifact = find(method, inner, model=model, folder=own)
        if setting in artifact.settings or not (SHIPPED / filename(model, method, inner)).is_file():
            return artifact
    return find(method, inner, model=model)
