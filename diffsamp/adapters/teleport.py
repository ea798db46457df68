"""Teleportation in diffusers pipelines: runs start at the level of the statistics, by its closed form.

Nothing in a pipeline's code is changed. What is done depends on what the pipeline is asked for:

-   *Class-conditional pipelines of this package*: the start noise is moved by the class's Gaussian or, under guidance,
    by the guided ODE; no network call (:func:`_call`).
-   *Unconditional pipelines*: the scheduler's grid becomes its own tail; the first network input and the first sample
    are moved in closed form; no network call.
-   *Pipelines with a condition without statistics (text)*: the network is called once at the top, guided as the run is;
    the mean that it shows takes the place of the data's, and the run goes on at the tail with an empty history. The
    unconditional Gaussian is no better than white noise there and is refused unless forced.
"""

from __future__ import annotations

import inspect
import os
import warnings
from functools import wraps
from typing import Any

import torch

from ..errors import DiffsampError
from ..grids import Grid
from ..process import Level
from ..teleport import Statistics, load, start_grid
from ..teleport import teleport as move
from .diffusers import PlanScheduler, PlanSchedulerOutput

_ATTRIBUTE = "_diffsamp_teleport"


class _Teleporting:
    """What a scheduler gains: its grid is cut at the start of the statistics, and the first sample is moved there."""

    _statistics: Statistics
    _one_call: bool
    _top: Level | None = None  # where the pipeline's noise lives, while it has not been moved yet

    @wraps(PlanScheduler.set_timesteps)  # pipelines look at its parameters
    def set_timesteps(self: Any, *arguments: Any, **options: Any) -> None:
        super().set_timesteps(*arguments, **options)  # type: ignore[misc]
        if self._top is not None and self._one_call:
            rest, tail = self.plan.rows[1:], self._plan_from(1).rows
            if [row.level.noise_to_signal for row in rest] != [row.level.noise_to_signal for row in tail]:
                raise DiffsampError(
                    f"teleport: {self.solver.name} calls the network more than once in a step, so the call at the top "
                    "is no step of its own; accepted with a condition: solvers with one call per step"
                )

    def _cut(self, grid: Grid) -> Grid:
        assert self._statistics.start is not None
        tail = start_grid(grid, self._statistics.start)
        if len(tail) == len(grid):
            _say_nothing_is_cut(self._statistics)
            self._top = None
            return grid
        self._top = grid.levels[0]
        levels = (self._top, *tail.levels) if self._one_call else tail.levels
        return Grid(grid.process, levels, grid.name)

    def _grid_of(self, *arguments: Any) -> Grid:
        return self._cut(super()._grid_of(*arguments))  # type: ignore[misc]

    def _flow_grid(self, *arguments: Any) -> Grid:
        return self._cut(super()._flow_grid(*arguments))  # type: ignore[misc]

    def moved(self: Any, sample: torch.Tensor) -> torch.Tensor:
        """The pipeline's start noise, in closed form at the first level of the grid."""
        x = sample * (self._top.sigma / self.init_noise_sigma)
        return move(self._statistics, x, self._top, self._grid.levels[0])

    def first_input(self: Any, given: torch.Tensor) -> torch.Tensor:
        """What the network is to see in place of ``given``, the (scaled) start noise, in its first call of a run."""
        if self._top is None or self._one_call:
            return given
        # The scale of the input is the one of the grid's first level already.
        one = torch.ones((), dtype=torch.float64)
        scale = float(self.scale_model_input(one, self.timesteps[0]))
        return self.moved(given.float() / scale).mul(scale).to(given.dtype)

    def step(self: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *arguments: Any,
             return_dict: bool = True, **options: Any) -> PlanSchedulerOutput | tuple[torch.Tensor]:  # fmt: skip
        """A step of the solver; the first one of a run teleports."""
        top, self._top = self._top, None
        plain = super().step  # type: ignore[misc]
        if top is None:
            return plain(model_output, timestep, sample, *arguments, return_dict=return_dict, **options)
        if not self._one_call:
            self._top = top
            start = self.moved(sample)
            self._top = None
            return plain(model_output, timestep, start, *arguments, return_dict=return_dict, **options)
        wide = sample if sample.dtype == torch.float64 else sample.float()
        denoised = plain(model_output, timestep, wide, *arguments, **options).pred_original_sample
        following = move(self._statistics, wide, top, self._grid.levels[1], denoised=denoised).to(sample.dtype)
        # The next step begins a run of its own there: no history.
        self._state = self._returned = None
        self._step_index = 1
        return PlanSchedulerOutput(following, denoised.to(sample.dtype)) if return_dict else (following,)


