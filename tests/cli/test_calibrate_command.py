"""``diffsamp calibrate`` and what ``diffsamp generate`` makes of its results, run as a user runs them.

The embedded model is used with as few points and calls as each command takes. Nothing here is statistical.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffsamp import calibrate, models, teleport
from diffsamp.calibrate.artifact import Artifact, filename
from diffsamp.cli import build
from diffsamp.cli.calibrate import app
from diffsamp.errors import DiffsampError

SMALL = ["--nfe", "4", "--guidance-scale", "1", "--points", "4", "--held-out", "2", "--reference-steps", "12"]


def run(*arguments, command=None) -> str:
    """Standard output and error of the command; its DiffsampError is raised as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="points: 4 is few")
        done = CliRunner().invoke(command or app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_dc_writes_an_artifact_a_table_and_a_plot():
    text = run("dc", *SMALL, "--evaluations", "5", "--out", "a.safetensors", "--plot", "errors.png")
    setting = Artifact.load("a.safetensors").setting(4, 1.0)
    assert setting.values[:2] == (1.0, 1.0) and len(setting.values) == 4
    for word in ("held-out", "search calls", f"{setting.held_out_before:.5f}", str(setting.calls), "a.safetensors"):
        assert word in text
    with Image.open("errors.png") as image:
        assert image.size == (600, 400)
        assert len(set(image.convert("L").getdata())) > 20


def test_dc_by_the_published_recipe_differs_in_its_calls_and_notes_it():
    run("dc", *SMALL, "--method", "adamw", "--iterations", "3", "--out", "a.safetensors")
    artifact = Artifact.load("a.safetensors")
    assert artifact.options == {"k": 2, "method": "adamw", "iterations": 3}
    # Four for the walk, three with a backward pass at the one step that a corrector follows, one more of the base.
    assert artifact.setting(4, 1.0).calls == 4 + 3 + 1
    assert artifact.setting(4, 1.0).after <= artifact.setting(4, 1.0).before
    with pytest.raises(DiffsampError, match="was calibrated with options"):
        run("dc", *SMALL, "--out", "a.safetensors")


def test_every_search_runs_by_its_command():
    run("dualfast", *SMALL, "--tau", "2", "--evaluations", "4", "--out", "d.safetensors")
    assert Artifact.load("d.safetensors").options == {"tau": 2}
    run("grid", *SMALL, "--rounds", "1", "--solver", "ddim", "--out", "g.safetensors")
    assert Artifact.load("g.safetensors").solver == "ddim"


def test_gaussian_of_the_models_own_samples(monkeypatch):
    monkeypatch.setattr("diffsamp.teleport.network.NOISES_PER_CLASS", 2)
    run("gaussian", "--samples", "120", "--steps", "3", "--rank", "8", "--start", "5.0", "--out", "g.safetensors")
    stats = teleport.load("g.safetensors")
    assert stats.count == 120 and stats.eigenvalues.shape == (8,) and stats.start == 5.0
    assert stats.class_means is not None and stats.class_means.shape[0] == 10
    assert stats.key["samples_of"] == "fashion" and stats.key["sha256"] == models.fingerprint("fashion")
    assert stats.key["means"] == "network, sigma/alpha 80, 20 noises"
    with pytest.raises(DiffsampError, match=r"g.safetensors exists; choose another place or use --force"):
        run("gaussian", "--samples", "120", "--out", "g.safetensors")


def pictures(folder, count: int, size: int = 28, classes: bool = True) -> np.ndarray:
    generator = np.random.default_rng(0)
    made = generator.integers(0, 256, (count, size, size), dtype=np.uint8)
    for i, pixels in enumerate(made):
        place = folder / str(i % 2) if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i:03d}.png")
    return made


def test_gaussian_of_a_folder_of_pictures_is_streamed_and_equals_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("diffsamp.cli.gaussian.BATCH", 7)
    made = pictures(tmp_path / "p", 30)
    Image.fromarray(np.zeros((90, 90), np.uint8)).save(tmp_path / "p" / "0" / "grid.png")
    options = ("--rank", "12", "--start", "none", "--key", "vae=none", "--out", "g.safetensors")
    text = run("gaussian", "--data", tmp_path / "p", *options)
    assert "no start" in text and "means" not in teleport.load("g.safetensors").key
    stats, x = teleport.load("g.safetensors"), made.astype(np.float64).reshape(30, -1) / 127.5 - 1
    assert stats.count == 30 and stats.key["vae"] == "none" and stats.key["range"] == [-1, 1]
    assert np.abs(stats.mean.numpy() - x.mean(0)).max() < 1e-6
    assert stats.class_means is not None
    assert np.abs(stats.class_means[1].numpy() - x[1::2].mean(0)).max() < 1e-6
    exact = np.linalg.eigvalsh(np.cov(x.T))[::-1][:12]
    assert np.abs(stats.eigenvalues.numpy() / exact - 1).max() < 1e-6


