"""Grids: what diffusers visits, strictly falling noise, clear refusals."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
from diffusers.utils import logging as diffusers_logging
from hypothesis import given, settings
from hypothesis import strategies as st

import diffsamp
from diffsamp.errors import DiffsampError

diffusers_logging.set_verbosity_error()
SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
VP = diffsamp.Process.vp(**SD)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 5, 20, 50])
def test_timesteps_differ_from_diffusers(spacing, steps):
    stock = diffusers.UniPCMultistepScheduler(**SD, timestep_spacing=spacing)
    stock.set_timesteps(steps)
    assert diffsamp.grid(spacing, VP, steps).times.tolist() == stock.timesteps.tolist()


@pytest.mark.parametrize(
    ("name", "flag"),
    [("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas"), ("beta", "use_beta_sigmas")],
)
def test_ratio_spaced_grids_differ_from_diffusers(name, flag):
    stock = diffusers.UniPCMultistepScheduler(**SD, **{flag: True})
    stock.set_timesteps(9)
    assert np.allclose(diffsamp.grid(name, VP, 9).sigmas, stock.sigmas.numpy(), rtol=3e-5)


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grid_differs_from_flow_match_euler(steps, shift):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(steps)
    ours = diffsamp.grid("flow", diffsamp.Process.flow(shift), steps)
    assert np.allclose(ours.sigmas, stock.sigmas.numpy(), atol=2e-6)
    assert np.allclose(ours.times, stock.timesteps.numpy(), atol=2e-3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(name=st.sampled_from(diffsamp.grids.grids()), steps=st.integers(1, 60))
def test_a_named_grid_has_another_number_of_calls_or_does_not_fall(name, steps):
    process = diffsamp.Process.flow(2.0) if name == "flow" else VP
    grid = diffsamp.grid(name, process, steps)
    assert len(grid) == steps and grid.levels[-1].sigma == 0
    ratios = [level.noise_to_signal for level in grid.levels]
    assert all(a > b for a, b in zip(ratios, ratios[1:], strict=False))


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: diffsamp.grid("karas", VP, 5), "did you mean karras"),
        (lambda: diffsamp.grid("trailing", VP, 0), "steps: got 0"),
        (lambda: diffsamp.grid("trailing", VP, 1001), "at most 1000"),
        (lambda: diffsamp.grid("trailing", VP, 5, rho=3), "rho"),
        (lambda: diffsamp.Grid.from_sigmas(VP, [1.0, 1.0]), "must fall"),
        (lambda: diffsamp.Grid.from_times(VP, [1200.0]), "0..999"),
        (lambda: diffsamp.Grid.from_sigmas(diffsamp.Process.flow(), [1.2, 0.5]), "in \\[0, 1\\]"),
        (lambda: diffsamp.grid("trailing", VP, 5).after(5), "start"),
    ],
)
def test_bad_input_is_accepted_or_not_named(build, word):
    with pytest.raises(DiffsampError, match=word):
        build()
