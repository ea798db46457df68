"""``calibrate all`` for the pictures: every table of an artifact refined for its Fréchet distance (:mod:`.refine`).

Works on settings that are there, so a table that was calibrated without it, or whose search was killed, is taken up
where it stands. Every refined setting is written at once.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .. import engine
from ..errors import DiffsampError
from ..plan import Plan
from .artifact import Artifact, Setting
from .frechet import Distance, distance_of
from .model import HELD_OUT_SEED, PICTURE_SEED, Model
from .refine import in_parts, refine
from .run import fine_run
from .search import mse
from .table import TableFit, pack, plan_of, unpack

# A number that acts in earlier calls than the last so many stays: the cost of its derivative grows with them.
LATE = 4
LEAST_PICTURES, ADVISED_PICTURES, LEAST_HELD_OUT = 64, 512, 8
# What a stored refinement must share with the one that is asked for.
_SAME = ("extractor_sha256", "reference_fingerprint", "pictures", "weight", "bound")


@dataclass(frozen=True)
class Wish:
    """What to refine for: a distance, how much it counts and how far the trajectory error may rise."""

    distance: Distance
    facts: dict[str, object]
    pictures: int
    weight: float
    bound: float


def wish(
    model: Model, extractor: str, *, reference: str, feature_weights: str | os.PathLike[str] | None, pictures: int,
    weight: float, bound: float, held_out: int,
) -> Wish:  # fmt: skip
    """The options, checked before any search begins.

    Raises:
        DiffsampError: unknown extractor or reference, a model without pictures, or numbers out of range.
    """
    if pictures < LEAST_PICTURES:
        raise DiffsampError(
            f"pictures: got {pictures}; a distance needs at least {LEAST_PICTURES}, {ADVISED_PICTURES} or more are "
            "advised"
        )
    if not (weight > 0 and math.isfinite(weight)):
        raise DiffsampError(f"weight: got {weight:g}; must be a finite number above 0")
    if not (bound >= 1 and math.isfinite(bound)):
        raise DiffsampError(f"bound: got {bound:g}; must be 1 or above, as the error may not be asked to fall")
    if held_out < LEAST_HELD_OUT:
        raise DiffsampError(
            f"held_out: got {held_out}; the bound of the distance needs at least {LEAST_HELD_OUT} held-out noises"
        )
    distance, facts = distance_of(model, extractor, reference, feature_weights)
    if pictures <= len(distance.mean):
        warnings.warn(
            f"pictures: {pictures} are few for {len(distance.mean)} features: the distance is mostly bias", stacklevel=3
        )
    numbers = {"pictures": pictures, "first_seed": PICTURE_SEED, "weight": float(weight), "bound": float(bound)}
    return Wish(distance, {**facts, **numbers}, pictures, weight, bound)


def unrefined(artifact: Artifact, wanted: Wish, nfe: Sequence[int], scale: float) -> list[Setting]:
    """Settings at this guidance scale that are still to be refined.

    Raises:
        DiffsampError: one was refined for something else.
    """
    todo = []
    for n in nfe:
        setting = artifact.setting(n, scale)
        if setting.distance is None:
            todo.append(setting)
            continue
        for name in _SAME:
            if setting.distance.get(name) != wanted.facts[name]:
                raise DiffsampError(
                    f"out: setting {setting.key} was refined with {name} {setting.distance.get(name)}, this run has "
                    f"{wanted.facts[name]}; give another file, or delete it"
                )
    return todo


def refine_settings(
    artifact: Artifact,
    model: Model,
    wanted: Wish,
    todo: Sequence[Setting],
    scale: float,
    *,
    held_out: int,
    reference_steps: int,
    out: str | os.PathLike[str] | None,
    report: Callable[[Setting, str, bool], None],
) -> None:
    """Refine ``todo``, all at one guidance scale, and put them back into ``artifact``.

    Args:
        held_out, reference_steps: as of the calibration.
        out: written after every setting.
        report: called with (setting, what was done, whether it is finished).
    """
    plans = {s.nfe: unpack(model.process, s.nfe, s.values) for s in todo}
    if not plans:
        return
    noise, labels = model.points((*artifact.seeds, *range(HELD_OUT_SEED, HELD_OUT_SEED + held_out)))
    first = next(iter(plans.values())).first_level
    x, points = noise * first.sigma, len(artifact.seeds)
    levels = [first, *(plan.last_level for plan in plans.values())]
    fine = fine_run(model, levels, scale, x, labels, reference_steps)
    denoiser, unseen = model.guided(labels[:points], scale), model.guided(labels[points:], scale)
    many, many_labels = model.points(range(PICTURE_SEED, PICTURE_SEED + wanted.pictures))
    pictured = in_parts(model, many_labels, scale), many * first.sigma
    for setting in todo:
        plan = plans[setting.nfe]
        goal = fine.at(plan.last_level)

        def held_out_error(candidate: Plan, goal: torch.Tensor = goal) -> float:
            return mse(engine.sample(candidate, unseen, x[points:], prediction=model.prediction), goal[points:])

        table, start = TableFit.around(plan)
        found = refine(
            table.plan, start, table.late(LATE), (denoiser, x[:points], goal[:points]), pictured, wanted.distance,
            held_out_error, prediction=model.prediction, weight=wanted.weight, bound=wanted.bound,
            progress=lambda line, setting=setting: report(setting, line, False),
        )  # fmt: skip
        parts = table.parts(found.values)
        assert parts is not None
        facts = {
            **wanted.facts, "error_before": found.error_before, "held_out_error_before": found.held_out_before,
            "before": found.before, "after": found.after,
        }  # fmt: skip
        better = found.after != found.before
        artifact.add(
            replace(
                setting, values=pack(*parts) if better else setting.values, after=found.error,
                held_out_after=held_out_error(plan_of(*parts)), calls=setting.calls + found.calls,
                seconds=setting.seconds + found.seconds, kept=setting.kept + ("+distance" if better else ""),
                distance=facts,
            )
        )  # fmt: skip
        if out is not None:
            artifact.save(out)
        report(artifact.setting(setting.nfe, scale), f"FD {found.before:.4f} to {found.after:.4f}", True)
