"""The Ray engine's own logic on a stand-in of Ray's calls: same hash, lost workers, errors of tasks, ray missing."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
from test_run_chunks import generate

from diffsamp.errors import DiffsampError
from diffsamp.run import RunFolder, ray_engine, run_chunks, run_on
from diffsamp.run.chunk import chunk_path
from diffsamp.run.engines import ranks


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback\nof many lines")
        self.cause = cause


class Stand:
    """Runs tasks in this process, newest first, so that the order differs from the order of the numbers."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, lost: tuple[int, ...] = ()) -> None:
        self.lost, self.cancelled, self.fetched, self.asked, self.most = lost, [], 0, {}, 0

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0, "GPU": 1.0}

    def put(self, value):
        return ("put", value)

    def remote(self, **asked):
        self.asked = asked
        return lambda function: SimpleNamespace(remote=lambda *arguments: ("task", function, arguments))

    def wait(self, flying, num_returns):
        self.most = max(self.most, len(flying))
        return [flying[-1]], flying[:-1]

    def get(self, reference):
        if reference[0] == "put":
            self.fetched += 1
            return reference[1]
        _, function, arguments = reference
        if arguments[-1] in self.lost:
            raise RayError("worker died")
        try:
            return function(*arguments)
        except Exception as error:
            raise RayTaskError(error) from None

    def cancel(self, reference) -> None:
        self.cancelled.append(reference)


def test_tasks_in_any_order_give_the_hash_of_one_process_and_fetch_the_model_once(tmp_path):
    expected = run_chunks(tmp_path / "one", {}, generate, 95, chunk=10).sha256
    stand, told = Stand(), []
    result = ray_engine.run_on_ray(
        tmp_path / "ray", {}, generate, 95, chunk=10, ray=stand, progress=lambda *facts: told.append(facts)
    )
    assert result.sha256 == expected and len(result.arrays["features"]) == 95
    assert stand.fetched == 1 and stand.asked == {"max_retries": 3, "num_cpus": 1}
    assert stand.most == 4  # two for each processor, not all at once
    assert [done for done, _, _ in told] == list(range(1, 11))


def test_chunks_of_lost_workers_are_made_at_the_end(tmp_path):
    expected = run_chunks(tmp_path / "one", {}, generate, 60, chunk=10).sha256
    found = ray_engine.run_on_ray(tmp_path / "ray", {}, generate, 60, chunk=10, ray=Stand(lost=(1, 4)))
    assert found.sha256 == expected


def test_finished_chunks_are_not_sent_again_and_a_held_one_is_left_to_its_process(tmp_path):
    run_chunks(tmp_path / "r", {}, generate, 40, chunk=10)
    chunk_path(tmp_path / "r", 2).unlink()
    sent = []

    def noted(seeds):
        sent.append(int(seeds[0]) // 10)
        return generate(seeds)

    ray_engine.run_on_ray(tmp_path / "r", {}, noted, 40, chunk=10, ray=Stand())
    assert sent == [2]
    # A chunk whose file appeared since the driver looked is not made twice.
    folder = RunFolder.existing(tmp_path / "r")
    assert ray_engine.make_chunk(str(folder.root), folder.facts, "another", lambda: noted, 1) == 1 and sent == [2]


def test_an_error_inside_a_task_reaches_the_caller_as_itself(tmp_path):
    stand = Stand()
    with pytest.raises(DiffsampError, match="first axis 10, one row per seed") as caught:
        ray_engine.run_on_ray(tmp_path / "r", {}, lambda seeds: {"x": np.zeros(3)}, 90, chunk=10, ray=stand)
    assert "\n" not in str(caught.value) and len(stand.cancelled) == 3


def test_a_generator_on_a_gpu_asks_for_one(tmp_path):
    class OnDevice:
        device = "cuda:0"

        def __call__(self, seeds):
            return generate(seeds)

    stand = Stand()
    ray_engine.run_on_ray(tmp_path / "r", {}, OnDevice(), 20, chunk=10, ray=stand)
    assert stand.asked == {"max_retries": 3, "num_gpus": 1}


def test_missing_ray_is_one_clear_line(tmp_path, monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name == "ray":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(DiffsampError, match=r"pip install 'diffsamp\[ray\]'") as caught:
        run_on("ray", tmp_path / "r", {}, generate, 10, chunk=10)
    assert "\n" not in str(caught.value) and not (tmp_path / "r").exists()
    with pytest.raises(DiffsampError, match="needs the package ray"):
        ranks("ray")
