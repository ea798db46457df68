"""Guidance for callers that speak k-diffusion: denoised predictions and a noise level sigma (x = x0 + sigma·noise).

    D = GuidedDenoiser(model, "apg:7.5", cond=dict(cond=c), uncond=dict(cond=u))     # k-diffusion: D(x, sigma) -> x0
    model.set_model_sampler_cfg_function(comfy_cfg_function("apg:7.5"))              # ComfyUI

State is the object's: one GuidedDenoiser per run, or ``reset()`` between runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..guidance import Guidance, parse
from ..guidance.base import GuidanceState
from ..process import Level


class DenoisedGuidance:
    """``(cond_denoised, uncond_denoised, x, sigma) -> denoised``, with its state.

    Args:
        guidance: ``"apg:7.5"`` or a guidance object.
        steps: evaluations of the run, where a method needs them (``start``, ``stop``).

    The state starts afresh on :meth:`reset`, where sigma rises, and where shape, dtype or device change. A run that
    begins below the sigma at which another was given up cannot be told from its continuation: reset there.
    """

    def __init__(self, guidance: str | Guidance, *, steps: int | None = None, **options: Any) -> None:
        self.guidance = parse(guidance, **options)
        self.steps = steps
        self.reset()

    def reset(self) -> None:
        """Start a new run."""
        self.state: GuidanceState | None = None
        self._last: tuple | None = None

    def __call__(
        self,
        cond_denoised: torch.Tensor,
        uncond_denoised: torch.Tensor,
        x: torch.Tensor,
        sigma: float | torch.Tensor,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        """The guided x0; ``guidance_scale`` is used where the guidance has none of its own."""
        level = float(sigma.flatten()[0]) if isinstance(sigma, torch.Tensor) else float(sigma)
        signature = (cond_denoised.shape, cond_denoised.dtype, cond_denoised.device)
        if self._last is not None and (self._last[1] != signature or level > self._last[0]):
            self.reset()
        if self.state is None:
            self.state = self.guidance.init(cond_denoised.shape[0], self.steps)
        self._last = (level, signature)
        guidance = self.guidance
        if guidance.guidance_scale is None and guidance_scale is not None:
            guidance = guidance.with_scale(float(guidance_scale))
        out, self.state = guidance(self.state, cond_denoised, uncond_denoised, x, Level(level, 1.0, level))
        return out


class GuidedDenoiser:
    """A k-diffusion denoiser D(x, sigma, **extra) -> x0 out of one called with and without the condition.

    Args:
        model: ``model(x, sigma, **kwargs) -> x0``.
        guidance: ``"apg:7.5"`` or a guidance object.
        cond, uncond: keyword arguments of the two calls.
    """

    def __init__(
        self, model: Callable[..., torch.Tensor], guidance: str | Guidance, *, cond: dict, uncond: dict, **options: Any
    ) -> None:
        self.model, self.cond, self.uncond = model, cond, uncond
        self.combine = DenoisedGuidance(guidance, **options)

    def reset(self) -> None:
        """Start a new run."""
        self.combine.reset()

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        cond = self.model(x, sigma, **self.cond, **extra)
        return self.combine(cond, self.model(x, sigma, **self.uncond, **extra), x, sigma)


def comfy_cfg_function(guidance: str | Guidance, **options: Any) -> Callable[[dict[str, Any]], torch.Tensor]:
    """A function for ComfyUI's ``set_model_sampler_cfg_function``.

    It is given ``cond_denoised``, ``uncond_denoised``, ``input``, ``sigma`` and ``cond_scale`` and returns x − x0. A
    run that begins is recognised by ``sample_sigmas[0]`` in ``model_options``, where present.
    """
    combine = DenoisedGuidance(guidance, **options)

    def cfg_function(args: dict[str, Any]) -> torch.Tensor:
        x, sigma = args["input"], args["sigma"]
        schedule = args.get("model_options", {}).get("transformer_options", {}).get("sample_sigmas")
        if schedule is not None and float(sigma.flatten()[0]) == float(schedule[0]):
            combine.reset()
        return x - combine(args["cond_denoised"], args["uncond_denoised"], x, sigma, args.get("cond_scale"))

    return cfg_function
