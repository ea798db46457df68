"""What chunks cost: overhead per chunk, time and memory against n, opening a million chunks, two processes against one.

The generator is cheap on purpose (128 random features per seed), so that what is left is the run itself. The throughput
of two processes uses a generator that waits 100 ms a chunk (a real chunk takes seconds), which measures the
coordination and not the number of idle cores.
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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from diffsamp.metrics.moments import FrechetStats  # noqa: E402
from diffsamp.run import RunFolder, run_chunks  # noqa: E402
from diffsamp.run import manifest as manifests  # noqa: E402
from diffsamp.run.environment import environment  # noqa: E402


def cheap(seeds: np.ndarray) -> dict[str, np.ndarray]:
    """128 features per seed."""
    return {"features": np.random.default_rng(int(seeds[0])).standard_normal((len(seeds), 128), np.float32)}


def waiting(seeds: np.ndarray) -> dict[str, np.ndarray]:
    """The same after 100 ms."""
    time.sleep(0.1)
    return cheap(seeds)


def _measured(n: int, queue) -> None:
    with tempfile.TemporaryDirectory() as root:
        inside = [0.0, 0.0]

        def timed(seeds: np.ndarray) -> dict[str, np.ndarray]:
            start, used = time.perf_counter(), time.process_time()
            made = cheap(seeds)
            inside[0] += time.perf_counter() - start
            inside[1] += time.process_time() - used
            return made

        start, used = time.perf_counter(), time.process_time()
        folder = RunFolder(Path(root) / "r", {}, n)
        run_chunks(folder.root, {}, timed, n, collect=False)
        wall, cpu = time.perf_counter() - start, time.process_time() - used
        start = time.perf_counter()
        stats = FrechetStats()
        for _, arrays, _ in folder.stream():  # the statistics need one chunk in memory at a time
            stats.update(arrays["features"])
        reduce = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        chunks = folder.count
        queue.put(
            {"n": n, "chunks": chunks, "seconds": wall, "ms_per_chunk": 1000 * (wall - inside[0]) / chunks,
             "cpu_ms_per_chunk": 1000 * (cpu - inside[1]) / chunks, "reduce_seconds": reduce, "peak_mib": peak}
        )  # fmt: skip


def scale(n: int) -> dict[str, float]:
    """Time and memory of a run of n seeds, in a process of its own."""
    queue = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=_measured, args=(n, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def _work(root: str, n: int, rank: int, world: int, gate) -> None:
    gate.wait()
    run_chunks(root, {}, waiting, n, rank=rank, world=world)


def throughput(world: int, chunks: int) -> float:
    """Chunks per second of `world` processes on one folder, imports not counted."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as root:
        gate = context.Barrier(world + 1)
        workers = [context.Process(target=_work, args=(f"{root}/r", chunks * 64, i, world, gate)) for i in range(world)]
        for worker in workers:
            worker.start()
        gate.wait()
        start = time.perf_counter()
        for worker in workers:
            worker.join()
        return chunks / (time.perf_counter() - start)


def opening(chunks: int) -> float:
    """Seconds to list and read a run of many chunks: empty files stand for the chunks, as only their names are read."""
    with tempfile.TemporaryDirectory() as root:
        folder = RunFolder(Path(root) / "r", {}, chunks * 64)
        lines = []
        for index in range(chunks):
            path = folder.root / "chunks" / f"{index // 1000:04d}"
            if index % 1000 == 0:
                path.mkdir(parents=True)
            (path / f"chunk-{index:06d}.safetensors").touch()
            lines.append(f'{{"chunk":{index},"sha256":"{index:064x}","seconds":0.1,"worker":"node-17:123456"}}\n')
        (folder.root / manifests.NAME).write_text("".join(lines))
        start = time.perf_counter()
        found = RunFolder.existing(folder.root)
        assert len(found.adopt()) == chunks
        return time.perf_counter() - start


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/run_scale.{md,json}")
    args = parser.parse_args()
    sizes, many, chunks = ((500, 1000), 10_000, 50) if args.quick else ((1000, 10_000, 50_000), 100_000, 100)
    rows = [scale(n) for n in sizes]
    one, two = throughput(1, chunks), throughput(2, chunks)
    found = {"scale": rows, "one": one, "two": two, "ratio": two / one, "chunks": many, "open_seconds": opening(many),
             "environment": environment(), "load": os.getloadavg()[0]}  # fmt: skip
    text = table(found)
    if args.write:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "run_scale.md").write_text(text)
        (HERE / "results" / "run_scale.json").write_text(json.dumps(found, indent=1, sort_keys=True))
    print(json.dumps(found) if args.json else text)


def table(found: dict) -> str:
    """As Markdown."""
    made = found["environment"]
    lines = [
        "# What chunks cost", "",
        "`python benchmarks/run_scale.py --write`. Overhead: all but the generator, with fsync of every chunk; "
        f"{made['processor']}, {made['cores']} cores, load {found['load']:.1f} while measured.", "",
        "| n | chunks of 64 | seconds | overhead, ms per chunk | of it CPU | reduction, s | peak memory, MiB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for r in found["scale"]:
        lines.append(
            f"| {r['n']:,} | {r['chunks']} | {r['seconds']:.2f} | {r['ms_per_chunk']:.2f} | "
            f"{r['cpu_ms_per_chunk']:.2f} | {r['reduce_seconds']:.2f} | {r['peak_mib']:.0f} |"
        )
    lines += [
        "", f"Two processes against one (100 ms of waiting per chunk): {found['two']:.1f} against {found['one']:.1f} "
        f"chunks a second, {found['ratio']:.2f} times.",
        f"Opening a run of {found['chunks']:,} finished chunks: {found['open_seconds']:.1f} s.", "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
