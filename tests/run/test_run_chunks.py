"""Runs in chunks: repeatable, resumable after any kill, whole files only, clear when the disk or the folder is bad."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import diffsamp.files as files_module
import diffsamp.run.folder as folder_module
from diffsamp.errors import DiffsampError
from diffsamp.run import RunFolder, run_chunks
from diffsamp.run import manifest as manifest_module
from diffsamp.run.chunk import CorruptChunk, chunk_path, read_chunk, write_chunk

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels' / 'torch-ext'}", "OMP_NUM_THREADS": "1"}


def generate(seeds: np.ndarray) -> dict[str, np.ndarray]:
    rows = [np.random.default_rng(int(seed)).standard_normal(16) for seed in seeds]
    return {"features": np.stack(rows).astype(np.float32), "labels": seeds % 10}


def start(
    folder: Path, n: int, chunk: int, seconds: float, engine: str = "shared", before: Callable[[], None] | None = None
) -> subprocess.Popen:
    command = [sys.executable, str(HERE / "fake_run.py"), str(folder), str(n), str(chunk), str(seconds), engine]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before
    )


def finish(process: subprocess.Popen) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.strip()


def test_rows_are_the_seeds_in_order_and_padding_is_cut(tmp_path):
    calls = []

    def noted(seeds):
        calls.append(len(seeds))
        return generate(seeds)

    result = run_chunks(tmp_path / "r", {}, noted, 150, seed=7, chunk=64)
    assert calls == [64, 64, 64]  # the last chunk is padded to one shape
    assert np.array_equal(result.arrays["features"], generate(np.arange(7, 157))["features"])
    assert run_chunks(tmp_path / "r", {}, noted, 150, seed=7, chunk=64).sha256 == result.sha256
    assert len(calls) == 3  # a finished run is read, not made again


def test_result_of_independent_processes_equals_one(tmp_path):
    expected = run_chunks(tmp_path / "one", {"fake": 1}, generate, 500, chunk=10).sha256
    workers = [start(tmp_path / "two", 500, 10, 0.01) for _ in range(2)]
    assert {finish(worker) for worker in workers} == {expected}
    entries = [json.loads(line) for line in (tmp_path / "two" / "manifest.jsonl").read_text().splitlines()]
    assert sorted(e["chunk"] for e in entries) == list(range(50))  # no chunk was made twice
    assert len({e["worker"] for e in entries}) == 2  # both worked


def test_fifty_kills_leave_the_same_result_and_no_partial_file(tmp_path, monkeypatch):
    n, chunk = 600, 4
    monkeypatch.setitem(ENVIRONMENT, "FAKE_RUN_LOG", str(tmp_path / "begun"))
    expected = run_chunks(tmp_path / "calm", {"fake": 1}, generate, n, chunk=chunk).sha256
    folder, rng = tmp_path / "killed", random.Random(0)
    partial: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        # Whatever is visible under a chunk's name at any moment must be whole.
        while not stop.is_set():
            for path in folder.glob("chunks/*/chunk-*.safetensors"):
                try:
                    read_chunk(folder, int(path.stem[6:]))
                except CorruptChunk as error:
                    partial.append(str(error))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kills = done_before = deleted = 0
    try:
        while kills < 50:
            worker = start(folder, n, chunk, 0.02)
            # Die during import, in a chunk, in a write: any time from the start on.
            try:
                worker.wait(0.1 + rng.random() * 0.3)
            except subprocess.TimeoutExpired:
                worker.kill()
                kills += 1
            worker.communicate()
            done = RunFolder.existing(folder).present() if (folder / "run.json").is_file() else set()
            assert len(done) >= done_before  # nothing that was finished is lost
            done_before = len(done)
            if done_before == n // chunk:
                # All done before all kills: make room for more by deleting some chunks.
                for index in rng.sample(range(n // chunk), n // chunk // 2):
                    chunk_path(folder, index).unlink()
                    deleted += 1
                done_before = 0
        assert finish(start(folder, n, chunk, 0.0)) == expected
        assert not list(folder.rglob(".*"))  # nor is anything left of the killed writers
    finally:
        stop.set()
        watcher.join()
    assert not partial
    begun = len((tmp_path / "begun").read_text().splitlines())
    assert n // chunk + deleted <= begun <= n // chunk + deleted + kills  # a kill costs the chunk in work, no more


def test_a_kill_costs_at_most_one_chunk_per_worker(tmp_path):
    folder = tmp_path / "r"
    workers = [start(folder, 200, 4, 0.03) for _ in range(2)]
    while not (folder / "run.json").is_file() or len(RunFolder.existing(folder).present()) < 10:
        time.sleep(0.02)
    workers[0].kill()
    workers[0].communicate()
    assert finish(workers[1])  # the other takes over what the dead one held
    entries = [json.loads(line)["chunk"] for line in (folder / "manifest.jsonl").read_text().splitlines()]
    # 50 chunks, each entered once; a chunk that was written but not entered is adopted, one in work is done again.
    assert len(set(entries)) >= 49 and len(entries) <= 51
    assert len(RunFolder.existing(folder).present()) == 50


def test_corrupted_chunks_are_found_by_hash_and_made_again(tmp_path):
    folder = tmp_path / "r"
    expected = run_chunks(folder, {}, generate, 40, chunk=4).sha256
    flipped = chunk_path(folder, 3)
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    chunk_path(folder, 5).write_bytes(b"short")
    chunk_path(folder, 7).unlink()
    os.replace(chunk_path(folder, 8), chunk_path(folder, 9))  # a whole chunk in another one's place
    with pytest.raises(CorruptChunk):
        read_chunk(folder, 9)
    made = []

    def noted(seeds):
        made.append(int(seeds[0]) // 4)
        return generate(seeds)

    assert run_chunks(folder, {}, noted, 40, chunk=4).sha256 == expected
    assert sorted(made) == [3, 5, 7, 8, 9]
    assert flipped.with_name("corrupt-chunk-000003.safetensors").is_file()  # kept for whoever asks why


def test_torn_and_lost_manifest_lines_do_no_harm(tmp_path):
    folder = tmp_path / "r"
    expected = run_chunks(folder, {}, generate, 40, chunk=4).sha256
    path = folder / "manifest.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:6]) + '\n{"chunk":6,"sha')
    manifest_module.append(folder, {"chunk": 9, "sha256": json.loads(lines[9])["sha256"], "seconds": 1.0})
    assert sorted(manifest_module.read(folder)) == [0, 1, 2, 3, 4, 5, 9]

    def never(seeds):
        raise AssertionError("a finished chunk was made again")

    assert run_chunks(folder, {}, never, 40, chunk=4).sha256 == expected
    assert sorted(manifest_module.read(folder)) == list(range(10))


def test_another_recipe_in_the_folder_is_refused_by_name(tmp_path):
    run_chunks(tmp_path / "r", {"solver": "unipc"}, generate, 8, chunk=4)
    with pytest.raises(DiffsampError, match="solver is 'unipc' there and 'ddim' here"):
        run_chunks(tmp_path / "r", {"solver": "ddim"}, generate, 8, chunk=4)
    with pytest.raises(DiffsampError, match="n is 8 there and 12 here"):
        run_chunks(tmp_path / "r", {"solver": "unipc"}, generate, 12, chunk=4)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(DiffsampError, match=r"is no run \(it holds thesis.tex\)"):
        run_chunks(tmp_path / "other", {}, generate, 8, chunk=4)


def test_a_disk_that_fills_up_is_told_and_the_run_goes_on_afterwards(tmp_path, monkeypatch):
    folder, real, count = tmp_path / "r", os.fsync, [0]

    def full(handle):
        count[0] += 1
        if count[0] > 5:
            raise OSError(28, "No space left on device")
        return real(handle)

    monkeypatch.setattr(files_module.os, "fsync", full)
    with pytest.raises(DiffsampError, match="No space left on device; what is finished is kept"):
        run_chunks(folder, {}, generate, 40, chunk=4)
    monkeypatch.undo()
    assert not list(folder.rglob(".*"))
    expected = run_chunks(tmp_path / "calm", {}, generate, 40, chunk=4).sha256
    assert 0 < len(RunFolder.existing(folder).present()) < 10
    assert run_chunks(folder, {}, generate, 40, chunk=4).sha256 == expected


def test_a_write_that_the_system_refuses_keeps_what_is_finished(tmp_path):
    # A limit on the size of a file refuses a real write in the middle of a run: of the manifest, after some chunks.
    folder = tmp_path / "r"
    limited = start(folder, 400, 4, 0.0, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    _, error = limited.communicate(timeout=120)
    last = error.strip().splitlines()[-1]
    assert limited.returncode and "cannot write" in last and "what is finished is kept" in last
    done = RunFolder.existing(folder).present()
    assert 10 < len(done) < 100 and (folder / "manifest.jsonl").stat().st_size == 4096  # cut inside a line
    made = []

    def noted(seeds):
        made.append(int(seeds[0]) // 4)
        return generate(seeds)

    result = run_chunks(folder, {"fake": 1}, noted, 400, chunk=4)
    assert result.sha256 == run_chunks(tmp_path / "calm", {"fake": 1}, generate, 400, chunk=4).sha256
    assert sorted(made) == sorted(set(range(100)) - done)  # the chunk whose line was cut is not made again
    assert sorted(manifest_module.read(folder)) == list(range(100))


def test_a_read_only_folder_is_one_clear_line():
    # Rights do not bind the superuser, so the run is tried by a child that gave them up.
    home = Path(tempfile.mkdtemp())
    try:
        folder = home / "r"
        expected = run_chunks(folder, {}, generate, 8, chunk=4).sha256
        chunk_path(folder, 1).unlink()
        for path in (home, folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        theirs, ours = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if os.getuid() == 0:
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                run_chunks(folder, {}, generate, 8, chunk=4)
                os.write(ours, b"it was written")
            except BaseException as error:
                os.write(ours, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        told = os.read(theirs, 10_000).decode()
        os.close(ours)
        os.close(theirs)
        assert told.startswith("NotWritten: cannot write ") and "Permission denied" in told and "\n" not in told
        for path in (home, folder, *folder.rglob("*")):
            path.chmod(0o755)
        assert run_chunks(folder, {}, generate, 8, chunk=4).sha256 == expected
    finally:
        shutil.rmtree(home)


def test_a_read_only_file_system_and_a_file_in_the_way_are_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffsampError, match="cannot write"):
        run_chunks(tmp_path / "file" / "r", {}, generate, 8, chunk=4)

    def refused(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files_module.os, "replace", refused)
    with pytest.raises(DiffsampError, match="Read-only file system") as caught:
        run_chunks(tmp_path / "r", {}, generate, 8, chunk=4)
    assert "\n" not in str(caught.value)


def test_two_different_runs_that_start_at_once_in_one_folder_do_not_mix(tmp_path):
    # Whoever comes first has the folder; the other is told.
    folder = tmp_path / "r"
    workers = [start(folder, n, 4, 0.01) for n in (120, 160)]
    codes = []
    for worker in workers:
        _, error = worker.communicate(timeout=120)
        codes.append(worker.returncode)
        assert worker.returncode == 0 or "holds another run: n is" in error
    assert 0 in codes
    run = RunFolder.existing(folder)
    assert run.n in (120, 160) and len(run.present()) == run.count


def test_a_run_that_appears_between_the_look_and_the_write_is_not_replaced(tmp_path, monkeypatch):
    folder, real = tmp_path / "r", folder_module.write_whole

    def late(path, data, **options):
        monkeypatch.undo()
        RunFolder(folder, {"solver": "unipc"}, 8)
        real(path, data, **options)

    monkeypatch.setattr(folder_module, "write_whole", late)
    with pytest.raises(DiffsampError, match="solver is 'unipc' there and 'ddim' here"):
        RunFolder(folder, {"solver": "ddim"}, 8)
    assert RunFolder.existing(folder).facts["recipe"] == {"solver": "unipc"}


def test_the_manifest_is_read_in_blocks_and_bad_lines_cost_only_themselves(tmp_path, monkeypatch):
    lines = [f'{{"chunk":{i},"sha256":"{i:064x}","seconds":0.5}}' for i in range(300)]
    for bad, text in ((7, '{"chunk":7,"sha'), (150, "[1,2]"), (151, ""), (222, '{"chunk":"222"}')):
        lines[bad] = text
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    whole = {e["chunk"] for e in manifest_module.entries(tmp_path)}
    assert whole == set(range(300)) - {7, 150, 151, 222}
    monkeypatch.setattr(manifest_module, "BLOCK", 1000)
    assert {e["chunk"] for e in manifest_module.entries(tmp_path)} == whole
    assert not list(manifest_module.entries(tmp_path / "nowhere"))


def test_only_chunk_names_of_this_run_count_as_present(tmp_path):
    run_chunks(tmp_path / "r", {}, generate, 12, chunk=4)
    home = chunk_path(tmp_path / "r", 0).parent
    for name in ("chunk-000009.safetensors", ".chunk-000001.safetensors.ab.partial", "chunk-x.safetensors", "notes"):
        (home / name).write_text("")
    (home.parent / "readme").write_text("")
    assert RunFolder.existing(tmp_path / "r").present() == {0, 1, 2}


def test_generators_that_return_the_wrong_rows_are_refused(tmp_path):
    with pytest.raises(DiffsampError, match="first axis 4, one row per seed"):
        run_chunks(tmp_path / "a", {}, lambda seeds: {"x": np.zeros(3)}, 8, chunk=4)
    with pytest.raises(DiffsampError, match="no arrays"):
        run_chunks(tmp_path / "b", {}, lambda seeds: {}, 8, chunk=4)
    with pytest.raises(DiffsampError, match="n=0"):
        run_chunks(tmp_path / "c", {}, generate, 0)


def test_a_chunk_file_is_the_same_bytes_wherever_it_is_made(tmp_path):
    a = write_chunk(tmp_path / "a", 5, generate(np.arange(4)))
    b = write_chunk(tmp_path / "b", 5, dict(reversed(generate(np.arange(4)).items())))
    assert a == b
    assert chunk_path(tmp_path / "a", 5).read_bytes() == chunk_path(tmp_path / "b", 5).read_bytes()


def test_run_needs_no_torch():
    code = "import sys, diffsamp.run as r; r.run_chunks, r.run_on; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)
