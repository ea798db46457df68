"""The loop over settings that every calibration shares: fine run per guidance scale, search, held-out error, save.

A file that exists and was made for the same model, solver, grid and seeds is continued: settings that are there are
kept. Every finished setting is written at once, so a killed run loses at most one setting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import engine
from ..errors import DiffsampError
from ..grids import Grid, grid
from ..plan import Plan
from ..process import Level
from ..registry import solver as by_name
from .artifact import Artifact, Setting, levels_digest
from .model import CALIBRATION_SEED, HELD_OUT_SEED, Model
from .reference import Denoiser, Reference
from .search import check_points, mse

Progress = Callable[[str, int, int], None]
Grids = Callable[[Model, int], Grid]


@dataclass(frozen=True)
class Found:
    """What a method's search returns for one setting."""

    values: tuple[float, ...]
    before: float
    after: float
    kept: str
    calls: int
    apply: Callable[[], Plan]


Search = Callable[[Plan, Reference, Denoiser, torch.Tensor, str], Found]


def named_grid(name: str, final: str = "zero") -> Grids:
    """Grids of one name for any number of calls."""
    return lambda model, nfe: grid(name, model.process, nfe, final=final)


def calibrate(
    method: str,
    model: Model,
    search: Search,
    *,
    solver: str,
    nfe: Sequence[int],
    guidance_scale: Sequence[float],
    out: str | os.PathLike[str] | None,
    grid_name: str,
    final: str,
    options: dict[str, object],
    points: int,
    held_out: int,
    reference_steps: int,
    progress: Progress | None,
    seed: int = CALIBRATION_SEED,
) -> Artifact:
    """Run ``search`` for every (nfe, guidance scale) and return the artifact, written to ``out`` as it grows."""
    check_points(points)
    for n in nfe:
        if n < 3:
            raise DiffsampError(f"nfe: got {n}; a calibration needs at least 3 network calls")
    grids = named_grid(grid_name, final)
    seeds = tuple(range(seed, seed + points))
    others = tuple(range(HELD_OUT_SEED, HELD_OUT_SEED + held_out))
    fresh = Artifact(
        method, by_name(solver).name, model.process.fingerprint, f"{grid_name}/{final}",
        {"name": model.name, "sha256": model.sha256}, dict(options), seeds,
    )  # fmt: skip
    artifact = _continued(fresh, out)
    plans = {n: by_name(solver)(model.process, grids(model, n)) for n in nfe}
    noise, labels = model.points((*seeds, *others))
    total = len(nfe) * len(guidance_scale)
    done = 0
    for scale in guidance_scale:
        todo = [n for n in nfe if f"{n}/{scale:g}" not in artifact.settings]
        done += len(nfe) - len(todo)
        if not todo:
            continue
        levels = [level for n in todo for level in plans[n].grid.levels]
        first = plans[todo[0]].first_level
        for n in todo:
            if abs(plans[n].first_level.sigma - first.sigma) > 1e-9:
                raise DiffsampError(
                    f"grid: {grid_name!r} starts at another level for {n} calls; calibrate one nfe at a time"
                )
        x = noise * first.sigma
        fine = fine_run(model, levels, scale, x, labels, reference_steps)
        kept, rest = slice(0, points), slice(points, None)
        denoiser, unseen = model.guided(labels[kept], scale), model.guided(labels[rest], scale)
        for n in todo:
            began = time.monotonic()
            found = search(plans[n], fine.of(kept), denoiser, x[kept], model.prediction)
            seconds = time.monotonic() - began
            goal = fine.of(rest).at(plans[n].last_level)

            def error(plan: Plan, unseen=unseen, x=x, rest=rest, goal=goal) -> float:
                return mse(engine.sample(plan, unseen, x[rest], prediction=model.prediction), goal)

            artifact.add(
                Setting(
                    n, float(scale), found.values, levels_digest(plans[n].grid.levels), found.before, found.after,
                    error(plans[n]) if held_out else found.before, error(found.apply()) if held_out else found.after,
                    found.kept, found.calls, seconds,
                )
            )  # fmt: skip
            if out is not None:
                artifact.save(out)
            done += 1
            if progress is not None:
                progress(f"{n} calls, guidance {scale:g}", done, total)
    return artifact


_kept: dict[tuple[object, ...], Reference] = {}


def fine_run(
    model: Model, levels: list[Level], scale: float, x: torch.Tensor, labels: torch.Tensor, steps: int
) -> Reference:
    """The fine run; one that visited these levels already, for another method or solver, serves again."""
    key = (model.sha256, model.process, scale, steps, tuple(x.shape), float(x.double().sum()))
    if key not in _kept or not _kept[key].covers(levels):
        if len(_kept) >= 8:
            _kept.pop(next(iter(_kept)))
        _kept[key] = Reference(
            model.process, levels, model.guided(labels, scale), x, steps=steps, prediction=model.prediction
        )
    return _kept[key]


def _continued(fresh: Artifact, out: str | os.PathLike[str] | None) -> Artifact:
    if out is None or not Path(out).exists():
        return fresh
    there = Artifact.load(out)
    for name in ("method", "solver", "process", "grid", "model", "options", "seeds"):
        if getattr(there, name) != getattr(fresh, name):
            raise DiffsampError(
                f"out: {out} was calibrated with {name} {getattr(there, name)}, this run has {getattr(fresh, name)}; "
                "give another file, or delete it"
            )
    return there
