"""Where to start: the teleported sample, the grid below it, and the rule that picks the level.

Rule: run the production solver on a few noises; at each of its levels compare the distance of the teleported state to
the solver's with the error that the whole run has at its end (n against 2n steps); take the lowest level where it is no
larger. Refused below 5 standard deviations of the data (fidelity to the same run) or 3.5 (same distribution).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import engine
from ..errors import DiffsampError
from ..grids import Grid
from ..plan import Plan
from ..process import Level, Process
from .guided import guided_map, one_call_map
from .maps import gaussian_map
from .statistics import Statistics

FIDELITY, DISTRIBUTION = 5.0, 3.5
RULE_NOISES = 16


@dataclass(frozen=True)
class Choice:
    """What the rule found: the level, its index in the grid, and per level (ratio, distance, solver's error)."""

    level: Level
    index: int
    table: tuple[tuple[float, float, float], ...]


def teleport(
    stats: Statistics,
    x: torch.Tensor,
    s: Level,
    t: Level,
    *,
    labels: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    denoised: torch.Tensor | None = None,
    force: bool = False,
) -> torch.Tensor:
    """The state at ``t`` from the start ``x`` at ``s``: the best map for what is known.

    Args:
        labels: class of each sample; with class statistics the class Gaussian, or the guided ODE, is used.
        guidance_scale: of the run that follows.
        denoised: one guided x0 prediction at (x, s), for guided models without class statistics.
        force: use the unconditional Gaussian with guidance all the same; it is no better than white noise.

    Raises:
        DiffsampError: guidance with neither class statistics nor a prediction, unless forced.
    """
    if t.noise_to_signal >= s.noise_to_signal:
        raise DiffsampError(f"t: sigma/alpha {t.noise_to_signal:.4g} is not below the start's {s.noise_to_signal:.4g}")
    classes = labels is not None and stats.class_means is not None
    if denoised is not None:
        return one_call_map(stats, x, denoised, s, t)
    if guidance_scale > 1.0 and classes:
        assert labels is not None
        return guided_map(stats, x, s, t, labels, guidance_scale)
    if guidance_scale > 1.0:
        if not force:
            raise DiffsampError(
                f"guidance_scale: got {guidance_scale:g}; the unconditional Gaussian is no better than white noise with "  # noqa: E501
                "guidance; give class statistics and labels, or one guided prediction (denoised=), or force=True"
            )
        warnings.warn("teleport: the unconditional Gaussian under guidance is no better than white noise", stacklevel=2)
    if classes:
        assert labels is not None
        return gaussian_map(stats.of_class(labels), x, s, t)
    return gaussian_map(stats, x, s, t)


def start_grid(grid: Grid, start: float) -> Grid:
    """The tail of ``grid`` that begins at the lowest of its levels with sigma/alpha of ``start`` or above."""
    chosen = [i for i, level in enumerate(grid.levels[:-1]) if level.noise_to_signal >= start * (1 - 1e-9)]
    if not chosen:
        raise DiffsampError(f"start: {start:.4g} is above the grid's first level {grid.levels[0].noise_to_signal:.4g}")
    return grid.after(chosen[-1])


def choose_start(
    stats: Statistics,
    solver: Callable[[Process, Grid], Plan],
    grid: Grid,
    denoiser: Callable[[torch.Tensor, Level], torch.Tensor],
    x: torch.Tensor,
    *,
    prediction: str = "sample",
    labels: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    aim: str = "fidelity",
) -> Choice:
    """The lowest level of ``grid`` that the rule allows, measured on the start noises ``x`` (16 serve).

    Args:
        solver: ``(process, grid) -> plan``, such as ``diffsamp.solver("unipc")``; with one call per step.
        denoiser: guided already.
        aim: ``fidelity`` (the same picture) or ``distribution`` (pictures of the same law).

    Raises:
        DiffsampError: no level qualifies.
    """
    if aim not in ("fidelity", "distribution"):
        raise DiffsampError(f"aim: got {aim!r}; accepted: fidelity, distribution")
    limit = (FIDELITY if aim == "fidelity" else DISTRIBUTION) * stats.std
    from ..calibrate.reference import refined

    fine = refined(grid.process, grid.levels, 2 * len(grid))

    def states(over: Grid) -> dict[float, torch.Tensor]:
        plan = solver(grid.process, over)
        kept: dict[float, torch.Tensor] = {}

        def visit(i: int, state: engine.State) -> None:
            row = plan.rows[i]
            for level, value in ((row.next_level, state.input), (row.base_level, state.base)):
                assert level is not None
                kept[round(level.lambda_, 9)] = value

        with torch.no_grad():
            engine.sample(plan, denoiser, x, prediction=prediction, callback=visit)
        return kept

    coarse, better = states(grid), states(fine)

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).double().square().flatten(1).mean(1).median())

    end = round(grid.levels[-1].lambda_, 9)
    error = distance(coarse[end], better[end])
    found, table = None, []
    for i, level in enumerate(grid.levels[1:-1], start=1):
        moved = teleport(stats, x, grid.levels[0], level, labels=labels, guidance_scale=guidance_scale, force=True)
        gap = distance(moved, better[round(level.lambda_, 9)])
        table.append((level.noise_to_signal, gap, error))
        if gap <= error and level.noise_to_signal >= limit:
            found = (level, i)
    if found is None:
        raise DiffsampError(
            f"start: no level of the grid qualifies for {aim} (it must be {limit:.3g} or above, teleport no worse "
            "than the solver); start at the top, or take more steps there"
        )
    return Choice(*found, tuple(table))


def lowest_starts(
    stats: Statistics, model: Any, scales: Sequence[float], *, tell: Callable[[str], None] = lambda line: None
) -> dict[float, Choice]:
    """:func:`choose_start` by guidance scale, on the paper's grid (18 levels of EDM from sigma 80) with UniPC.

    A scale at which no level qualifies is left out. Without class statistics only scale 1 has a map without network
    calls, so only that is measured.

    Args:
        model: a :class:`diffsamp.calibrate.Model`.
        tell: is given one line for every scale.
    """
    from ..grids import grid
    from ..registry import solver

    noise, labels = model.points(range(RULE_NOISES))
    levels = grid("karras", model.process, 18, sigma_max=min(80.0, model.process.noise_to_signal_range[1]))
    classes = labels if stats.class_means is not None else None
    found = {}
    for scale in scales if classes is not None else [1.0]:
        try:
            found[scale] = choose_start(
                stats, solver("unipc"), levels, model.guided(labels, scale), noise * levels.levels[0].sigma,
                prediction=model.prediction, labels=classes, guidance_scale=scale,
            )  # fmt: skip
        except DiffsampError as error:
            tell(f"guidance {scale:g}: {error}")
        else:
            ratio = found[scale].level.noise_to_signal
            tell(f"guidance {scale:g}: runs can start at sigma/alpha {ratio:.4g}")
    return found
