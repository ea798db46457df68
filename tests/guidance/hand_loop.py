"""A pipeline's denoising loop written out by hand, with diffusers' own APG function on x0.

What the denoiser is told at each step is recorded from a plain run; levels come from ``alphas_cumprod[t]`` or t/1000,
not from the places that the code under test reads.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from guided_pipelines import run


def record(pipe: Any, call: dict[str, Any], **options: Any) -> tuple[list[tuple], Any, torch.Tensor]:
    """(calls of the denoiser, the scheduler as it stood at the first, latents) of a plain run."""
    calls: list[tuple] = []
    kept: list[Any] = []
    model = getattr(pipe, "unet", None) or pipe.transformer

    def watch(module, args, kwargs):
        if not kept:
            kept.append(copy.deepcopy(pipe.scheduler))
        calls.append((args, dict(kwargs)))

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    latents = run(pipe, call, **options)
    handle.remove()
    return calls, kept[0], latents


def hand_loop(pipe: Any, call: dict[str, Any], *, scale: float, eta: float, norm: float, momentum: float,
              two_calls: bool) -> torch.Tensor:  # fmt: skip
    """Latents of a run under adaptive projected guidance."""
    calls, scheduler, _ = record(pipe, call)
    model = getattr(pipe, "unet", None) or pipe.transformer
    flow = "FlowMatch" in type(scheduler).__name__
    per_step = 2 if two_calls else 1
    first = _input(calls[0])
    latents = first if two_calls else first.chunk(2)[0]
    if not flow:
        # Undo the input scaling of the first call.
        t = int(scheduler.timesteps[0])
        scaled = scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])
        latents = latents / scaled
    buffer, kept = MomentumBuffer(momentum), 0
    for i, t in enumerate(scheduler.timesteps):
        x = latents if flow else scheduler.scale_model_input(latents, t)
        outputs = []
        for args, kwargs in calls[per_step * i : per_step * (i + 1)]:
            args, kwargs = _with_input(args, kwargs, x if two_calls else torch.cat([x, x]))
            with torch.no_grad():
                outputs.append(model(*args, **kwargs)[0])
        cond, uncond = outputs if two_calls else reversed(outputs[0].chunk(2))
        cond, uncond = cond[:, : x.shape[1]], uncond[:, : x.shape[1]]
        if flow:
            alpha, sigma = 1.0, float(t) / 1000.0  # x0 = x - sigma·v
        else:
            bar = float(scheduler.alphas_cumprod[int(t)])
            alpha, sigma = bar**0.5, (1 - bar) ** 0.5
        c0, u0 = (x - sigma * cond) / alpha, (x - sigma * uncond) / alpha
        midway = getattr(scheduler, "state_in_first_order", True) is False
        before = buffer.running_average
        if midway:
            buffer.running_average = kept  # a later stage starts from the same memory as the first
        kept = buffer.running_average
        x0 = normalized_guidance(c0, u0, scale - 1, buffer, eta, norm, use_original_formulation=True)
        if midway:
            buffer.running_average = before
        guided = (x - alpha * x0) / sigma
        latents = scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


def _input(call: tuple) -> torch.Tensor:
    args, kwargs = call
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _with_input(args: tuple, kwargs: dict, x: torch.Tensor) -> tuple[tuple, dict]:
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": x, "return_dict": False}
    return (x, *args[1:]), {**kwargs, "return_dict": False}
