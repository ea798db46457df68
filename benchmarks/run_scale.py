"""What chunks cost: overhead per chunk, time and memory against n, opening a million chunks, two processes against one.

    python benchmarks/run_scale.py --write      about 3 minutes; two idle cores, or the two-process figure means nothing
    python benchmarks/run_scale.py --quick

Overhead: the generator is cheap on purpose (128 random features per seed), so what is left is the run itself. Wall time
on a busy disk is mostly the wait for fsync, which is measured in the same run and shown beside it.

Two processes: the embedded model with guidance, five calls of UniPC, one thread each, the same chunks by one process
and by two on a shared folder. The control is the same generator in two processes that share nothing: what the machine
itself allows. Rounds alternate, and the best of each is compared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels" / "torch-ext")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from diffsamp import files  # noqa: E402
from diffsamp.metrics.moments import FrechetStats  # noqa: E402
from diffsamp.run import RunFolder, run_chunks  # noqa: E402
from diffsamp.run import manifest as manifests  # noqa: E402
from diffsamp.run.environment import environment  # noqa: E402

ROWS = 32  # seeds in a chunk of the two-process part


def cheap(seeds: np.ndarray) -> dict[str, np.ndarray]:
    """128 features per seed."""
    return {"features": np.random.default_rng(int(seeds[0])).standard_normal((len(seeds), 128), np.float32)}


class Timed:
    """Wall and CPU seconds spent in a function."""

    def __init__(self, function: Any) -> None:
        self.function, self.wall, self.cpu = function, 0.0, 0.0

    def __call__(self, *arguments: Any) -> Any:
        start, used = time.perf_counter(), time.thread_time()
        try:
            return self.function(*arguments)
        finally:
            self.wall += time.perf_counter() - start
            self.cpu += time.thread_time() - used


def _measured(n: int, queue: Any) -> None:
    with tempfile.TemporaryDirectory() as root:
        make, sync = Timed(cheap), Timed(os.fsync)
        files.os.fsync = sync
        start, used = time.perf_counter(), time.thread_time()
        folder = RunFolder(Path(root) / "r", {}, n)
        run_chunks(folder.root, {}, make, n, collect=False)
        wall, cpu = time.perf_counter() - start, time.thread_time() - used
        start = time.perf_counter()
        stats = FrechetStats()
        for _, arrays, _ in folder.stream():  # the statistics need one chunk in memory at a time
            stats.update(arrays["features"])
        reduce = time.perf_counter() - start
        per = 1000 / folder.count
        queue.put(
            {
                "n": n, "chunks": folder.count, "seconds": wall, "ms_per_chunk": per * (wall - make.wall),
                "fsync_ms_per_chunk": per * sync.wall, "cpu_ms_per_chunk": per * (cpu - make.cpu),
                "reduce_seconds": reduce, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )  # fmt: skip


def in_process(function: Any, *arguments: Any) -> Any:
    """The result of a function in a process of its own: its memory is its own too."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def _worker(pipe: Any) -> None:
    """Loads the model, then runs what it is told: (folder or None for the bare generator, chunks, rank, world)."""
    import torch

    from diffsamp.metrics import extractor
    from diffsamp.run.matrix import Cell
    from diffsamp.run.pipelines import PipelineGenerator, load_model, set_solver

    torch.set_num_threads(1)
    model, _ = load_model("fashion")
    config = {**model.scheduler.config, "_class_name": type(model.scheduler).__name__}
    set_solver(model, "unipc", config)
    generate = PipelineGenerator(
        model, Cell("unipc", 5), extractor("fashion-cnn"), steps=5, first_seed=0, keep=0, chunk=ROWS, threads=1
    )
    generate(np.arange(ROWS))  # warm
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        root, chunks, rank, world = order
        used = time.thread_time()
        if root is None:
            for index in range(rank, chunks, world):
                generate(np.arange(index * ROWS, (index + 1) * ROWS))
        else:
            run_chunks(root, {}, generate, chunks * ROWS, chunk=ROWS, rank=rank, world=world, collect=False)
        pipe.send(time.thread_time() - used)


