"""Stock schedulers that visit our levels, so that a pipeline's output can be compared with ours."""

from __future__ import annotations

import importlib
import inspect
from contextlib import ExitStack
from functools import wraps
from typing import Any
from unittest import mock

import diffusers
import tiny_pipelines
import torch

from diffsamp.impulse import _Doubled

STEPS = 4
TOLERANCE = 1e-4


def explicit(config: Any, **changes: Any) -> dict[str, Any]:
    """A config whose values all count as given, so that no class puts its own defaults in their place."""
    return {key: value for key, value in config.items() if not key.startswith("_")} | changes


def in_float64(module: Any) -> ExitStack:
    """A stock scheduler's module with its casts down to float32 undone; noise is drawn in float32, as ours is."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(module, "torch", _Doubled(torch)))
    draw = getattr(module, "randn_tensor", None)
    if draw is not None:
        def drawn(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, **rest: Any) -> Any:
            return draw(shape, generator=generator, device=device, dtype=torch.float32).double()

        stack.enter_context(mock.patch.object(module, "randn_tensor", drawn))
    return stack


def fed(
    stock: type, ours: Any, config: dict[str, Any], *, precise: bool = False, in_our_scale: bool = False,
    order: int | None = None,
) -> Any:  # fmt: skip
    """A stock scheduler that visits our levels: its step is its own, its grid is ours.

    It also takes the arguments that flow pipelines pass and has ``scale_noise``, which stock multistep schedulers lack.

    Args:
        stock: the class.
        ours: our scheduler; its plan is read when the pipeline sets the steps of the stock one.
        config: of the stock one.
        precise: its step in float64.
        in_our_scale: the Euler family keeps x/alpha; turn the pipeline's sample into that and back, and a flow's
            velocity into epsilon.
        order: of IPNDMScheduler, which knows only 4: how many outputs it remembers.
    """
    levels = [row.level for row in ours.plan.rows] + [ours.plan.last_level]
    flow = ours.plan.process.kind == "flow"
    ipndm = stock.__name__.startswith("IPNDM")
    euler_ratios = flow and in_our_scale
    values = torch.tensor(
        [v.sigma if flow and not euler_ratios else v.noise_to_signal for v in levels], dtype=torch.float64
    )
    inverted = flow and ours.config["invert_sigmas"]  # the network predicts x0 − epsilon; one stock class knows
    sign = -1 if inverted and stock is not diffusers.FlowMatchEulerDiscreteScheduler else 1
    if inverted and sign == 1:
        values = 1 - values
    if stock.__name__.startswith(("DEIS", "SASolver")):
        values[-1] = 1e-10  # these cannot end at the data itself
    precise = precise or in_our_scale or ipndm
    taken = inspect.signature(stock.step).parameters
    module = importlib.import_module(stock.__module__)
    # The Euler family refuses integers.
    times = ours.timesteps.float() if "Euler" in stock.__name__ else ours.timesteps

    class Fed(stock):  # type: ignore[misc, valid-type]
        def set_timesteps(
            self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None,
            timesteps: Any = None,
        ) -> None:  # fmt: skip
            super().set_timesteps(STEPS, device)
            self.timesteps = times.clone()
            self.sigmas = values.clone()
            if ipndm:  # the names that it has for sigma and alpha
                self.betas = torch.tensor([v.sigma for v in levels], dtype=torch.float64)
                self.alphas = torch.tensor([v.alpha for v in levels], dtype=torch.float64)

        def scale_model_input(self, sample: Any, *arguments: Any) -> Any:
            return sample if in_our_scale else super().scale_model_input(sample, *arguments)

        @wraps(stock.step)  # pipelines look for ``generator`` in the signature
        def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            # DDPM and DDIM pipelines pass options that most stock schedulers do not take.
            options = {key: value for key, value in options.items() if key in taken}
            dtype = sample.dtype
            if self.step_index is None:
                self._init_step_index(timestep)
            here, there = levels[self.step_index], levels[self.step_index + 1]
            model_output = sign * model_output
            with in_float64(module) if precise else ExitStack():
                if precise:
                    model_output, sample = model_output.double(), sample.double()
                if flow and (ipndm or in_our_scale):
                    model_output = sample + here.alpha * model_output  # epsilon
                if ipndm and (flow or ours.config["prediction_type"] == "epsilon"):
                    model_output = (model_output - here.sigma * sample) / here.alpha  # the v that it expects
                if ipndm and order is not None:
                    self.ets = self.ets[len(self.ets) - order + 1 :] if len(self.ets) >= order else self.ets
                if in_our_scale:
                    sample = sample / here.alpha
                result = super().step(model_output, timestep, sample, **options)
            factor = there.alpha if in_our_scale else 1.0
            if isinstance(result, tuple):
                return ((factor * result[0]).to(dtype), *result[1:])
            result.prev_sample = (factor * result.prev_sample).to(dtype)
            return result

        def scale_noise(self, sample: Any, timestep: Any, noise: Any) -> Any:
            level = levels[int((times == timestep.flatten()[0]).nonzero()[0])]
            return level.alpha * sample + level.sigma * noise

        def add_noise(self, sample: Any, noise: Any, timesteps: Any) -> Any:
            # IPNDMScheduler and FlowMatchEuler have none, and that of SA-Solver takes no times of a flow.
            if ipndm or flow:
                return self.scale_noise(sample, timesteps, noise)
            return super().add_noise(sample, noise, timesteps)

    Fed.__name__ = stock.__name__
    if in_our_scale:
        Fed.init_noise_sigma = 1.0  # type: ignore[assignment]
    return Fed.from_config(config)


def outputs(tiny: tiny_pipelines.Tiny, scheduler: Any, steps: int = STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the pipeline returns, the last sample that its scheduler gave it) of one run.

    The second is the stricter one where a pipeline clips its pictures.
    """
    step, last = scheduler.step, []

    @wraps(step)
    def watched(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        last[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    scheduler.step = watched
    try:
        tiny.pipe.scheduler = scheduler
        torch.manual_seed(0)  # where a pipeline passes no generator, noise comes from the global one
        result = tiny.run(steps).double()
    finally:
        tiny.pipe.scheduler = tiny.stock
        del scheduler.step
    return result, last[0].double()


def distance(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Largest difference of the pictures and of the last samples, relative where values are above 1."""
    return max(
        float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in zip(found, expected, strict=True)
    )
