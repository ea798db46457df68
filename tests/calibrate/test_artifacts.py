"""Artifacts and the calibration loop: provenance, refusals, resuming. Seeded, no statistical bound."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffsamp import calibrate, engine
from diffsamp.calibrate.artifact import Artifact, find
from diffsamp.calibrate.search import mse
from diffsamp.errors import DiffsampError
from diffsamp.grids import grid
from diffsamp.process import Process
from diffsamp.registry import solver
from diffsamp.testing import toys

VP = Process.vp("scaled_linear", 0.00085, 0.012)
TOY = toys.img()
MODEL = calibrate.Model("toy", "ab" * 32, VP, "sample", (1, 8, 8), 10, TOY.denoiser)
SMALL = {"nfe": [5], "guidance_scale": [1.0], "held_out": 8, "reference_steps": 200}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Artifact, object]:
    path = tmp_path_factory.mktemp("artifacts") / "toy-dc-unipc.safetensors"
    return calibrate.calibrate_dc(MODEL, **{**SMALL, "nfe": [5, 6], "out": path}), path


def plan(n: int = 5, name: str = "unipc", spacing: str = "linspace", process: Process = VP):
    return solver(name)(process, grid(spacing, process, n))


def test_file_holds_what_the_search_found_and_where_from(made):
    artifact, path = made
    again = Artifact.load(path)
    assert again.settings == artifact.settings
    assert again.model == {"name": "toy", "sha256": "ab" * 32}
    assert again.process == VP.fingerprint and again.solver == "unipc" and again.grid == "linspace/zero"
    assert len(again.seeds) == 10 and again.versions["torch"]
    for setting in again.settings.values():
        assert setting.after <= setting.before
        assert setting.held_out_after < setting.held_out_before


def test_applying_it_gives_the_stored_error_on_the_calibration_seeds(made):
    artifact, _ = made
    noise, labels = MODEL.points(artifact.seeds)
    compensated = artifact.apply(plan(), 1.0, model="ab" * 32)
    x = noise * compensated.first_level.sigma
    fine = calibrate.Reference(VP, compensated.grid.levels, TOY.denoiser(labels), x, steps=400)
    error = mse(engine.sample(compensated, TOY.denoiser(labels), x), fine.at(compensated.last_level))
    assert error == pytest.approx(artifact.setting(5, 1.0).after, rel=0.05)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: plan(spacing="trailing"), "other noise levels"),
        (lambda: plan(process=Process.vp()), "process"),
        (lambda: plan(name="dpmpp-2m"), "calibrated on solver unipc"),
        (lambda: solver("unipc", order=3)(VP, grid("linspace", VP, 5)), "calibrated on solver unipc"),
        (lambda: plan(7), "make one: diffsamp calibrate dc"),
    ],
)
def test_another_grid_process_solver_or_order_is_refused(made, other, words):
    with pytest.raises(DiffsampError, match=words):
        made[0].apply(other(), 1.0)


def test_another_guidance_scale_is_refused_with_the_command_that_makes_it(made):
    with pytest.raises(DiffsampError, match="--nfe 5 --guidance-scale 3"):
        made[0].apply(plan(), 3.0)


def test_another_model_gives_a_warning(made):
    with pytest.warns(UserWarning, match="run diffsamp calibrate dc again"):
        made[0].apply(plan(), 1.0, model="cd" * 32)


def test_damaged_and_foreign_files_are_refused_with_the_reason(made, tmp_path):
    from safetensors.numpy import save_file

    content = made[1].read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(content[:-20])
    with pytest.raises(DiffsampError, match="truncated"):
        Artifact.load(cut)
    changed = bytearray(content)
    changed[-3] ^= 0x40
    cut.write_bytes(bytes(changed))
    with pytest.raises(DiffsampError, match="changed after it was written"):
        Artifact.load(cut)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": np.zeros(3)}, foreign)
    with pytest.raises(DiffsampError, match="not one of diffsamp's"):
        Artifact.load(foreign)
    save_file({}, foreign, metadata={"diffsamp": json.dumps({"format": 99})})
    with pytest.raises(DiffsampError, match="format 99"):
        Artifact.load(foreign)
    with pytest.raises(DiffsampError, match="no such file"):
        Artifact.load(tmp_path / "none.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    with pytest.raises(DiffsampError, match="truncated or no safetensors"):
        Artifact.load(text)


def test_missing_artifact_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(DiffsampError, match="diffsamp calibrate dc --solver ipndm"):
        find("dc", "ipndm", folder=tmp_path)


def test_killed_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "a.safetensors"
    whole = calibrate.calibrate_dc(MODEL, **{**SMALL, "nfe": [5, 6, 8]})
    calls = 0

    def dying(labels, scale):
        inner = TOY.denoiser(labels, scale)

        def denoise(x, level):
            nonlocal calls
            calls += 1
            if calls > 300:
                raise KeyboardInterrupt
            return inner(x, level)

        return denoise

    with pytest.raises(KeyboardInterrupt):
        # Another name for the fine run's cache, so that the calls are made and counted here.
        calibrate.calibrate_dc(
            replace(MODEL, guided=dying, sha256="ef" * 32), **{**SMALL, "nfe": [5, 6, 8], "out": path}
        )
    kept = set(Artifact.load(path).settings)
    assert kept and kept < set(whole.settings)
    done = []
    resumed = calibrate.calibrate_dc(
        replace(MODEL, sha256="ef" * 32), **{**SMALL, "nfe": [5, 6, 8], "out": path},
        progress=lambda what, i, n: done.append(i),
    )  # fmt: skip
    assert len(done) == 3 - len(kept) and done[-1] == 3
    for key, setting in whole.settings.items():
        assert resumed.settings[key].values == pytest.approx(setting.values, abs=1e-3)


def test_file_of_another_run_is_not_continued(made):
    with pytest.raises(DiffsampError, match="was calibrated with model"):
        calibrate.calibrate_dc(replace(MODEL, sha256="00" * 32), **SMALL, out=made[1])


@pytest.mark.parametrize("run", [calibrate.calibrate_dualfast, calibrate.calibrate_all, calibrate.calibrate_grid])
def test_every_method_is_never_worse_than_its_base_on_its_own_points(run, tmp_path):
    path = tmp_path / "a.safetensors"
    artifact = run(MODEL, **{**SMALL, "guidance_scale": [1.0, 7.5]}, out=path)
    for setting in Artifact.load(path).settings.values():
        assert setting.after <= setting.before
    if artifact.method == "grid":
        levels = artifact.levels(VP, 5, 1.0)
        assert len(levels) == 5
        with pytest.raises(DiffsampError, match="no transform"):
            artifact.apply(plan(), 1.0)
    else:
        assert artifact.apply(plan(name=artifact.solver), 1.0).nfe == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"points": 3}, "at least 4"), ({"nfe": [2]}, "at least 3"), ({"solver": "heun"}, "not a multistep"),
        ({"solver": "euler-ancestral"}, "draws noise"), ({"grid": "nope"}, "not known"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_with_the_reason(change, words):
    with pytest.raises(DiffsampError, match=words):
        calibrate.calibrate_dc(MODEL, **{**SMALL, **change})


def test_network_that_returns_nan_is_reported():
    def broken(labels, scale):
        return lambda x, level: torch.full_like(x, float("nan"))

    with pytest.raises(DiffsampError, match="not finite"):
        calibrate.calibrate_dc(replace(MODEL, guided=broken, sha256="11" * 32), **SMALL)


def test_name_of_a_calibrated_solver_is_found_bound_and_written_so_that_it_reads_back(made):
    artifact, path = made
    found = calibrate.resolve("dc-unipc", model="toy", nfe=5, guidance_scale=1.0, folder=path.parent)
    values = artifact.setting(5, 1.0).values
    g = grid("linspace", VP, 5)
    assert solver(found.name)(VP, g) == artifact.apply(plan(), 1.0)
    assert dict(found.options)["ratios"] == values
    with pytest.raises(DiffsampError, match="--nfe 9 --guidance-scale 1"):
        calibrate.resolve("dc-unipc", model="toy", nfe=9, guidance_scale=1.0, folder=path.parent)
    plain = calibrate.resolve("dc-unipc", model="toy", nfe=9, guidance_scale=1.0, folder=path.parent, uncalibrated=True)
    assert plain(VP, grid("linspace", VP, 9)) == plan(9)
    with pytest.raises(DiffsampError, match="guidance_scale: is needed by dc-unipc"):
        calibrate.resolve("dc-unipc", model="toy", nfe=5, guidance_scale=None, folder=path.parent)


def test_name_of_a_solver_calibrated_by_the_published_recipe_holds_its_ratios_only(tmp_path):
    out = tmp_path / "toy-dc-unipc.safetensors"
    artifact = calibrate.calibrate_dc(MODEL, **SMALL, out=out, method="adamw", iterations=5)
    assert artifact.options == {"k": 2, "method": "adamw", "iterations": 5}
    found = calibrate.resolve("dc-unipc", model="toy", nfe=5, guidance_scale=1.0, folder=tmp_path)
    assert set(dict(found.options)) == {"k", "ratios"}
    assert solver(found.name)(VP, grid("linspace", VP, 5)) == artifact.apply(plan(), 1.0)
