"""A pipeline's output with our solver equals that with the stock scheduler of the same method on the same grid."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch

import diffsamp

STEPS = 4
TOLERANCE = 1e-4
INFO = diffsamp.registry.solvers()
DISCRETE = ("ddim", "ddpm")  # their twins know only timesteps, on the leading grid
LISTED = [name for name, info in INFO.items() if info.twin and name not in (*DISCRETE, "ipndm")]
FLOW_TWINS = {"euler": "FlowMatchEulerDiscreteScheduler", "ddim": "FlowMatchEulerDiscreteScheduler",
              "heun": "FlowMatchHeunDiscreteScheduler"}  # fmt: skip
# The ancestral solvers have no flow form in diffusers, and SA-Solver no twin of its noise there.
FLOW = [name for name in LISTED if not INFO[name].stochastic] + ["ddim", "sde-dpmpp-1", "sde-dpmpp-2m"]


@pytest.fixture(autouse=True, scope="module")
def quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(level)
    torch.set_num_threads(threads)


def fed(stock: type, ours: Any, config: dict[str, Any]) -> Any:
    """A stock scheduler that visits our levels: its step is its own, its grid is ours.

    It also takes the arguments that flow pipelines pass and has ``scale_noise``, which stock multistep schedulers lack.
    """
    levels = [row.level for row in ours.plan.rows] + [ours.plan.last_level]
    flow = ours.plan.process.kind == "flow"
    values = torch.tensor([v.sigma if flow else v.noise_to_signal for v in levels], dtype=torch.float64)
    inverted = flow and ours.config["invert_sigmas"]  # the network predicts x0 − epsilon; one stock class knows
    sign = -1 if inverted and stock is not diffusers.FlowMatchEulerDiscreteScheduler else 1
    if inverted and sign == 1:
        values = 1 - values
    if stock.__name__.startswith(("DEIS", "SASolver")):
        values[-1] = 1e-6  # these cannot end at the data itself
    # Stock DEIS loses the first step of a flow to rounding in float32: coefficients of 1e5 that cancel.
    precise = flow and stock.__name__.startswith("DEIS")
    taken = inspect.signature(stock.step).parameters
    # The Euler family refuses integers.
    times = ours.timesteps.float() if "Euler" in stock.__name__ else ours.timesteps

    class Fed(stock):  # type: ignore[misc, valid-type]
        def set_timesteps(
            self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None,
            timesteps: Any = None,
        ) -> None:  # fmt: skip
            super().set_timesteps(STEPS, device)
            self.sigmas, self.timesteps = values.clone(), times.clone()

        @wraps(stock.step)  # pipelines look for ``generator`` in the signature
        def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            # DDPM and DDIM pipelines pass options that most stock schedulers do not take.
            options = {key: value for key, value in options.items() if key in taken}
            dtype = sample.dtype
            if precise:
                model_output, sample = model_output.double(), sample.double()
            result = super().step(sign * model_output, timestep, sample, **options)
            if isinstance(result, tuple):
                return (result[0].to(dtype), *result[1:])
            result.prev_sample = result.prev_sample.to(dtype)
            return result

        def scale_noise(self, sample: Any, timestep: Any, noise: Any) -> Any:
            sigma = float(values[(times == timestep.flatten()[0]).nonzero()[0]])
            return (1 - sigma) * sample + sigma * noise

    Fed.__name__ = stock.__name__
    return Fed.from_config(config)


def explicit(config: Any, **changes: Any) -> dict[str, Any]:
    """A config whose values all count as given, so that no class puts its own defaults in their place."""
    return {key: value for key, value in config.items() if not key.startswith("_")} | changes


def compared(tiny: tiny_pipelines.Tiny, ours: Any, make_twin: Any) -> None:
    try:
        tiny.pipe.scheduler = ours
        torch.manual_seed(0)  # where a pipeline passes no generator, noise comes from the global one
        got = tiny.run(STEPS).double()
        tiny.pipe.scheduler = make_twin()
        torch.manual_seed(0)
        expected = tiny.run(STEPS).double()
    finally:
        tiny.pipe.scheduler = tiny.stock
    scale = max(1.0, float(expected.abs().max()))
    assert float((got - expected).abs().max()) <= TOLERANCE * scale


def of_kind(*kinds: str) -> list[str]:
    return [name for name, entry in tiny_pipelines.FAMILIES.items() if entry.kind in kinds]


# These pipelines start from unit noise whatever ``init_noise_sigma`` says, which is wrong for stock Euler and Heun.
UNSCALED = ("dit", "ddpm", "ddim")
# SA-Solver's large weights leave 1e-5 of its amplitude (60 here) as rounding, more than 1e-4 of a clipped picture.
ON_SIGMAS = [
    (family, solver) for family in of_kind("vp", "edm") for solver in LISTED
    if not (family in UNSCALED and solver in ("euler", "euler-ancestral", "heun", "sa-solver"))
    and (family, solver) != ("svd", "sa-solver")
]  # fmt: skip


@pytest.mark.parametrize(("family", "solver"), ON_SIGMAS)
def test_equals_the_twin_on_our_sigmas(family: str, solver: str):
    tiny = tiny_pipelines.build(family)
    name, options = INFO[solver].twin  # type: ignore[misc]
    # With this spacing the start noise of Euler and Heun counts the signal's share, as it should.
    config = explicit(tiny.stock.config, timestep_spacing="leading", clip_sample=False, **options)
    ours = diffsamp.scheduler_class(solver).from_config(config)
    compared(tiny, ours, lambda: fed(getattr(diffusers, name), ours, config))


# DDPMScheduler knows nothing of CogVideoX's schedule, and its step refuses what DDIMPipeline passes.
ON_TIMESTEPS = [
    (family, solver) for family in of_kind("vp") for solver in DISCRETE
    if (family, solver) not in (("cogvideox", "ddpm"), ("ddim", "ddpm"))
]  # fmt: skip


@pytest.mark.parametrize(("family", "solver"), ON_TIMESTEPS)
def test_equals_the_twin_on_the_leading_grid(family: str, solver: str):
    tiny = tiny_pipelines.build(family)
    name, options = INFO[solver].twin  # type: ignore[misc]
    grid = dict(timestep_spacing="leading", steps_offset=0, set_alpha_to_one=True, clip_sample=False)
    config = explicit(tiny.stock.config, **options, **grid)
    if family == "cogvideox" and solver == "ddim":
        name = "CogVideoXDDIMScheduler"
    compared(
        tiny, diffsamp.scheduler_class(solver).from_config(config),
        lambda: getattr(diffusers, name).from_config(config),
    )  # fmt: skip


@pytest.mark.parametrize("solver", FLOW)
@pytest.mark.parametrize("family", of_kind("flow"))
def test_equals_the_twin_in_flow_pipelines(family: str, solver: str):
    tiny = tiny_pipelines.build(family)
    name, options = INFO[solver].twin  # type: ignore[misc]
    name = FLOW_TWINS.get(solver, name)
    config = explicit(tiny.stock.config, use_dynamic_shifting=False, **options)
    if not name.startswith("FlowMatch"):
        config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    ours = diffsamp.scheduler_class(solver).from_config(tiny.stock.config)
    compared(tiny, ours, lambda: fed(getattr(diffusers, name), ours, config))