def throughput(chunks: int, rounds: int) -> dict[str, float]:
    """Chunks a second of one and of two processes: with runs on a shared folder, and bare."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for _ in range(2):
        here, there = context.Pipe()
        worker = context.Process(target=_worker, args=(there,))
        worker.start()
        pipes.append(here)
        workers.append(worker)
    for pipe in pipes:
        assert pipe.recv() == "ready"
    found: dict[str, float] = {}
    for _ in range(rounds):
        for kind in ("bare", "run"):
            for world in (1, 2):
                with tempfile.TemporaryDirectory() as root:
                    start = time.perf_counter()
                    for rank in range(world):
                        pipes[rank].send((f"{root}/r" if kind == "run" else None, chunks, rank, world))
                    cpu = sum(pipes[rank].recv() for rank in range(world))
                    rate = chunks / (time.perf_counter() - start)
                name = f"{kind}_{world}"
                found[name] = max(found.get(name, 0.0), rate)
                found[f"cpu_{name}"] = min(found.get(f"cpu_{name}", np.inf), cpu / chunks)
    for pipe, worker in zip(pipes, workers, strict=True):
        pipe.send(None)
        worker.join()
    return found


def _opened(root: str, queue: Any) -> None:
    start, used = time.perf_counter(), time.thread_time()
    folder = RunFolder.existing(root)
    done = folder.adopt()
    wall, cpu = time.perf_counter() - start, time.thread_time() - used
    assert len(done) == folder.count
    queue.put(
        {"chunks": len(done), "seconds": wall, "cpu_seconds": cpu,
         "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    )  # fmt: skip


def opening(chunks: int) -> dict[str, float]:
    """Seconds to open a run of many finished chunks, in a fresh process.

    Every chunk has its name in its folder and its line in the manifest; the names of one folder are links to one empty
    file, as opening reads names alone and a million inodes would take the benchmark's time.
    """
    with tempfile.TemporaryDirectory() as root:
        folder = RunFolder(Path(root) / "r", {}, chunks * 64)
        with (folder.root / manifests.NAME).open("w") as lines:
            for first in range(0, chunks, 1000):
                home = folder.root / "chunks" / f"{first // 1000:04d}"
                home.mkdir(parents=True)
                names = [f"chunk-{index:06d}.safetensors" for index in range(first, min(first + 1000, chunks))]
                (home / names[0]).touch()
                handle = os.open(home, os.O_RDONLY)
                for name in names[1:]:
                    os.link(names[0], name, src_dir_fd=handle, dst_dir_fd=handle)
                os.close(handle)
                lines.writelines(
                    f'{{"chunk":{index},"sha256":"{index:064x}","seconds":0.1,"worker":"node-17:123456"}}\n'
                    for index in range(first, first + len(names))
                )
        return in_process(_opened, str(folder.root))


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/run_scale.{md,json}")
    args = parser.parse_args()
    sizes, many, chunks, rounds = (1000, 10_000, 50_000), (10_000, 100_000, 1_000_000), 16, 2
    if args.quick:
        sizes, many, chunks, rounds = (500, 1000), (10_000,), 4, 1
    load = os.getloadavg()[0]
    rows = [in_process(_measured, n) for n in sizes]
    rates = throughput(chunks, rounds)
    found = {
        "scale": rows, "opening": [opening(count) for count in many], "throughput": rates,
        "ratio": rates["run_2"] / rates["run_1"], "bare_ratio": rates["bare_2"] / rates["bare_1"],
        "environment": environment(), "load": load,
    }  # fmt: skip
    text = table(found)
    if args.write:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "run_scale.md").write_text(text)
        (HERE / "results" / "run_scale.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found) if args.json else text)


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    made, rates = found["environment"], found["throughput"]
    lines = [
        "# What chunks cost", "",
        f"`python benchmarks/run_scale.py --write`; {made['processor']}, {made['cores']} cores, torch {made['torch']}, "
        f"load {found['load']:.1f} at the start.", "",
        "Overhead: everything but the generator, with an fsync for every chunk. The wait for fsync is the disk's.", "",
        "| n | chunks of 64 | seconds | overhead, ms per chunk | of it fsync | CPU, ms per chunk | reduction, s | peak "
        "memory, MiB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for r in found["scale"]:
        lines.append(
            f"| {r['n']:,} | {r['chunks']} | {r['seconds']:.2f} | {r['ms_per_chunk']:.2f} | "
            f"{r['fsync_ms_per_chunk']:.2f} | {r['cpu_ms_per_chunk']:.2f} | {r['reduce_seconds']:.2f} | "
            f"{r['peak_mib']:.0f} |"
        )
    lines += [
        "", "Opening a run of finished chunks (listing the names, reading the manifest) in a fresh process:", "",
        "| chunks | seconds | of it CPU | peak memory, MiB |", "| ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for r in found["opening"]:
        lines.append(f"| {r['chunks']:,} | {r['seconds']:.2f} | {r['cpu_seconds']:.2f} | {r['peak_mib']:.0f} |")
    lines += [
        "", f"Two processes against one, embedded model with guidance, chunks of {ROWS}, one thread each:", "",
        "| | 1 process, chunks/s | 2 processes, chunks/s | ratio | CPU s per chunk, 1 and 2 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for kind, told, ratio in (("run", "a run", found["ratio"]), ("bare", "the bare generator", found["bare_ratio"])):
        lines.append(
            f"| {told} | {rates[f'{kind}_1']:.2f} | {rates[f'{kind}_2']:.2f} | {ratio:.2f} | "
            f"{rates[f'cpu_{kind}_1']:.2f}, {rates[f'cpu_{kind}_2']:.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
