"""Our tables against the stock schedulers' own, found by impulse response."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twins import TWINS, pair

import diffsamp
from diffsamp.errors import DiffsampError
from diffsamp.impulse import respond


@settings(max_examples=520, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    twin=st.integers(0, len(TWINS) - 1),
    steps=st.integers(2, 20),
    vp=st.integers(0, 2),
    spacing=st.sampled_from(["linspace", "trailing", "karras", "exponential"]),
    prediction=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    flow=st.booleans(),
    shift=st.sampled_from([1.0, 3.0]),
)
def test_coefficients_differ_from_the_stock_scheduler_of_the_same_method(
    twin, steps, vp, spacing, prediction, flow, shift
):
    try:
        found = pair(twin, steps, vp, spacing, prediction, flow, shift)
    except DiffsampError as error:
        # The stock scheduler itself gives NaN or visits a level twice there: nothing to compare with.
        assert "not finite" in str(error) or "noise must fall" in str(error)
        return
    if found is None:
        return
    plan, ours, stock = found
    # Steps near the start of a cosine schedule have alpha of 1e-4: raw coefficients there are of the order 1/alpha.
    assert np.abs(ours - stock).max() <= 1e-10 * max(1.0, np.abs(stock).max()), plan.solver


@pytest.mark.parametrize("twin", range(len(TWINS)))
def test_every_twin_is_compared_at_least_once_on_a_grid_that_it_supports(twin):
    plan, ours, stock = pair(twin, 8, 0, "linspace", "epsilon", False, 1.0)
    assert np.abs(ours - stock).max() <= 1e-10 * np.abs(stock).max()


def _network(x, t):
    return torch.tanh(1.3 * x + 0.002 * t) * 0.8 + 0.1 * torch.sin(3 * x)


@pytest.mark.parametrize(
    ("name", "options", "stock"),
    [
        ("dpmpp-2m", {}, diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="sample")),  # noqa: E501
        ("dpmpp-3m", {}, diffusers.DPMSolverMultistepScheduler(solver_order=3, prediction_type="sample")),
        ("unipc", {"order": 2}, diffusers.UniPCMultistepScheduler(prediction_type="sample")),
        ("unipc", {"order": 3}, diffusers.UniPCMultistepScheduler(solver_order=3, prediction_type="sample")),
        ("deis", {"order": 2}, diffusers.DEISMultistepScheduler(prediction_type="sample")),
        ("ddim", {}, diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="sample")),
        ("dpmpp-2s", {}, diffusers.DPMSolverSinglestepScheduler(prediction_type="sample")),
    ],
)  # fmt: skip
def test_final_samples_with_a_nonlinear_network_differ_from_the_stock_scheduler(name, options, stock):
    # Stock DEIS always ends at the smallest noise level, not at the data.
    end = {"final_sigmas_type": "sigma_min"} if name == "deis" else {}
    ours = diffsamp.scheduler_class(name).from_config(stock.config, solver_options=options, **end)
    finals = []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(_network(x, float(t)), t, x, return_dict=False)[0]
        finals.append(x)
    assert torch.allclose(*finals, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DPMSolverMultistepScheduler(solver_order=3),
        diffusers.UniPCMultistepScheduler(solver_order=3),
        diffusers.LMSDiscreteScheduler(),
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_foreign_scheduler_s_plan_reproduces_its_run(scheduler):
    plan = diffsamp.Plan.from_scheduler(scheduler, 7)
    flow = "FlowMatch" in type(scheduler).__name__
    prediction = "flow_prediction" if flow else "epsilon"
    response, _ = respond(scheduler, 7)
    kept = "Euler" in type(scheduler).__name__ or "LMS" in type(scheduler).__name__
    if kept and not flow:
        alpha = np.array([level.alpha for level in plan.grid.levels])
        response = response * alpha[:, None]
        response[:, 0] /= alpha[0]
    assert np.abs(plan.response(prediction) - response).max() <= 1e-8 * np.abs(response).max()


def test_a_scheduler_that_clips_is_refused_with_the_reason():
    with pytest.raises(DiffsampError, match="clips"):
        diffsamp.Plan.from_scheduler(diffusers.DDIMScheduler(clip_sample=True), 5)
