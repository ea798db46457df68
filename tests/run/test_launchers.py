"""torchrun and accelerate launch with two gloo ranks: the result hash and the metrics of one process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
from ranks_worker import metric_values
from test_run_chunks import ENVIRONMENT, HERE, generate

from diffsamp.errors import DiffsampError
from diffsamp.run import run_chunks
from diffsamp.run.engines import ranks, resolve


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(tool: str, folder, out) -> dict:
    script, port = str(HERE / "ranks_worker.py"), str(free_port())
    if tool == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
        command += ["--num_machines=1", "--mixed_precision=no"]
        command += ["--dynamo_backend=no", "--num_cpu_threads_per_process=1", f"--main_process_port={port}"]
    command += [script, str(folder), str(out)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("tool", ["torchrun", "accelerate"])
def test_two_ranks_equal_one_process(tool, tmp_path):
    found = launch(tool, tmp_path / "run", tmp_path / "out.json")
    assert found["sha256"] == run_chunks(tmp_path / "one", {"fake": 1}, generate, 300, chunk=10).sha256
    workers = {json.loads(line)["worker"] for line in (tmp_path / "run" / "manifest.jsonl").read_text().splitlines()}
    assert len(workers) == 2  # both ranks worked
    alone = metric_values(0, (60, 0), 1)
    for name in ("uneven", "empty"):
        for metric, value in alone.items():
            assert found[name][metric] == pytest.approx(value, rel=1e-9, abs=1e-12), (name, metric)


def test_engines_are_named_and_read_from_the_environment(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert resolve("auto") == "shared" and ranks("auto") == (0, 1)
    with pytest.raises(DiffsampError, match="accepted: auto, local, torch, shared"):
        resolve("ray-cluster")
    with pytest.raises(DiffsampError, match="torchrun or accelerate launch"):
        resolve("torch")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "8")
    assert ranks("auto") == (3, 8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert resolve("auto") == "torch" and ranks("auto") == (1, 2)