def attach(pipe: Any, stats: Any, *, one_call: bool | None = None, force: bool = False) -> Any:
    """Let a pipeline's runs start where the statistics say; the pipeline is returned.

    Args:
        pipe: a pipeline that starts from white noise, with one of diffsamp's schedulers.
        stats: :class:`diffsamp.teleport.Statistics`, or the file that holds them, of what the scheduler steps on
            (latents as the network sees them). Their ``start`` must be set.
        one_call: spend one network call at the top to find the mean of what is asked for. None: where the pipeline has
            a condition that the statistics know nothing of.
        force: start a conditional pipeline by the unconditional Gaussian all the same.

    Raises:
        DiffsampError: another scheduler, statistics without a start or of other latents, a pipeline that does not start
            from noise, or the unconditional Gaussian for a pipeline with a condition.
    """
    from ..models.pipeline import ClassConditionalPipeline

    if isinstance(stats, (str, os.PathLike)):
        stats = load(stats)
    if not isinstance(stats, Statistics):
        raise DiffsampError(
            f"teleport: got {type(stats).__name__}; accepted: Statistics, or a .safetensors file of them"
        )
    if stats.start is None:
        raise DiffsampError(
            "teleport: the statistics name no level to start at; set it by diffsamp.teleport.choose_start"
        )
    _need_our_scheduler(pipe)
    detach(pipe)
    if isinstance(pipe, ClassConditionalPipeline) and stats.class_means is not None:
        _extend_class_conditional(pipe, stats)
        return pipe
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in ("image", "strength", "mask_image", "video"):
        if name in parameters:
            raise DiffsampError(
                f"teleport: {type(pipe).__name__} takes {name!r} and does not start from white noise; "
                "accepted: pipelines that do"
            )
    _check_latents(pipe, stats)
    conditioned = any(name in parameters for name in ("prompt", "class_labels", "prompt_embeds"))
    if one_call is None:
        one_call = conditioned and not force
    if conditioned and not one_call:
        problem = "the unconditional Gaussian is no better than white noise for guided or conditional runs"
        if not force:
            raise DiffsampError(
                f"one_call: got False for {type(pipe).__name__}; {problem}; accepted: True, or force=True"
            )
        warnings.warn(f"teleport: {problem}", stacklevel=2)
    scheduler = pipe.scheduler
    kind = type(scheduler)
    scheduler.__class__ = type(kind.__name__, (_Teleporting, kind), {"__module__": kind.__module__})
    scheduler._statistics, scheduler._one_call, scheduler._top = stats, one_call, None
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if network is None:
        raise DiffsampError(f"teleport: {type(pipe).__name__} has neither unet nor transformer")
    hook = network.register_forward_pre_hook(lambda _, given, named: _first_input(pipe, given, named), with_kwargs=True)

    def undo() -> None:
        hook.remove()
        scheduler.__class__ = kind

    object.__setattr__(pipe, _ATTRIBUTE, undo)
    return pipe


def detach(pipe: Any) -> None:
    """Give the pipeline its own start back."""
    undo = pipe.__dict__.pop(_ATTRIBUTE, None)
    if undo is not None:
        undo()


