"""Teleportation in a class-conditional pipeline: runs start at the level of the statistics, by its closed form.

The pipeline's class is extended, not its code changed: the start noise is drawn as before, moved in closed form to the
lowest level of the scheduler's grid that the statistics allow, and the run goes on with the tail of that grid.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ..errors import DiffsampError

_ATTRIBUTE = "_diffsamp_teleport"


def attach(pipe: Any, stats: Any) -> Any:
    """Let a pipeline's runs start where the statistics say; the pipeline is returned.

    Args:
        pipe: a class-conditional pipeline whose scheduler is one of diffsamp's.
        stats: :class:`diffsamp.teleport.Statistics`, or the file that holds them. Their ``start`` must be set.

    Raises:
        DiffsampError: a pipeline of another kind, another scheduler, or statistics without a start.
    """
    from ..models.pipeline import ClassConditionalPipeline
    from ..teleport import Statistics, load

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
    if not isinstance(pipe, ClassConditionalPipeline):
        raise DiffsampError(
            f"teleport: {type(pipe).__name__} is not class-conditional; move the latents by diffsamp.teleport.teleport and "  # noqa: E501
            "pass them with the tail of the timesteps"
        )
    detach(pipe)
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

    object.__setattr__(pipe, _ATTRIBUTE, kind)
    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    return pipe


def detach(pipe: Any) -> None:
    """Give the pipeline its own start back."""
    kind = pipe.__dict__.pop(_ATTRIBUTE, None)
    if kind is not None:
        pipe.__class__ = kind


def _call(
    kind: Any, pipe: Any, stats: Any, class_labels: Any, guidance_scale: float | None, steps: int | None, copies: int,
    generator: Any, latents: Any, others: dict[str, Any],
) -> Any:  # fmt: skip
    from ..teleport import start_grid, teleport
    from .diffusers import PlanScheduler

    if not isinstance(pipe.scheduler, PlanScheduler):
        raise DiffsampError(
            f"teleport: the scheduler is {type(pipe.scheduler).__name__}; give the pipeline one of diffsamp's, as in "
            "diffsamp.use(pipe, 'unipc', teleport=...)"
        )
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
    if top.noise_to_signal > low.noise_to_signal:
        guided = scale if wanted is not None else 1.0
        moved = teleport(stats, noise * top.sigma, top, low, labels=wanted, guidance_scale=guided)
    else:
        moved = noise * top.sigma
    return kind.__call__(
        pipe, class_labels=class_labels, guidance_scale=guidance_scale, num_images_per_prompt=copies,
        generator=generator, latents=moved / pipe.scheduler.init_noise_sigma,
        timesteps=[level.t for level in tail.levels[:-1]], **others,
    )  # fmt: skip
