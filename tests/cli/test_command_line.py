"""The command line, run as a user runs it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DIFFSAMP = [sys.executable, "-m", "diffsamp"]


def run(*arguments, cwd=None, check=True):
    """The command in this process (imports are paid once); the result has returncode, stdout, stderr."""
    from diffsamp.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    before = (sys.argv, os.getcwd())
    sys.argv = ["diffsamp", *map(str, arguments)]
    os.chdir(cwd or before[1])
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    done = subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "out"
    done = run("generate", "--seeds", "0-3,7", "--steps", 4, "--out", folder, "--json")
    return folder, json.loads(done.stdout)


def test_files_are_not_named_by_seed_or_lack_the_grid(pictures):
    folder, facts = pictures
    assert sorted(p.name for p in folder.iterdir()) == ["grid.png", *(f"seed-{s:06d}.png" for s in (0, 1, 2, 3, 7))]
    assert len(facts["files"]) == 5 and "--seeds 0-3,7" in facts["command"]


def test_a_picture_is_not_repeated_bit_for_bit(pictures, tmp_path):
    folder, _ = pictures
    command = [*DIFFSAMP, "generate", "--from", str(folder / "seed-000002.png"), "--out", str(tmp_path / "again")]
    subprocess.run(command, check=True, capture_output=True)  # another process, as a user would
    assert (tmp_path / "again" / "seed-000002.png").read_bytes() == (folder / "seed-000002.png").read_bytes()


def test_a_repetition_is_run_in_another_batch_or_with_other_threads(pictures, tmp_path, monkeypatch):
    """Eight bits a pixel hide most last bits of a convolution; its batch and threads are what they depend on."""
    import torch

    import diffsamp.cli.generate as module
    from diffsamp.recipe import Recipe

    real, seen = module._batch, []

    def watched(job, pipe, batch, tick=None):
        seen.append((batch, torch.get_num_threads()))
        return real(job, pipe, batch, tick)

    monkeypatch.setattr(module, "_batch", watched)
    recipe = Recipe.from_png(pictures[0] / "seed-000007.png")
    assert [seed for seed, _ in recipe.batch] == [0, 1, 2, 3, 7]
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.threads + 1)
    try:
        run("generate", "--from", pictures[0] / "seed-000007.png", "--out", tmp_path / "again")
        assert torch.get_num_threads() == recipe.threads + 1
    finally:
        torch.set_num_threads(before)
    assert seen == [(recipe.batch, recipe.threads)]
    assert (tmp_path / "again" / "seed-000007.png").read_bytes() == (pictures[0] / "seed-000007.png").read_bytes()


def test_a_picture_depends_on_the_batch_it_is_made_in(pictures, tmp_path):
    import numpy as np
    from PIL import Image

    folder, _ = pictures
    run("generate", "--seeds", "7", "--steps", 4, "--out", tmp_path / "alone")
    alone, together = (
        np.asarray(Image.open(where / "seed-000007.png")).astype(int) for where in (tmp_path / "alone", folder)
    )
    assert np.abs(alone - together).max() <= 1


def test_a_picture_lacks_its_recipe(pictures):
    from diffsamp.recipe import Recipe

    recipe = Recipe.from_png(pictures[0] / "seed-000003.png")
    assert (recipe.seed, recipe.model, recipe.solver, recipe.steps) == (3, "fashion", "unipc", 4)
    assert recipe.versions["torch"] and recipe.fingerprint and [3, 3] in recipe.batch


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--solver", "unipcc"], ["solver", "unipcc", "unipc"]),
        (["--model", "no/such/folder"], ["model", "no/such/folder", "fashion"]),
        (["--class", "Zebra"], ["class", "Zebra", "Trouser"]),
        (["--class", "11"], ["class", "11", "0-9"]),
        (["--seeds", "5-1"], ["seeds", "5-1"]),
        (["--seeds", "a-b"], ["seeds", "a-b"]),
        (["--steps", "0"], ["steps", "0"]),
        (["--steps", "5000"], ["steps", "5000", "1000"]),
        (["--grid", "karras2"], ["grid", "karras2", "karras"]),
        (["--dtype", "int8"], ["dtype", "int8", "float16"]),
        (["--size", "big"], ["size", "big"]),
        (["--guidance-scale", "nan"], ["guidance-scale", "nan"]),
        (["--from", "nothing.png"], ["from", "nothing.png"]),
        (["--out", "/proc/nowhere"], ["out", "/proc/nowhere"]),
        (["--solver", ""], ["solver", "''", "unipc"]),
        (["--solver", "unipc:order=9"], ["order", "9", "1, 2, 3"]),
        (["--steps", "two"], ["--steps", "integer"]),
        (["--steps", "1001"], ["steps", "1001", "1000"]),
        (["--grid", "flow"], ["grid", "flow", "karras"]),
        (["--seeds", "9" * 20], ["seeds", "9" * 20, "2**63"]),
        (["--size", "32"], ["size", "fashion"]),
        (["--size", "28x0"], ["size", "28x0"]),
        (["--prompt", "a shoe"], ["prompt", "--class"]),
        (["--device", "tpu"], ["device", "tpu", "cpu"]),
        (["--class", "3*Zebra"], ["class", "zebra"]),
        (["--corrector", "nope"], ["corrector", "nope", "fkc"]),
        (["--from", "nothing.png", "--steps", "3"], ["steps", "--from"]),
        (["--dry-run", "--steps", "1001"], ["steps", "1001", "1000"]),
        (["--dry-run", "--model", "nope"], ["model", "nope", "fashion"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_bad_input_gives_a_traceback_or_more_than_one_line(arguments, words, tmp_path):
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    done = run("generate", *arguments, cwd=tmp_path, check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error:"), done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert not done.stdout and not list(tmp_path.iterdir())


def test_an_output_folder_with_files_or_a_file_is_written_into(pictures, tmp_path):
    folder, _ = pictures
    kept = (folder / "seed-000000.png").read_bytes()
    done = run("generate", "--seeds", 0, "--steps", 2, "--out", folder, check=False)
    assert done.returncode == 2 and "not empty" in done.stderr
    assert (folder / "seed-000000.png").read_bytes() == kept
    (tmp_path / "file").write_text("mine")
    done = run("generate", "--seeds", 0, "--out", tmp_path / "file", check=False)
    assert done.returncode == 2 and "is a file" in done.stderr and (tmp_path / "file").read_text() == "mine"


def test_killing_the_command_leaves_a_partial_file(tmp_path):
    from PIL import Image

    for k, enough in enumerate((1, 6)):
        folder = tmp_path / str(k)
        process = subprocess.Popen(
            [*DIFFSAMP, "generate", "--seeds", "0-199", "--steps", "2", "--batch-size", "2", "--out", str(folder)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while len(list(folder.glob("*.png"))) < enough and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        found = list(folder.iterdir())
        assert len(found) >= enough
        for path in found:  # no leftovers of other names either
            assert path.suffix == ".png"
            with Image.open(path) as image:
                image.load()


def test_a_prediction_that_is_not_finite_stops_the_others_or_is_not_named(tmp_path, monkeypatch):
    import diffsamp.cli.generate as module

    load = module._Job.load

    def broken(job):
        pipe = load(job)
        forward, calls = pipe.unet.forward, [0]

        def bad(*arguments, **options):
            calls[0] += 1
            out = forward(*arguments, **options)
            if calls[0] == 2:
                out[0][out[0].shape[0] // 2 + 1] = float("nan")
            return out

        pipe.unet.forward = bad
        return pipe

    monkeypatch.setattr(module._Job, "load", broken)
    done = run("generate", "--seeds", "0-2", "--steps", "3", "--out", tmp_path / "out", check=False)
    assert done.returncode == 3, done.stderr
    assert "seed 1" in done.stderr and "step 1" in done.stderr and "sigma" in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").glob("seed-*")) == ["seed-000000.png", "seed-000002.png"]


def test_a_kill_while_a_file_is_written_leaves_part_of_it(tmp_path):
    """The moment is not left to chance: the process kills itself between the two halves of a file."""
    code = f"""
