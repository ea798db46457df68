"""A whole calibrated table as a solver: in a pipeline, saved and loaded, and where it cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import diffsamp
from diffsamp import calibrate
from diffsamp.errors import DiffsampError


def table(nfe: int = 5, scale: float = 3.0) -> tuple[float, ...]:
    return calibrate.find("all", "unipc").setting(nfe, scale).values


def pictures(pipe, steps: int = 5) -> np.ndarray:
    generators = [torch.Generator().manual_seed(i) for i in range(10)]
    return pipe(
        class_labels=list(range(10)), num_inference_steps=steps, guidance_scale=3.0, generator=generators,
        output_type="np",
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    made = diffsamp.load("fashion")
    made.set_progress_bar_config(disable=True)
    return made


def test_the_table_is_at_least_twice_nearer_to_a_fine_run_than_its_base_with_as_many_calls(pipe):
    name = calibrate.resolve("all(unipc)", model="fashion", nfe=5, guidance_scale=3.0).name
    diffsamp.use(pipe, "unipc")
    fine, base = pictures(pipe, 60), pictures(pipe, 5)
    diffsamp.use(pipe, name)
    ours = pictures(pipe)
    assert pipe.scheduler.timesteps.shape == (5,) and pipe.scheduler.timesteps.dtype == torch.float32
    # One of these noises lies between two pictures, where a mean would look at nothing else.
    assert np.median(((ours - fine) ** 2).mean((1, 2, 3))) < 0.5 * np.median(((base - fine) ** 2).mean((1, 2, 3)))


def test_the_scheduler_runs_the_same_plan_as_the_artifact(pipe):
    diffsamp.use(pipe, calibrate.resolve("all(unipc)", model="fashion", nfe=5, guidance_scale=3.0).name)
    pipe.scheduler.set_timesteps(5)
    model = calibrate.embedded("fashion")
    base = diffsamp.solver("unipc")(model.process, diffsamp.grid("linspace", model.process, 5))
    expected = calibrate.find("all", "unipc").apply(base, 3.0)
    assert np.allclose(pipe.scheduler.plan.response("sample"), expected.response("sample"), rtol=1e-12, atol=1e-15)


def test_a_saved_scheduler_comes_back_with_its_table(pipe, tmp_path):
    diffsamp.use(pipe, "all", values=list(table()))
    before = pictures(pipe)
    pipe.scheduler.save_pretrained(tmp_path)
    pipe.scheduler = diffsamp.scheduler_class("all").from_pretrained(tmp_path)
    assert np.array_equal(pictures(pipe), before)


def test_without_values_it_is_the_base(pipe):
    process = diffsamp.Process.vp()
    grid = diffsamp.grid("karras", process, 6)
    base = diffsamp.solver("unipc")(process, grid)
    assert diffsamp.solver("all(unipc)")(process, grid).fingerprint == base.fingerprint


def test_another_number_of_calls_runs_the_base_and_says_so(pipe):
    diffsamp.use(pipe, "all", values=list(table()))
    with pytest.warns(UserWarning, match="another number of network calls than the 7"):
        found = pictures(pipe, 7)
    diffsamp.use(pipe, "unipc")
    assert np.array_equal(found, pictures(pipe, 7))


def test_a_start_inside_or_at_another_noise_is_refused(pipe):
    diffsamp.use(pipe, "all", values=list(table()))
    pipe.scheduler.set_timesteps(5)
    pipe.scheduler.set_begin_index(2)
    x = torch.zeros(1, 1, 28, 28)
    with pytest.raises(DiffsampError, match="begin_index: got 2"):
        pipe.scheduler.step(x, pipe.scheduler.timesteps[2], x)
    process = diffsamp.Process.ve(0.002, 80.0)
    with pytest.raises(DiffsampError, match="starts at sigma/alpha"):
        diffsamp.solver("all(unipc)", values=table())(process, diffsamp.grid("karras", process, 5))


def test_a_setting_that_is_not_there_names_the_command():
    command = "diffsamp calibrate all --nfe 5 --guidance-scale 2.5 --solver unipc --model fashion"
    with pytest.raises(DiffsampError, match=command):
        calibrate.resolve("all(unipc)", model="fashion", nfe=5, guidance_scale=2.5)
