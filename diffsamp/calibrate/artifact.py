"""Artifacts: what a calibration found, in one safetensors file per (method, solver), with its provenance.

The file holds one float64 tensor per setting, named ``<method>/<nfe>/<guidance scale>``, and one metadata entry,
``diffsamp``: JSON with the model's fingerprint, the process, the grid, the solver, seeds, software versions, errors
before and after, and a digest of the tensors. Nothing in it is executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DiffsampError
from ..files import write_whole
from ..grids import Grid
from ..plan import Plan
from ..process import Level

FORMAT = 1
METHODS = ("dc", "dualfast", "grid", "all")
SHIPPED = Path(__file__).parents[1] / "models" / "artifacts"


def levels_digest(levels: Iterable[Level]) -> str:
    """Digest of the noise levels of a grid, to 9 digits."""
    text = ",".join(f"{level.alpha:.9g}:{level.sigma:.9g}" for level in levels)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Setting:
    """One calibrated (NFE, guidance scale).

    Attributes:
        nfe, guidance_scale: the setting.
        values: ratios (dc), constants (dualfast), noise-to-signal ratios (grid); "all": a whole table, see
            :func:`diffsamp.calibrate.table.pack`.
        grid: digest of the noise levels that it was calibrated on.
        before, after: mean squared error of the final state on the calibration points.
        held_out_before, held_out_after: the same on seeds that the search never saw.
        kept: what the guard kept.
        calls: network calls of the search; seconds: its duration.
        distance: of a table that was refined for its pictures' Fréchet distance: extractor and reference with their
            fingerprints, how many pictures, from which seed, weight, bound, the error of the table that it was refined
            from (``error_before``, ``held_out_error_before``) and the distance ``before`` and ``after``; None for
            others.
    """

    nfe: int
    guidance_scale: float
    values: tuple[float, ...]
    grid: str
    before: float
    after: float
    held_out_before: float
    held_out_after: float
    kept: str
    calls: int
    seconds: float
    distance: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        return f"{self.nfe}/{self.guidance_scale:g}"


@dataclass
class Artifact:
    """Settings of one method on one solver, model, process and grid.

    Attributes:
        method: ``dc``, ``dualfast``, ``grid`` or ``all``.
        solver: registry name of the base solver, options included.
        process: fingerprint of the process.
        grid: name of the grid and its final level, such as ``linspace/zero``.
        model: ``{"name": ..., "sha256": ...}``.
        options: of the method: ``k`` (dc), ``tau`` (dualfast).
        seeds: of the calibration points.
        settings: by key.
    """

    method: str
    solver: str
    process: str
    grid: str
    model: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    settings: dict[str, Setting] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, setting: Setting) -> None:
        """Take in a setting; one that is there already is replaced."""
        self.settings[setting.key] = setting

    def setting(self, nfe: int, guidance_scale: float) -> Setting:
        """The setting of exactly (nfe, guidance scale); DiffsampError names what there is and how to make it."""
        found = self.settings.get(f"{nfe}/{guidance_scale:g}")
        if found is None:
            there = ", ".join(sorted(self.settings)) or "none"
            raise DiffsampError(
                f"artifact: {self.method} on {self.solver} has no setting for {nfe} calls at guidance scale "
                f"{guidance_scale:g} (it has {there}); make one: diffsamp calibrate {self.method} "
                f"--nfe {nfe} --guidance-scale {guidance_scale:g} --solver {self.solver} "
                f"--model {self.model.get('name', 'MODEL')}"
            )
        return found

    def check(self, plan: Plan, setting: Setting) -> None:
        """Refuse a plan of another process or grid."""
        if plan.process.fingerprint != self.process:
            raise DiffsampError(
                f"artifact: was calibrated for process {self.process}, the plan has {plan.process.fingerprint}"
            )
        if levels_digest(plan.grid.levels) != setting.grid:
            raise DiffsampError(
                f"artifact: was calibrated on the grid {self.grid} with {setting.nfe} calls; "
                f"the plan visits other noise levels ({plan.grid.name}, {len(plan.grid)} calls)"
            )

    def apply(self, plan: Plan, guidance_scale: float, *, model: str | None = None) -> Plan:
        """``plan`` with the calibrated values; one of "all" has noise levels of its own and starts where ``plan`` does.

        Args:
            plan: the base solver on the grid of the calibration.
            guidance_scale: the one the run will use.
            model: sha256 of the model at hand; another than the artifact's gives a warning.

        Raises:
            DiffsampError: another solver, process or grid, or a setting that is not there.
        """
        from ..registry import solver as by_name
        from ..solvers.dc import dc
        from ..solvers.dualfast import dualfast
        from .table import unpack

        if self.method == "grid":
            raise DiffsampError(
                "artifact: holds a grid, which is no transform of a plan; use artifact.levels(process, ...)"
            )
        wanted = by_name(self.solver)(plan.process, plan.grid)
        if wanted.fingerprint != plan.fingerprint and plan.process.fingerprint == self.process:
            raise DiffsampError(
                f"artifact: was calibrated on solver {self.solver}; the plan is {plan.solver or 'another'}"
            )
        setting = self.setting(plan.nfe, guidance_scale)
        self.check(plan, setting)
        self.warn_model(model)
        values = setting.values
        if self.method == "dc":
            made = dc(plan, ratios=values, k=self.options.get("k", 2))
        elif self.method == "dualfast":
            made = dualfast(plan, c=values, tau=self.options.get("tau", "first"))
        else:
            made = unpack(plan.process, plan.nfe, values)
        return made.with_rows(made.rows, solver=f"{self.method}({self.solver})")

    def levels(self, process: Any, nfe: int, guidance_scale: float, *, model: str | None = None) -> Grid:
        """The calibrated grid of a ``grid`` artifact."""
        if self.method != "grid":
            raise DiffsampError(f"artifact: holds {self.method}, not a grid")
        if process.fingerprint != self.process:
            raise DiffsampError(f"artifact: was calibrated for process {self.process}, got {process.fingerprint}")
        self.warn_model(model)
        values = self.setting(nfe, guidance_scale).values
        return Grid(process, tuple(process.level(v) for v in values), "calibrated")

    def warn_model(self, sha256: str | None) -> None:
        """Warn where the model at hand is not the calibrated one."""
        if sha256 is not None and sha256 != self.model.get("sha256"):
            warnings.warn(
                f"artifact: was calibrated on model {self.model.get('name')} ({self.model.get('sha256', '?')[:12]}), "
                f"this one is {sha256[:12]}; its values may not fit: run diffsamp calibrate {self.method} again",
                stacklevel=3,
            )

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file whole: temporary name, then renamed."""
        from safetensors.numpy import save

        tensors = {
            f"{self.method}/{key}": np.array(s.values, dtype=np.float64) for key, s in sorted(self.settings.items())
        }
        facts = {
            "format": FORMAT, "method": self.method, "solver": self.solver, "process": self.process, "grid": self.grid,
            "model": self.model, "options": self.options, "seeds": list(self.seeds), "versions": versions(),
            "digest": _digest(tensors),
            "settings": [
                {k: v for k, v in asdict(s).items() if k != "values" and v is not None}
                for _, s in sorted(self.settings.items())
            ],
        }  # fmt: skip
        content = save(tensors, metadata={"diffsamp": json.dumps(facts, sort_keys=True)})
        write_whole(Path(path), content, overwrite=True)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Read an artifact.

        Raises:
            DiffsampError: missing, truncated, foreign, of a newer format, or changed after it was written.
        """
        tensors, facts = read(path)
        settings: dict[str, Setting] = {}
        try:
            if facts["method"] not in METHODS:
                raise DiffsampError(
                    f"artifact {path}: method {facts['method']!r} is not known; accepted: {', '.join(METHODS)}"
                )
            for entry in facts["settings"]:
                key = f"{entry['nfe']}/{float(entry['guidance_scale']):g}"
                values = tensors[f"{facts['method']}/{key}"]
                if values.ndim != 1 or not np.isfinite(values).all():
                    raise DiffsampError(f"artifact {path}: setting {key} holds values that are not finite")
                settings[key] = Setting(values=tuple(values.tolist()), **entry)
            return cls(
                facts["method"], facts["solver"], facts["process"], facts["grid"], facts["model"], facts["options"],
                tuple(facts["seeds"]), settings, facts["versions"],
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise DiffsampError(f"artifact {path}: its metadata is incomplete ({error})") from None


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and facts of a diffsamp safetensors file, after its format and digest were checked."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise DiffsampError(f"artifact {path}: there is no such file")
    try:
        with safe_open(str(path), "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise DiffsampError(f"artifact {path}: is truncated or no safetensors file ({error})") from None
    if "diffsamp" not in metadata:
        raise DiffsampError(f"artifact {path}: is not one of diffsamp's (its metadata has no entry 'diffsamp')")
    try:
        facts = json.loads(metadata["diffsamp"])
        if int(facts["format"]) > FORMAT:
            raise DiffsampError(
                f"artifact {path}: has format {facts['format']}, this version reads {FORMAT}; upgrade diffsamp"
            )
        if facts["digest"] != _digest(tensors):
            raise DiffsampError(
                f"artifact {path}: its values do not match their digest; it was changed after it was written"
            )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DiffsampError(f"artifact {path}: its metadata cannot be read ({error})") from None
    return tensors, facts


def _digest(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape} {tensors[name].dtype}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Software that made an artifact."""
    import torch

    from .. import __version__

    return {"diffsamp": __version__, "torch": torch.__version__.split("+")[0], "python": platform.python_version()}


def find(method: str, solver: str, *, model: str = "fashion", folder: str | os.PathLike[str] | None = None) -> Artifact:
    """The artifact of (model, method, solver) in ``folder``, by default those shipped for the embedded models.

    Raises:
        DiffsampError: there is none; the message says how to make one.
    """
    path = Path(folder if folder is not None else SHIPPED) / filename(model, method, solver)
    if not path.is_file():
        raise DiffsampError(
            f"artifact: none for {method} on {solver} and model {model} ({path.name}); "
            f"make one: diffsamp calibrate {method} --solver {solver} --model {model} --out {path.name}"
        )
    return Artifact.load(path)


def filename(model: str, method: str, solver: str) -> str:
    """Name of the file of an artifact."""
    clean = "".join(ch if ch.isalnum() else "-" for ch in solver).strip("-")
    return f"{Path(model).name}-{method}-{clean}.safetensors"