def _need_our_scheduler(pipe: Any) -> None:
    if not isinstance(pipe.scheduler, PlanScheduler):
        raise DiffsampError(
            f"teleport: the scheduler is {type(pipe.scheduler).__name__}; give the pipeline one of diffsamp's, as in "
            "diffsamp.use(pipe, 'unipc', teleport=...)"
        )


def _say_nothing_is_cut(stats: Statistics) -> None:
    warnings.warn(
        f"teleport: this grid has no level but the first at or above sigma/alpha {stats.start:.3g}, where the "
        "statistics hold; the run is the plain one", stacklevel=2,
    )  # fmt: skip


def _check_latents(pipe: Any, stats: Statistics) -> None:
    """Statistics keyed by a scaling must be of this pipeline's."""
    config = getattr(getattr(pipe, "vae", None), "config", None)
    for name in ("scaling_factor", "shift_factor"):
        if name in stats.key and config is not None:
            stats.check_key(**{name: getattr(config, name, None)})


def _first_input(pipe: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    scheduler = pipe.scheduler
    if not isinstance(scheduler, _Teleporting):
        return given, named
    if given:
        return (scheduler.first_input(given[0]), *given[1:]), named
    name = next(key for key in ("sample", "hidden_states") if key in named)
    return given, {**named, name: scheduler.first_input(named[name])}


# -- class-conditional pipelines of this package ---------------------------------------------------------------------


def _extend_class_conditional(pipe: Any, stats: Statistics) -> None:
    kind = type(pipe)

    def call(self: Any, class_labels: Any = None, guidance_scale: float | None = None,
             num_inference_steps: int | None = None, num_images_per_prompt: int = 1, generator: Any = None,
             latents: Any = None, timesteps: Any = None, sigmas: Any = None, **others: Any) -> Any:  # fmt: skip
        if timesteps is not None or sigmas is not None:
            raise DiffsampError("timesteps, sigmas: are set by the teleport; accepted with it: num_inference_steps")
        return _call(
            kind, self, stats, class_labels, guidance_scale, num_inference_steps, num_images_per_prompt, generator,
            latents, others,
        )  # fmt: skip

    def undo() -> None:
        pipe.__class__ = kind

    object.__setattr__(pipe, _ATTRIBUTE, undo)
    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _call(
    kind: Any, pipe: Any, stats: Any, class_labels: Any, guidance_scale: float | None, steps: int | None, copies: int,
    generator: Any, latents: Any, others: dict[str, Any],
) -> Any:  # fmt: skip
    _need_our_scheduler(pipe)
    scale = pipe.config.default_guidance_scale if guidance_scale is None else float(guidance_scale)
    several = isinstance(class_labels, list | tuple | torch.Tensor)
    wanted = None
    if class_labels is not None:
        names = class_labels.flatten().tolist() if isinstance(class_labels, torch.Tensor) else class_labels
        wanted = torch.tensor([pipe.class_id(one) for one in (names if several else [names])]).repeat_interleave(copies)
    count = copies if wanted is None else len(wanted)
    pipe.scheduler.set_timesteps(steps or pipe.config.default_num_inference_steps)
    grid = pipe.scheduler.plan.grid
    tail = start_grid(grid, stats.start)
    noise = pipe.prepare_latents(count, generator, latents, "cpu", torch.float32) / pipe.scheduler.init_noise_sigma
    top, low = grid.levels[0], tail.levels[0]
    if len(tail) == len(grid):
        _say_nothing_is_cut(stats)
    if top.noise_to_signal > low.noise_to_signal:
        guided = scale if wanted is not None else 1.0
        moved = move(stats, noise * top.sigma, top, low, labels=wanted, guidance_scale=guided)
    else:
        moved = noise * top.sigma
    return kind.__call__(
        pipe, class_labels=class_labels, guidance_scale=guidance_scale, num_images_per_prompt=copies,
        generator=generator, latents=moved / pipe.scheduler.init_noise_sigma,
        timesteps=[level.t for level in tail.levels[:-1]], **others,
    )  # fmt: skip
