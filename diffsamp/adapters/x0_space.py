"""One guided prediction in a network's own space: to x0, through a guidance, and back."""

from __future__ import annotations

import torch

from ..errors import DiffsampError
from ..guidance import Guidance
from ..guidance.base import GuidanceState
from ..guidance.cfg import cfg
from ..guidance.space import SIGMA_FLOOR
from .current_level import Here


def guided_prediction(
    guidance: Guidance, state: GuidanceState, cond: torch.Tensor, uncond: torch.Tensor, x: torch.Tensor, here: Here
) -> tuple[torch.Tensor, GuidanceState]:
    """The guided prediction in the space and dtype of ``cond``, and the next state.

    Args:
        guidance: a method of two predictions, with its scale.
        state: its state.
        cond, uncond: raw predictions, shape (batch, ...).
        x: input of the network, same shape.
        here: its level, with x0 = p·x + q·prediction.

    A method that is linear in the predictions is applied to them as they are. Where the prediction does not determine
    x0, or sigma is so small that the way back divides by almost nothing, plain CFG takes its place.
    """
    if guidance.linear:
        return guidance(state, cond, uncond, x, here.level)
    if here.p is None or here.q is None or here.level.sigma < SIGMA_FLOOR:
        return cfg(cond, uncond, guidance.guidance_scale or 1.0), state.advance(state.buffer)
    wide = torch.promote_types(cond.dtype, torch.float32)
    c, noisy = cond.to(wide), x.to(wide) * here.p
    c0, u0 = torch.add(noisy, c, alpha=here.q), torch.add(noisy, uncond.to(wide), alpha=here.q)
    x0, after = guidance(state, c0, u0, x.to(wide), here.level)
    # Only the difference to the conditional x0 goes back, so that w = 1 gives the conditional prediction exactly.
    return torch.add(c, x0 - c0, alpha=1.0 / here.q).to(cond.dtype), after


def noisy_part(x: torch.Tensor, prediction: torch.Tensor, name: str) -> tuple[torch.Tensor, int]:
    """The part of a network's input that is being denoised, and how many predicted channels answer to it."""
    a, b = list(x.shape), list(prediction.shape)
    if a == b:
        return x, b[1]
    if len(a) == len(b) and len(a) > 3 and a[0] == b[0] and a[2:] == b[2:]:
        # More channels in: a mask or an image after the latents. More out: a predicted variance after the mean.
        return x[:, : b[1]], min(a[1], b[1])
    raise DiffsampError(f"guidance: {name} denoises a tensor of {tuple(a)} and predicts {tuple(b)}; not supported")


def denoiser_input(args: tuple, kwargs: dict) -> torch.Tensor:
    """The noisy sample among the arguments of a diffusers model."""
    for name in ("hidden_states", "sample"):
        if isinstance(kwargs.get(name), torch.Tensor):
            return kwargs[name]
    if args and isinstance(args[0], torch.Tensor):
        return args[0]
    raise DiffsampError("guidance: the denoiser's input is not one tensor (hidden_states or sample)")


def denoiser_timestep(args: tuple, kwargs: dict):
    """The timestep among the arguments of a diffusers model."""
    if "timestep" in kwargs:
        return kwargs["timestep"]
    if len(args) > 1:
        return args[1]
    raise DiffsampError("guidance: the denoiser is not told a timestep, so the noise level is unknown")
