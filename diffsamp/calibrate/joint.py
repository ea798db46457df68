"""Everything together: noise levels, DC-Solver's ratios, DualFast's constants, then the whole table at once.

Stages, each guarded on the calibration points (what does not help is dropped):

1.  grid: the base solver's noise levels (:mod:`.grid`);
2.  dualfast and dc on that grid: ratios alone, and constants with ratios on top, whichever is better;
3.  table: levels, the times told to the network and all weights of its outputs together, by Gauss-Newton from there
    (:mod:`.table` says what is known of this family). Newest weights follow from the point-mass invariant, and at most
    ``table.MEMORY`` outputs behind the newest are free.

4.  distance, where an extractor is named: the numbers of the table refined for the Fréchet distance of its pictures
    beside the error (:mod:`.pictures`).

Stages 1, 3 and 4 are this project's, not the papers'.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from .. import engine
from ..errors import DiffsampError
from ..grids import Grid
from ..plan import Plan
from ..registry import solver as by_name
from ..solvers.dc import dc
from ..solvers.dualfast import dualfast
from .artifact import Artifact, Setting
from .gauss_newton import gauss_newton
from .grid import search_grid
from .model import CALIBRATION_SEED, Model
from .pictures import refine_settings, unrefined, wish
from .reference import Denoiser, Reference
from .run import Found, Progress, calibrate
from .search import mse, search_constants, search_ratios
from .table import TableFit, pack, plan_of

# Points of the ratio and constant searches, as the papers advise; the guard of each stage uses all points.
SEARCH_POINTS = 10


def search_all(
    plan: Plan,
    solver: str,
    denoiser: Denoiser,
    few: Denoiser,
    x: torch.Tensor,
    goal: torch.Tensor,
    *,
    k: int = 2,
    tau: str | int = "first",
    prediction: str = "sample",
    evaluations: int = 8,
    rounds: int = 3,
    reference_steps: int = 60,
) -> Found:
    """All stages for one setting.

    Args:
        plan: the base on the named grid.
        solver: its registry name.
        denoiser, few: guided already, for all points and for the first ``SEARCH_POINTS`` of them.
        x, goal: start and final states of the points, (points, ...).
        k, tau: of DC-Solver and DualFast.
        evaluations: network calls per searched ratio or constant, at most.
        rounds: of each Gauss-Newton search, at most.
        reference_steps: of the fine run that the ratios are searched against, on the chosen levels.
    """
    process, build = plan.process, by_name(solver)

    def error(candidate: Plan) -> float:
        return mse(engine.sample(candidate, denoiser, x, prediction=prediction), goal)

    chosen, before, best, calls = search_grid(
        build, plan.grid, denoiser, x, goal, prediction=prediction, rounds=rounds
    )
    stages = [] if chosen is plan.grid else ["grid"]
    base = build(process, chosen)
    part = x[:SEARCH_POINTS]
    fine = Reference(process, chosen.levels, few, part, steps=reference_steps, prediction=prediction)
    calls += fine.calls
    options = {"k": k, "prediction": prediction, "evaluations": evaluations}
    constants = search_constants(base, fine, few, part, tau=tau, prediction=prediction, evaluations=evaluations)
    alone = search_ratios(base, fine, few, part, **options)
    calls += constants.calls + alone.calls
    tried: list[tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]] = [
        (("dc",), alone.values, ()), (("dualfast",), (), constants.values)
    ]  # fmt: skip
    if any(constants.values):
        both = search_ratios(dualfast(base, c=constants.values, tau=tau), fine, few, part, **options)
        calls += both.calls
        tried.append((("dualfast", "dc"), both.values, constants.values))

    def rule(ratios: tuple[float, ...], c: tuple[float, ...]) -> Callable[[Grid], Plan]:
        def rebuild(grid: Grid) -> Plan:
            made = build(process, grid)
            made = dualfast(made, c=c, tau=tau) if c else made
            return dc(made, ratios=ratios, k=k) if ratios else made

        return rebuild

    rebuild, kept = rule((), ()), ()
    for names, ratios, c in tried:
        candidate = rule(ratios, c)
        value = error(candidate(chosen))
        calls += plan.nfe
        if value < best:
            best, rebuild, kept = value, candidate, names
    stages += kept
    table = TableFit(chosen, rebuild)
    fit = gauss_newton(
        table.plan, table.start, denoiser, x, goal, prediction=prediction, rounds=rounds, largest=0.5
    )
    calls += fit.calls
    found = table.parts(fit.values if fit.after < best else table.start)
    if fit.after < best:
        best, stages = fit.after, [*stages, "table"]
    assert found is not None
    return Found(pack(*found), before, best, "+".join(stages) or "base", calls, lambda: plan_of(*found))


def calibrate_all(
    model: Model,
    *,
    nfe: Sequence[int],
    guidance_scale: Sequence[float],
    solver: str = "unipc",
    out: str | os.PathLike[str] | None = None,
    grid: str = "linspace",
    final: str = "zero",
    k: int = 2,
    tau: str | int = "first",
    points: int = 48,
    held_out: int = 32,
    reference_steps: int = 200,
    evaluations: int = 8,
    rounds: int = 3,
    extractor: str | None = None,
    reference: str = "embedded",
    feature_weights: str | os.PathLike[str] | None = None,
    pictures: int = 1024,
    weight: float = 1.0,
    bound: float = 1.25,
    progress: Progress | None = None,
) -> Artifact:
    """Levels, times and weights for every (nfe, guidance scale); continues ``out`` where it exists.

    See :func:`search_all`; ``points`` to ``rounds`` are its own. The rest is stage 4, made only with an ``extractor``
    and on top of settings that are there already.

    Args:
        extractor: a name of :mod:`diffsamp.metrics.extractors`.
        reference: the real pictures or their statistics, as of ``diffsamp bench``; "embedded" is the training split.
        feature_weights: file of the extractor's weights, where it needs one.
        pictures: how many a distance is made of; their seeds are used for nothing else.
        weight: of the distance against the error, each in units of its start.
        bound: how far the error may rise, on the points and on held-out noises, as a factor.

    Raises:
        DiffsampError: ``out`` holds what was made with other options; numbers out of range; unknown names.
    """
    wanted = None if extractor is None else wish(
        model, extractor, reference=reference, feature_weights=feature_weights, pictures=pictures, weight=weight,
        bound=bound, held_out=held_out,
    )  # fmt: skip
    artifact: Artifact | None = None
    _, labels = model.points(range(CALIBRATION_SEED, CALIBRATION_SEED + min(points, SEARCH_POINTS)))
    stages = 1 if wanted is None else 2
    total = stages * len(guidance_scale) * len(nfe)
    for index, scale in enumerate(guidance_scale):
        few = model.guided(labels, scale)
        begun = stages * index * len(nfe)

        def search(
            plan: Plan, reference: Reference, denoiser: Denoiser, x: torch.Tensor, prediction: str, few: Denoiser = few
        ) -> Found:
            return search_all(
                plan, solver, denoiser, few, x, reference.at(plan.last_level), k=k, tau=tau, prediction=prediction,
                evaluations=evaluations, rounds=rounds, reference_steps=min(reference_steps, 60),
            )  # fmt: skip

        def report(what: str, done: int, _: int, begun: int = begun) -> None:
            if progress is not None:
                progress(what, begun + done, total)

        part = calibrate(
            "all", model, search, solver=solver, nfe=nfe, guidance_scale=[scale], out=out, grid_name=grid, final=final,
            options={"k": k, "tau": tau, "rounds": rounds}, points=points, held_out=held_out,
            reference_steps=reference_steps, progress=report,
        )  # fmt: skip
        if wanted is not None:
            todo = unrefined(part, wanted, nfe, scale)
            finished = begun + 2 * len(nfe) - len(todo)

            def refined(setting: Setting, what: str, done: bool, scale: float = scale) -> None:
                nonlocal finished
                finished += done
                if progress is not None:
                    progress(f"{setting.nfe} calls, guidance {scale:g}, {what}", finished, total)

            refine_settings(
                part, model, wanted, todo, scale, held_out=held_out, reference_steps=reference_steps, out=out,
                report=refined,
            )  # fmt: skip
        if artifact is None:
            artifact = part
        for setting in part.settings.values():
            artifact.add(setting)
    if artifact is None:
        raise DiffsampError("guidance_scale: got none; needs at least one")
    return artifact