import os, signal
from pathlib import Path
from diffsamp import files
real = os.fsync
def kill(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)
files.os.fsync = kill
files.write_whole(Path({str(tmp_path / "a.png")!r}), b"x" * 100_000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    if not sys.platform.startswith("linux"):  # there the next run clears the hidden file away
        left = [name for name in left if not name.endswith(".partial")]
    assert left == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("MPS backend out of memory (32 GB)"), "torch"])
def test_memory_that_runs_out_stops_the_command_or_changes_the_pictures(error, pictures, tmp_path, monkeypatch):
    import numpy as np
    import torch
    from PIL import Image

    import diffsamp.cli.generate as module

    real, sizes = module._batch, []
    raised = torch.OutOfMemoryError("CUDA out of memory") if error == "torch" else error

    def small(job, pipe, batch, tick=None):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise raised
        return real(job, pipe, batch, tick)

    monkeypatch.setattr(module, "_batch", small)
    done = run("generate", "--seeds", "0-3,7", "--steps", 4, "--out", tmp_path / "out")
    assert sizes == [5, 2, 2, 1] and "--batch-size 2" in done.stderr
    for path in pictures[0].glob("seed-*.png"):
        places = (pictures[0], tmp_path / "out")
        one, other = (np.asarray(Image.open(where / path.name)).astype(int) for where in places)
        assert np.abs(one - other).max() <= 1
    monkeypatch.setattr(module, "_batch", lambda *arguments: (_ for _ in ()).throw(raised))
    done = run("generate", "--seeds", "0-3", "--steps", 4, "--out", tmp_path / "none", check=False)
    assert done.returncode == 2 and "does not fit" in done.stderr and not (tmp_path / "none").exists()