def test_gaussian_of_an_array_and_its_measured_start(tmp_path, monkeypatch):
    # A law that is not the model's: the rule may or may not find a level, and says which.
    x = torch.randn(60, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.1 - 0.8
    np.savez(tmp_path / "x.npz", x=x.numpy())
    monkeypatch.setattr("diffsamp.teleport.start.RULE_NOISES", 2)
    monkeypatch.setattr("diffsamp.teleport.network.NOISES_PER_CLASS", 2)
    text = run("gaussian", "--data", tmp_path / "x.npz", "--out", "g.safetensors")
    stats = teleport.load("g.safetensors")
    assert stats.eigenvalues.shape == (96,) and stats.residual > 0
    assert stats.std == pytest.approx(float(x.var(0).mean() ** 0.5), rel=1e-3)
    found = stats.key["start_by_guidance_scale"]
    assert ("no level of the grid qualifies" in text) == (stats.start is None) == (found == {})
    assert stats.start is None or found == {"1": stats.start}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dc", "--points", "3"], "a calibration needs at least 4"),
        (["dc", "--nfe", "2"], "at least 3 network calls"),
        (["dc", "--nfe", "five"], "cannot read 'five'"),
        (["dc", "--nfe", ","], "cannot read ','"),
        (["dc", "--guidance-scale", "1;3"], "cannot read '1;3'"),
        (["dc", "--solver", "heun"], "not a multistep solver"),
        (["dc", "--solver", "sde-dpmpp-2m"], "draws noise"),
        (["dc", "--solver", "unipcc"], "unipcc"),
        (["dc", "--grid", "nope"], "not known"),
        (["dc", "--method", "sgd"], "accepted: search, adamw"),
        (["dc", "--k", "4"], "accepted: 1, 2, 3"),
        (["dc", "--model", "no-such"], "neither embedded"),
        (["dualfast", "--tau", "later"], "first, previous"),
        (["gaussian", "--start", "-1"], "a number above 0, auto, none"),
        (["gaussian", "--rank", "0"], "1 and above"),
        (["gaussian", "--means", "median"], "means: got 'median'; accepted: auto, data, network"),
        (["gaussian", "--levels", "2"], "levels: got 2; accepted: 3 and above"),
        (["gaussian", "--key", "scaling"], "write name=value"),
        (["gaussian", "--samples", "1"], "accepted: 2"),
        (["gaussian", "--data", "nothing.npz", "--start", "none"], "cannot be read"),
    ],
)
def test_bad_input_is_refused_with_one_line(arguments, words, tmp_path):
    with pytest.raises(DiffsampError, match=words) as refused:
        given = {a for a in arguments if a.startswith("--")}
        small = [part for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if pair[0] not in given for part in pair]
        run(*arguments, *(small if arguments[0] != "gaussian" else []))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("*.safetensors"))


