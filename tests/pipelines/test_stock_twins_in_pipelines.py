"""A pipeline's output with our solver equals that with the stock scheduler of the same method on the same grid.

Nothing is left out: where a stock scheduler cannot run in a pipeline, or runs wrongly there, a test says so and our
output is compared with the stock step on what it should have been given.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny_pipelines
from stock_twins import STEPS, TOLERANCE, distance, explicit, fed, outputs

import diffsamp

INFO = diffsamp.registry.solvers()
DISCRETE = ("ddim", "ddpm")  # their twins know only timesteps, on the leading grid
LISTED = [name for name, info in INFO.items() if info.twin and name not in DISCRETE]
FLOW_TWINS = {"euler": "FlowMatchEulerDiscreteScheduler", "ddim": "FlowMatchEulerDiscreteScheduler",
              "heun": "FlowMatchHeunDiscreteScheduler", "ddpm": "EulerAncestralDiscreteScheduler"}  # fmt: skip
EULER = ("euler", "euler-ancestral", "heun")
# These pipelines start from unit noise whatever ``init_noise_sigma`` says, and two of them never scale the network's
# input, so the stock Euler family runs wrongly there.
UNSCALED = ("dit", "ddpm", "ddim")


def of_kind(*kinds: str) -> list[str]:
    return [name for name, entry in tiny_pipelines.FAMILIES.items() if entry.kind in kinds]


def always(t: Any) -> float:
    """tau of SA-Solver. The stock one is by default 1 for t in 200..800 and 0 elsewhere, whatever the clock is."""
    return 1.0


# Wan's config brings an ``algorithm_type`` of another scheduler.
SA_SOLVER = {"tau_func": always, "algorithm_type": "data_prediction"}


def settings(solver: str) -> tuple[type, dict[str, Any]]:
    name, options = INFO[solver].twin  # type: ignore[misc]
    return getattr(diffusers, name), {**options, **(SA_SOLVER if solver == "sa-solver" else {})}


def on_sigmas(family: str, solver: str, **changes: Any) -> tuple[tiny_pipelines.Tiny, Any, type, dict[str, Any]]:
    """(pipeline, ours, stock class, config) with a grid for which the Euler family's start noise is unit-variance."""
    tiny = tiny_pipelines.build(family)
    stock, options = settings(solver)
    config = explicit(tiny.stock.config, timestep_spacing="leading", clip_sample=False, **options)
    ours = diffsamp.scheduler_class(solver).from_config(config, **changes)
    return tiny, ours, stock, config


@pytest.mark.parametrize("solver", LISTED)
@pytest.mark.parametrize("family", of_kind("vp", "edm"))
def test_differs_from_the_twin_on_our_sigmas(family: str, solver: str):
    tiny, ours, stock, config = on_sigmas(family, solver)
    found = outputs(tiny, ours)
    twin = fed(stock, ours, config, in_our_scale=family in UNSCALED and solver in EULER)
    assert distance(found, outputs(tiny, twin)) <= TOLERANCE


@pytest.mark.parametrize("solver", EULER)
@pytest.mark.parametrize("family", UNSCALED)
def test_the_stock_euler_family_is_right_in_pipelines_that_do_not_scale(family: str, solver: str):
    tiny, ours, stock, config = on_sigmas(family, solver)
    found = outputs(tiny, ours)
    assert distance(outputs(tiny, fed(stock, ours, config)), found) > 0.1


@pytest.mark.parametrize("family", ["svd", "sd1", "ddpm"])
def test_a_window_of_tau_differs_from_the_stock_default(family: str):
    window = {"solver_options": {"tau_range": (200.0, 800.0)}}
    tiny, ours, stock, config = on_sigmas(family, "sa-solver", **window)
    found = outputs(tiny, ours)
    twin = fed(stock, ours, config | {"tau_func": None})
    assert distance(found, outputs(tiny, twin)) <= TOLERANCE


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("family", ["sd1", "svd", "cogvideox", "flux_dev", "wan"])
def test_lower_orders_of_ipndm_differ_from_the_stock_one_with_a_short_memory(family: str, order: int):
    tiny = tiny_pipelines.build(family)
    ours = diffsamp.scheduler_class("ipndm").from_config(tiny.stock.config, solver_options={"order": order})
    found = outputs(tiny, ours)
    twin = fed(diffusers.IPNDMScheduler, ours, {}, order=order)
    assert distance(found, outputs(tiny, twin)) <= TOLERANCE
    if order < 3:
        assert distance(found, outputs(tiny, fed(diffusers.IPNDMScheduler, ours, {}))) > TOLERANCE