def test_an_error_that_is_not_of_memory_is_taken_for_one(tmp_path, monkeypatch):
    import diffsamp.cli.generate as module

    def broken(*arguments):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(module, "_batch", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run("generate", "--seeds", "0-3", "--steps", 4, "--out", tmp_path / "out")


def test_force_is_needed_without_reason_or_does_not_replace(pictures, tmp_path):
    (tmp_path / "seed-000000.png").write_bytes(b"old")
    (tmp_path / "mine.txt").write_text("mine")
    run("generate", "--seeds", 0, "--steps", 4, "--batch-size", 1, "--out", tmp_path, "--force")
    assert (tmp_path / "seed-000000.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_dry_run_of_a_repetition_makes_the_picture(pictures, tmp_path):
    done = run("generate", "--from", pictures[0] / "seed-000002.png", "--dry-run", cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert facts["seed"] == 2 and facts["steps"] == 4 and not list(tmp_path.iterdir())


def test_dry_run_writes_something(tmp_path):
    done = run("generate", "--dry-run", "--seeds", "1-3", cwd=tmp_path)
    assert json.loads(done.stdout)["seeds"] == [1, 2, 3] and not list(tmp_path.iterdir())


def test_commands_of_the_registry_do_not_run():
    names = {row["name"] for row in json.loads(run("solvers", "list", "--json").stdout)}
    assert {"unipc", "ddim", "dc", "dualfast"} <= names
    assert "@inproceedings" in run("cite", "unipc").stdout
    assert "arXiv:2302.04867" in run("solvers", "show", "unipc").stdout
    plan = json.loads(run("plan", "--solver", "unipc", "--steps", 8, "--json").stdout)
    assert len(plan["rows"]) == 8 and plan["fingerprint"]
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["packages"]["torch"] and facts["problems"] == []


def test_the_whole_help_does_not_show():
    text = run("--help").stdout
    for command in ("generate", "bench", "report", "calibrate", "solvers", "plan", "cite", "doctor"):
        assert command in text
    assert "--seeds" in run("generate", "--help").stdout


def test_files_outside_the_package_are_needed(tmp_path):
    # From another folder, so that nothing of the checkout is importable by accident.
    done = run("generate", "--seeds", "0", "--steps", "1", cwd=tmp_path)
    assert (tmp_path / "outputs" / "fashion-0001" / "seed-000000.png").exists(), done.stdout
    assert Path(json.loads(run("generate", "--dry-run", cwd=tmp_path).stdout)["out"]).name == "fashion-0002"
