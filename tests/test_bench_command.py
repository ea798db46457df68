"""`diffsamp bench` on the embedded model: a real table, resumed, stock schedulers beside ours, clear refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from diffsamp.cli import build
from diffsamp.cli.bench import numbers, scales, split
from diffsamp.errors import DiffsampError
from diffsamp.metrics import class_accuracy
from diffsamp.run import RunFolder
from diffsamp.run.bench import preview


def call(*arguments: str):
    return CliRunner().invoke(build(), ["bench", *arguments], catch_exceptions=False)


def test_a_small_benchmark_is_real_resumed_and_independent_of_chunk_mates(tmp_path):
    arguments = ("--n", "24", "--chunk", "12", "--nfe", "2", "--metrics", "fd,kid,accuracy,trajectory")
    arguments += ("--solvers", "unipc,diffusers:UniPCMultistepScheduler", "--samples-from", "unipc@3", "--json")
    arguments += ("--out",)
    first = call(*arguments, str(tmp_path / "a"))
    results = json.loads(first.stdout.strip().splitlines()[-1])
    assert (tmp_path / "a" / "report.html").stat().st_size > 5000
    ours, stock = results["cells"]
    assert ours["calls"] == stock["calls"] == 2 and ours["n"] == 24 and results["distance"] == "FD[fashion-cnn]"
    # The registry's unipc is the stock scheduler's method: the same pictures but for rounding.
    assert ours["metrics"]["fd"][0] == pytest.approx(stock["metrics"]["fd"][0], rel=0.02)
    assert 0 < ours["metrics"]["trajectory"][0] < 1 and results["reference"]["floor"] > 0
    assert any("rank 23 for 128 features" in w for w in results["warnings"])
    run = RunFolder.existing(tmp_path / "a" / "cells" / ours["folder"]).result()
    assert class_accuracy(run.arrays["logits"], run.arrays["labels"]) == ours["metrics"]["accuracy"][0]
    assert np.array_equal(run.arrays["labels"], np.arange(24) % 10)
    pictures = preview(tmp_path / "a", ours["folder"], 5)
    assert pictures.shape == (5, 1, 28, 28) and pictures.std() > 20
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("chunk-*.safetensors")}
    again = json.loads(call(*arguments, str(tmp_path / "a")).stdout.strip().splitlines()[-1])
    assert {c["sha256"] for c in again["cells"]} == {c["sha256"] for c in results["cells"]}
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())  # nothing was made again


@pytest.fixture
def ratios(tmp_path):
    """A folder with ratios for UniPC at 4 calls and guidance 2 on the embedded model's own grid."""
    from diffsamp import calibrate
    from diffsamp.calibrate.artifact import levels_digest
    from diffsamp.grids import grid

    model = calibrate.embedded("fashion")
    levels = levels_digest(grid("trailing", model.process, 4).levels)
    made = calibrate.Artifact(
        "dc", "unipc", model.process.fingerprint, "trailing/zero", {"name": "fashion", "sha256": model.sha256}
    )
    made.add(
        calibrate.Setting(
            nfe=4, guidance_scale=2.0, values=(1.0, 1.0, 0.7, 1.3), grid=levels, before=1.0, after=0.9,
            held_out_before=1.0, held_out_after=0.9, kept="greedy", calls=1, seconds=1.0,
        )
    )  # fmt: skip
    made.save(tmp_path / "ratios" / "fashion-dc-unipc.safetensors")
    return tmp_path / "ratios"


def test_dc_in_a_benchmark_means_its_ratios_or_is_refused_before_anything_runs(tmp_path, ratios):
    small = ("--n", "8", "--chunk", "8", "--metrics", "accuracy", "--json", "--artifacts", str(ratios))
    done = call(*small, "--solvers", "unipc,dc(unipc),dc-unipc", "--nfe", "4", "--out", str(tmp_path / "a"))
    plain, dc, named = json.loads(done.stdout.strip().splitlines()[-1])["cells"]
    assert dc["sha256"] == named["sha256"] != plain["sha256"]
    recipe = RunFolder.existing(tmp_path / "a" / "cells" / dc["folder"]).facts["recipe"]
    assert recipe["made"] == "dc(unipc,ratios=[1.0;1.0;0.7;1.3])" and recipe["solver"] == "dc(unipc)"
    for extra, told in (
        (("--nfe", "4,6"), "diffsamp calibrate dc --nfe 6 --guidance-scale 2"),
        (("--nfe", "4", "--grid", "karras"), "was calibrated on the grid trailing/zero with 4 calls.*choose --grid"),
        (("--nfe", "4", "--solvers", "unipc,dc(ddim)"), "none for dc on ddim and model fashion"),
    ):
        arguments = (*small, "--solvers", "unipc,dc(unipc)", *extra, "--out", str(tmp_path / "b"))
        with pytest.raises(DiffsampError, match=told) as caught:
            call(*arguments)
        assert "\n" not in str(caught.value) and not (tmp_path / "b").exists()


def test_a_reference_of_another_width_is_refused_with_the_first_chunk(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(5), sigma=np.eye(5))
    arguments = ("--n", "40", "--chunk", "2", "--nfe", "1", "--reference", str(tmp_path / "ref.npz"))
    with pytest.raises(DiffsampError, match="has 5 features per picture and extractor=fashion-cnn gives 128") as caught:
        call(*arguments, "--metrics", "fd", "--solvers", "unipc", "--out", str(tmp_path / "x"))
    assert "\n" not in str(caught.value) and not list((tmp_path / "x").rglob("chunk-*"))


def test_bad_input_is_one_clear_line(tmp_path):
    for arguments, told in (
        (("--metrics", "fd,lpips"), "accepted: fd"),
        (("--protocol", "tf3"), "accepted: embedded"),
        (("--solvers", "unipcc"), "did you mean unipc"),
        (("--solvers", "diffusers:UniPCScheduler"), "did you mean"),
        (("--nfe", "10-4"), "nfe: cannot read"),
        (("--nfe", "0"), "nfe holds 0"),
        (("--guidance-scale", "two"), "guidance-scale"),
        (("--model", "nothere"), "no embedded model and no folder"),
        (("--extractor", "inception-fid", "--feature-weights", "/nowhere.pth"), "no file /nowhere.pth"),
        (("--reference", "/nowhere"), "no such file or folder"),
        (("--engine", "dask"), "accepted: auto, local, torch, shared, ray"),
        (("--n", "0"), "n=0"),
        (("--threads", "0"), "threads"),
        (("--prompts", "/nowhere.txt"), "prompts"),
    ):
        with pytest.raises(DiffsampError, match=told) as caught:
            call(*arguments, "--out", str(tmp_path / "x"))
        assert "\n" not in str(caught.value), arguments


def test_lists_on_the_command_line():
    assert split("unipc,dc(unipc,k=1),unipc:order=3,lower_order_final=false,ddim") == [
        "unipc", "dc(unipc,k=1)", "unipc:order=3,lower_order_final=false", "ddim",
    ]  # fmt: skip
    assert numbers("3-5,8") == [3, 4, 5, 8]
    assert scales("1,2.5") == [1.0, 2.5] and scales(None) == [None]


def test_dry_run_counts_and_makes_nothing(tmp_path):
    found = json.loads(call("--dry-run", "--out", str(tmp_path / "x")).stdout)
    assert len(found["cells"]) == 6 and found["calls"] == 36 * 192 and not (tmp_path / "x").exists()
