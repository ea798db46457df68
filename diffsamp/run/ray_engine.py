"""Chunks as tasks of a Ray cluster: a task takes a chunk number and writes the chunk as every other engine does.

The folder must be shared by the cluster's nodes. Ray is an optional extra (`pip install diffsamp[ray]`) and imported
when the engine is asked for. A lost worker's task is tried again by Ray; what Ray gives up on, and what other processes
on the same folder hold, is made or awaited by the driver at the end, so the result is whole and its hash is that of one
process.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffsamp.errors import DiffsampError
from diffsamp.run.claims import Claims
from diffsamp.run.folder import RunFolder, RunResult
from diffsamp.run.work import Generate, Progress, attempt, run_chunks

RETRIES = 3  # of a task whose worker died
AHEAD = 2  # tasks in flight for each slot, so that no worker waits for the driver
_generators: dict[str, Generate] = {}  # of this worker process: the run at hand and its generator


def load_ray() -> Any:
    """The ray package; raises DiffsampError where it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise DiffsampError("engine='ray' needs the package ray; install it: pip install 'diffsamp[ray]'") from None


def make_chunk(root: str, facts: dict[str, Any], key: str, fetch: Callable[[], Generate], index: int) -> int:
    """The body of a task: make chunk `index` unless it is there or another process has it; returns the index.

    `fetch` gives the generator; it is called once for each process and run (`key`), as a model is costly to move.
    """
    if key not in _generators:
        _generators.clear()
        _generators[key] = fetch()
    folder = RunFolder(root, facts["recipe"], facts["n"], seed=facts["seed"], chunk=facts["chunk"])
    claims = Claims(folder.root)
    try:
        attempt(folder, claims, _generators[key], index)
    finally:
        claims.close()
    return index


def run_on_ray(
    root: str | Path,
    recipe: dict[str, Any],
    generate: Generate,
    n: int,
    *,
    seed: int = 0,
    chunk: int = 64,
    progress: Progress | None = None,
    collect: bool = True,
    ray: Any = None,
) -> RunResult:
    """`run_chunks` with the chunks made by Ray's workers; on the cluster of RAY_ADDRESS, or one that is started here.

    Raises DiffsampError where ray is not installed, and whatever `run_chunks` raises.
    """
    ray = ray or load_ray()
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    folder = RunFolder(Path(root).resolve(), recipe, n, seed=seed, chunk=chunk)
    done = folder.adopt()
    missing = [index for index in range(folder.count) if index not in done]
    if missing:
        _make_all(ray, folder, generate, missing, done, progress)
    return run_chunks(folder.root, recipe, generate, n, seed=seed, chunk=chunk, progress=progress, collect=collect)


def _make_all(
    ray: Any, folder: RunFolder, generate: Generate, missing: list[int], done: set[int], progress: Progress | None
) -> None:
    # In a list, or Ray would move the generator to the worker for every task.
    key, held = uuid.uuid4().hex, [ray.put(generate)]
    # Ray hides the GPUs from a task that does not ask for one.
    kind = "GPU" if str(getattr(generate, "device", "cpu")).startswith("cuda") else "CPU"
    asked = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    task = ray.remote(max_retries=RETRIES, **asked)(make_chunk)
    slots = AHEAD * max(int(ray.cluster_resources().get(kind, 1)), 1)
    waiting, flying = iter(missing), []

    def fetch() -> Generate:
        return ray.get(held[0])

    def send() -> None:
        for index in waiting:
            flying.append(task.remote(str(folder.root), folder.facts, key, fetch, index))
            return

    for _ in range(slots):
        send()
    while flying:
        ready, flying[:] = ray.wait(flying, num_returns=1)
        for one in ready:
            try:
                done.add(ray.get(one))
            except ray.exceptions.RayTaskError as error:
                for left in flying:
                    ray.cancel(left)
                raise getattr(error, "cause", error) from None
            except ray.exceptions.RayError:
                continue  # its workers died; the driver makes the chunk at the end
            finally:
                send()
            if progress is not None:
                progress(len(done), folder.count, False)