def on_leading(family: str, solver: str) -> tuple[tiny_pipelines.Tiny, Any, Any]:
    tiny = tiny_pipelines.build(family)
    name, options = INFO[solver].twin  # type: ignore[misc]
    grid = dict(timestep_spacing="leading", steps_offset=0, set_alpha_to_one=True, clip_sample=False)
    config = explicit(tiny.stock.config, **options, **grid)
    ours = diffsamp.scheduler_class(solver).from_config(config)
    if family == "cogvideox" and solver == "ddim":
        name = "CogVideoXDDIMScheduler"
    elif family == "cogvideox":
        # DDPMScheduler knows nothing of a shifted signal-to-noise ratio, but takes any schedule.
        bar = 1.0 / (1.0 + ours.process.table**2)
        betas = 1.0 - bar / [1.0, *bar[:-1]]
        config |= {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    return tiny, ours, getattr(diffusers, name).from_config(config)


@pytest.mark.parametrize("solver", DISCRETE)
@pytest.mark.parametrize("family", of_kind("vp"))
def test_differs_from_the_twin_on_the_leading_grid(family: str, solver: str):
    tiny, ours, stock = on_leading(family, solver)
    found = outputs(tiny, ours)
    if (family, solver) == ("ddim", "ddpm"):
        with pytest.raises(TypeError, match="eta"):  # DDIMPipeline passes what the stock step does not take
            outputs(tiny, stock)
        step = stock.step
        stock.step = lambda *arguments, eta, use_clipped_model_output, **options: step(*arguments, **options)
    assert distance(found, outputs(tiny, stock)) <= TOLERANCE


# The flow that DDPM and Euler-ancestral run in is the stock ancestral step in the ratio sigma/(1 − sigma): the only
# stock one for flows (LTXEulerAncestralRF) goes down to sigma_t²/sigma_s in sigma, which is another sampler.
IN_RATIO = ("euler-ancestral", "ddpm")


def in_flow(family: str, solver: str) -> tuple[tiny_pipelines.Tiny, Any, type, dict[str, Any]]:
    tiny = tiny_pipelines.build(family)
    stock, options = settings(solver)
    stock = getattr(diffusers, FLOW_TWINS.get(solver, stock.__name__))
    config = explicit(tiny.stock.config, use_dynamic_shifting=False, **options)
    if solver in IN_RATIO:
        config |= {"prediction_type": "epsilon"}
    elif not stock.__name__.startswith("FlowMatch"):
        config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return tiny, diffsamp.scheduler_class(solver).from_config(tiny.stock.config), stock, config


@pytest.mark.parametrize("solver", [*LISTED, *DISCRETE])
@pytest.mark.parametrize("family", of_kind("flow"))
def test_differs_from_the_twin_in_flow_pipelines(family: str, solver: str):
    tiny, ours, stock, config = in_flow(family, solver)
    found = outputs(tiny, ours)
    # Stock DEIS loses the first step of a flow to rounding in float32: coefficients of 1e5 that cancel.
    twin = fed(stock, ours, config, precise=solver == "deis", in_our_scale=solver in IN_RATIO)
    assert distance(found, outputs(tiny, twin)) <= TOLERANCE


def test_stock_deis_keeps_its_digits_in_a_flow():
    tiny, ours, stock, config = in_flow("sd3", "deis")
    found = outputs(tiny, ours)
    assert distance(outputs(tiny, fed(stock, ours, config)), found) > 10 * TOLERANCE


def test_every_solver_with_a_twin_is_compared():
    compared = {*LISTED, *DISCRETE}
    assert compared == {name for name, info in INFO.items() if info.twin} and len(compared) >= 16
    assert STEPS >= 4  # iPNDM reaches order 4 in its fourth step
