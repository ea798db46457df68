"""Where to start: the teleported sample, the grid below it, and the rule that picks the level.

Rule: run the production solver on a few noises, whole and from each of its levels down, teleported there; go down as
long as the run's end is at most ``ALLOWANCE`` times as far from the finer run's (n against 2n steps) as the whole
run's, in squared distance and by the median. Refused below 5 standard deviations of the data (fidelity to the same
run) or 3.5 (same distribution). Ends are compared, not the states at the level: what a miss up there becomes depends on
the process's scale and on the model.
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
RULE_NOISES = 32
LEVELS = 12
# The error of a multistep solver falls by as much when 18 calls become 20; a start that qualifies saves more.
ALLOWANCE = 2.0


@dataclass(frozen=True)
class Choice:
    """What the rule found: the level, its index in the grid, and the levels tried.

    ``table`` holds (sigma/alpha, squared distance of the teleported run's end to the finer run's, that of the whole
    run's end), medians over the noises.
    """

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
    """The lowest level of ``grid`` that the rule allows, measured on the start noises ``x`` (32 serve).

    Args:
        solver: ``(process, grid) -> plan``, such as ``diffsamp.solver("unipc")``.
        denoiser: guided already.
        aim: ``fidelity`` (the same picture) or ``distribution`` (pictures of the same law).

    Raises:
        DiffsampError: no level qualifies.
    """
    if aim not in ("fidelity", "distribution"):
        raise DiffsampError(f"aim: got {aim!r}; accepted: fidelity, distribution")
    limit = (FIDELITY if aim == "fidelity" else DISTRIBUTION) * stats.std
    from ..calibrate.reference import refined

    whole = solver(grid.process, grid)

    def end(plan: Plan, start: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return engine.sample(plan, denoiser, start, prediction=prediction)

    finer = end(solver(grid.process, refined(grid.process, grid.levels, 2 * len(grid))), x)

    def distance(made: torch.Tensor) -> float:
        return float((made - finer).double().square().flatten(1).mean(1).median())

    error = distance(end(whole, x))
    found, table = None, []
    for i, level in enumerate(grid.levels[1:-1], start=1):
        if level.noise_to_signal < limit:
            break
        moved = teleport(stats, x, grid.levels[0], level, labels=labels, guidance_scale=guidance_scale, force=True)
        gap = distance(end(solver(grid.process, grid.after(i)), moved))
        table.append((level.noise_to_signal, gap, error))
        if gap > ALLOWANCE * error:
            break
        found = (level, i)
    if found is None:
        raise DiffsampError(
            f"start: no level of the grid qualifies for {aim} (it must be {limit:.3g} or above, and the run from there "
            f"end at most {ALLOWANCE:g} times as far from a finer one as the whole run); start at the top"
        )
    return Choice(*found, tuple(table))


def lowest_starts(
    stats: Statistics,
    model: Any,
    scales: Sequence[float],
    *,
    levels: int = LEVELS,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[float, Choice]:
    """:func:`choose_start` by guidance scale, on the paper's grid (EDM's levels from sigma 80) with UniPC.

    A scale at which no level qualifies is left out. Without class statistics only scale 1 has a map without network
    calls, so only that is measured.

    Args:
        model: a :class:`diffsamp.calibrate.Model`.
        levels: of the whole grid. The fewer, the larger the error of the whole run and the lower a run may start.
        tell: is given one line for every scale.
    """
    from ..calibrate.model import CALIBRATION_SEED
    from ..grids import grid
    from ..registry import solver

    noise, labels = model.points(range(CALIBRATION_SEED, CALIBRATION_SEED + RULE_NOISES))
    whole = grid("karras", model.process, levels, sigma_max=min(80.0, model.process.noise_to_signal_range[1]))
    classes = labels if stats.class_means is not None else None
    found = {}
    for scale in scales if classes is not None else [1.0]:
        try:
            found[scale] = choose_start(
                stats, solver("unipc"), whole, model.guided(labels, scale), noise * whole.levels[0].sigma,
                prediction=model.prediction, labels=classes, guidance_scale=scale,
            )  # fmt: skip
        except DiffsampError as error:
            tell(f"guidance {scale:g}: {error}")
        else:
            ratio = found[scale].level.noise_to_signal
            tell(f"guidance {scale:g}: runs can start at sigma/alpha {ratio:.4g}")
    return found