def test_bad_data_of_a_gaussian_is_refused_with_the_reason(tmp_path):
    pictures(tmp_path / "large", 3, size=32)
    with pytest.raises(DiffsampError, match="is 32x32, the model makes 28x28"):
        run("gaussian", "--data", tmp_path / "large", "--start", "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffsampError, match="holds no pictures"):
        run("gaussian", "--data", tmp_path / "empty", "--start", "none")
    (tmp_path / "empty" / "a.png").write_text("no picture")
    with pytest.raises(DiffsampError, match=r"a.png cannot be read"):
        run("gaussian", "--data", tmp_path / "empty", "--start", "none")
    pictures(tmp_path / "few", 3, classes=False)
    with pytest.raises(DiffsampError, match="got 3 samples for rank 2"):
        run("gaussian", "--data", tmp_path / "few", "--start", "none", "--rank", "2")
    np.savez(tmp_path / "x.npz", x=np.full((9, 1, 28, 28), np.nan, np.float32))
    with pytest.raises(DiffsampError, match="not finite"):
        run("gaussian", "--data", tmp_path / "x.npz", "--start", "none")
    np.savez(tmp_path / "x.npz", x=np.zeros((9, 4), np.float32))
    with pytest.raises(DiffsampError, match="has samples of shape"):
        run("gaussian", "--data", tmp_path / "x.npz")


def test_network_that_returns_nan_is_reported_and_writes_nothing(monkeypatch, tmp_path):
    whole = calibrate.embedded("fashion")

    def broken(labels, scale):
        inner = whole.guided(labels, scale)
        return lambda x, level: inner(x, level) * float("nan")

    from dataclasses import replace

    monkeypatch.setattr(calibrate, "embedded", lambda name: replace(whole, guided=broken, sha256="0" * 64))
    with pytest.raises(DiffsampError, match="not finite"):
        run("dc", *SMALL)
    assert not list(tmp_path.iterdir())


def test_search_that_is_killed_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "a.safetensors"
    command = [
        sys.executable, "-m", "diffsamp", "calibrate", "dc", *SMALL, "--nfe", "4,5,6,7,8,9,10", "--out", str(out),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not out.exists() and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = Artifact.load(out).settings  # whole, whatever the moment
    assert kept and not list(tmp_path.glob("*.tmp"))
    text = run("dc", *SMALL[2:], "--nfe", "4,5", "--out", out)
    again = Artifact.load(out).settings
    assert {"4/1", "5/1"} <= set(again)
    assert all(again[key] == setting for key, setting in kept.items())
    if "5/1" not in kept:
        assert "2/2" in text
    else:
        assert "5 calls" not in text


@pytest.fixture(scope="module")
def toy_artifact(tmp_path_factory) -> bytes:
    """An artifact for the embedded model at a setting that none is shipped for."""
    made = calibrate.find("dc", "unipc")
    from dataclasses import replace

    setting = made.setting(8, 3.0)
    made.settings = {}
    made.add(replace(setting, guidance_scale=2.25))
    return made.save(tmp_path_factory.mktemp("toy") / "a.safetensors").read_bytes()


def name_of(*arguments) -> str:
    return json.loads(run("generate", "--dry-run", "--seeds", "0", *arguments, command=build()))["solver"]


def test_generate_finds_the_shipped_artifact():
    setting = calibrate.find("dc", "unipc").setting(5, 3.0)
    name = name_of("--solver", "dc-unipc", "--steps", "5", "--guidance-scale", "3")
    assert f"{setting.values[-1]!r}" in name


def test_generate_says_how_to_make_a_missing_artifact_and_takes_ratio_one_only_when_told_to():
    missing = ("--solver", "dc-unipc", "--steps", "20", "--guidance-scale", "2.25")
    with pytest.raises(DiffsampError, match=r"diffsamp calibrate dc --nfe 20 --guidance-scale 2.25"):
        name_of(*missing)
    assert "ratios" not in name_of(*missing, "--uncalibrated")
    with pytest.raises(DiffsampError, match=r"make one: diffsamp calibrate dc --solver ipndm"):
        name_of("--solver", "dc(ipndm)", "--steps", "5", "--guidance-scale", "1")


def test_generate_takes_the_noise_levels_that_the_values_were_found_on_and_refuses_others():
    wanted = ("generate", "--solver", "dc-unipc", "--steps", "5", "--guidance-scale", "3", "--seeds", "0")
    assert "--grid linspace" in " ".join(run(*wanted, "--out", "made", command=build()).split())
    with pytest.raises(DiffsampError, match="calibrated on the grid linspace/zero with 5 calls"):
        run(*wanted, "--grid", "karras", "--out", "other", command=build())
    assert not os.path.exists("other")
    table = [w if w != "dc-unipc" else "all(unipc)" for w in wanted]
    assert "values=" in run(*table, "--out", "table", command=build())


def test_generate_finds_what_calibrate_wrote_in_this_folder_else_the_shipped_one(tmp_path, toy_artifact):
    wanted = ("--solver", "dc-unipc", "--steps", "8", "--guidance-scale", "2.25")
    with pytest.raises(DiffsampError, match="no setting for 8 calls"):
        name_of(*wanted)
    (tmp_path / filename("fashion", "dc", "unipc")).write_bytes(toy_artifact)
    assert "ratios" in name_of(*wanted)
    assert "ratios" in name_of("--solver", "dc-unipc", "--steps", "5", "--guidance-scale", "3")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[:-16], "truncated"),
        (lambda content: content[:-3] + bytes([content[-3] ^ 64]) + content[-2:], "changed after it was written"),
        (lambda content: b"hello", "truncated or no safetensors file"),
        (lambda content: content.replace(b'"diffsamp"', b'"elsewher"', 1), "not one of diffsamp's"),
    ],
    ids=["cut", "changed", "text", "foreign"],
)  # fmt: skip
def test_generate_refuses_a_damaged_artifact_with_the_reason(tmp_path, toy_artifact, change, words):
    (tmp_path / filename("fashion", "dc", "unipc")).write_bytes(change(toy_artifact))
    with pytest.raises(DiffsampError, match=words):
        name_of("--solver", "dc-unipc", "--steps", "8", "--guidance-scale", "2.25")


