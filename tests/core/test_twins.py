"""Our tables against the stock schedulers' own, found by impulse response."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from twins import SPACINGS, TWINS, finals, pair

import diffsamp
from diffsamp.errors import DiffsampError
from diffsamp.impulse import respond

CONFIGURATIONS = 15  # of each twin


def test_fewer_than_five_hundred_configurations_are_compared():
    assert CONFIGURATIONS * len(TWINS) >= 500
    with_twin = {name for name, info in diffsamp.solvers().items() if info.twin}
    assert {twin.name for twin in TWINS} == with_twin


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_coefficients_differ_from_the_stock_scheduler_of_the_same_method(twin):
    compared = set()

    @settings(
        max_examples=CONFIGURATIONS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )  # fmt: skip
    @given(
        gaps=st.integers(1, 40).flatmap(lambda n: st.lists(st.floats(0.1, 1.0), min_size=n, max_size=n)),
        vp=st.integers(0, 2),
        spacing=st.sampled_from(SPACINGS),
        prediction=st.sampled_from(twin.predictions),
        flow=st.booleans(),
        shift=st.sampled_from([1.0, 3.0]),
    )
    def check(**drawn):
        found = pair(twin, **drawn)
        assume(found is not None)  # what the stock scheduler does not take is drawn again, and so are repetitions
        plan, ours, stock = found
        key = (plan.fingerprint, "flow" if plan.process.kind == "flow" else drawn["prediction"])
        assume(key not in compared)
        # Steps near the start of a cosine schedule have alpha of 1e-4: raw coefficients there are of the order 1/alpha.
        assert np.abs(ours - stock).max() <= 1e-10 * max(1.0, np.abs(stock).max()), plan.solver
        compared.add(key)

    check()
    assert len(compared) >= CONFIGURATIONS


def _network(x, i):
    # Slope below 1, so that a run of many steps does not multiply the rounding of either side.
    pattern = torch.linspace(-2, 2, x[0].numel()).reshape(x.shape[1:])
    return torch.tanh(x + pattern + 0.1 * i) * 0.5 + 0.1 * torch.sin(2 * x)


@pytest.mark.parametrize("steps", [1, 2, 10, 20])
@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_final_samples_with_a_nonlinear_network_differ_from_the_stock_scheduler(twin, steps):
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(100))
    ours, stock = finals(
        twin, start, _network, gaps=[6 / steps] * steps, top=14.0, vp=0, spacing="leading" if twin.times else "given",
        prediction="sample" if "sample" in twin.predictions else "v_prediction", flow=False, shift=3.0,
    )  # fmt: skip
    assert ours.dtype == torch.float32 and ours.std() > 0.05
    assert (ours - stock).abs().max() <= 1e-5 * max(1.0, stock.abs().max())


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