def test_search_does_not_continue_a_damaged_or_foreign_file(tmp_path, toy_artifact):
    out = tmp_path / "a.safetensors"
    for content, words in ((toy_artifact[:-16], "truncated"), (toy_artifact, "was calibrated with seeds|model|grid")):
        out.write_bytes(content)
        with pytest.raises(DiffsampError, match=words):
            run("dc", *SMALL, "--out", out)
        assert out.read_bytes() == content


def test_model_in_a_local_folder_is_calibrated_and_its_artifact_is_found_by_its_name(tmp_path):
    models.load("fashion").save_pretrained(tmp_path / "mine")
    wanted = ("--model", tmp_path / "mine", "--solver", "dc-unipc", "--steps", "4")
    with pytest.raises(DiffsampError, match="guidance_scale: is needed by dc-unipc"):
        name_of(*wanted)
    with pytest.raises(DiffsampError, match="--solver unipc --model mine"):
        name_of(*wanted, "--guidance-scale", "1")
    assert "ratios" not in name_of(*wanted, "--uncalibrated")
    run("generate", "--model", tmp_path / "mine", "--seeds", "0-1", "--steps", "2", "--out", "made", command=build())
    assert {path.name for path in (tmp_path / "made").glob("seed-*")} == {"seed-000000.png", "seed-000001.png"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffsampError, match="did not load as a pipeline"):
        run("dc", *SMALL, "--model", tmp_path / "empty")
    run("dc", *SMALL, "--evaluations", "5", "--model", tmp_path / "mine")
    values = Artifact.load("mine-dc-unipc.safetensors").setting(4, 1.0).values
    assert f"{values[-1]!r}" in name_of(*wanted, "--guidance-scale", "1")


def test_generate_warns_of_an_artifact_of_another_model(tmp_path, toy_artifact):
    (tmp_path / "a.safetensors").write_bytes(toy_artifact)
    artifact = Artifact.load(tmp_path / "a.safetensors")
    artifact.model = {"name": "fashion", "sha256": "0" * 64}
    artifact.save(tmp_path / filename("fashion", "dc", "unipc"))
    with pytest.warns(UserWarning, match="run diffsamp calibrate dc again"):
        name_of("--solver", "dc-unipc", "--steps", "8", "--guidance-scale", "2.25")


def test_generate_with_the_shipped_statistics_makes_pictures_with_fewer_calls(tmp_path, monkeypatch):
    from dataclasses import replace

    from diffsamp.calibrate.artifact import SHIPPED
    from diffsamp.cli import generate as module

    # From a level below the shipped statistics' own, which is chosen for any guidance scale.
    replace(teleport.load(SHIPPED / "fashion-gaussian.safetensors"), start=5.0).save("stats.safetensors")

    calls, load = [], module._Job.load

    def counted(job):
        pipe = load(job)
        pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        return pipe

    monkeypatch.setattr(module._Job, "load", counted)
    common = ("generate", "--seeds", "0-1", "--steps", "16", "--guidance-scale", "1")
    run(*common, "--out", tmp_path / "plain", command=build())
    plain, _ = len(calls), calls.clear()
    run(*common, "--teleport", tmp_path / "stats.safetensors", "--out", tmp_path / "ours", command=build())
    assert plain == 16 and len(calls) == 14
    for name in ("seed-000000.png", "seed-000001.png"):
        a, b = (np.asarray(Image.open(tmp_path / where / name)).astype(float) for where in ("plain", "ours"))
        assert np.abs(a - b).mean() < 8  # of 255: the same picture
    with pytest.raises(DiffsampError, match="no such file"):
        run(*common, "--teleport", "nothing.safetensors", "--out", tmp_path / "none", command=build())
