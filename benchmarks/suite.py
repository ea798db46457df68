"""The README's table: solvers of the registry and stock diffusers schedulers on the embedded model, with intervals.

    python benchmarks/suite.py --quick        two solvers, 64 pictures: does it run
    python benchmarks/suite.py                the table as it is committed
    python benchmarks/suite.py --full         every solver, 3 to 20 network calls, 10,000 pictures (days on one core;
                                              resumable; start it under torchrun, or once for each core)
    python benchmarks/suite.py --verify       make the first chunk of every committed cell again and compare

The figure is FD[fashion-cnn], the Fréchet distance of the embedded classifier's features against the 10,000 test
pictures. It is biased upwards at small n, equally for all cells; compare cells, not papers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels" / "torch-ext")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from diffsamp.report import markdown, print_table, write_png, write_report  # noqa: E402
from diffsamp.report.results import cell_name  # noqa: E402
from diffsamp.run.bench import Bench, preview  # noqa: E402
from diffsamp.run.chunk import read_chunk, write_whole  # noqa: E402
from diffsamp.run.matrix import matrix  # noqa: E402

STOCK = (
    "diffusers:DDIMScheduler",
    "diffusers:DPMSolverMultistepScheduler",
    "diffusers:UniPCMultistepScheduler",
    "diffusers:DEISMultistepScheduler",
    "diffusers:EulerDiscreteScheduler",
    "diffusers:HeunDiscreteScheduler",
    "diffusers:DPMSolverSinglestepScheduler",
)
TABLE = ("unipc", "dpmpp-2m", "ddim", "diffusers:UniPCMultistepScheduler", "diffusers:DPMSolverMultistepScheduler")
METRICS = ("fd", "kid", "accuracy", "precision", "recall")
PROBE = 8  # features of the first chunk's mean that are kept, to compare a repetition on another machine with


def registry() -> list[str]:
    """Every solver that stands alone, and every transform by its own default base."""
    from diffsamp.registry import solvers

    return [name for name, info in solvers().items() if not info.transform or info.base is not None]


def probe(root: Path, folder: str) -> list[float]:
    """The mean of the first features over the first chunk."""
    arrays, _ = read_chunk(root / "cells" / folder, 0)
    return [float(v) for v in arrays["features"][:, :PROBE].astype("float64").mean(0)]


def verify(expected: dict, root: Path) -> int:
    """Make the first chunk of every expected cell again; the number of cells that differ."""
    wrong = 0
    for cell in expected["cells"]:
        job = Bench(
            root / "verify", solvers=[cell["solver"]], nfe=[cell["nfe"]], guidance_scale=[cell["guidance_scale"]],
            n=expected["chunk"], chunk=expected["chunk"], seed=expected["seed"], metrics=["fd"], replicates=2,
        )  # fmt: skip
        results = job.run()
        if results["model_sha256"] != expected["model_sha256"]:
            print("the embedded model is another one than that of the committed table: nothing to compare")
            return 1
        found = probe(root / "verify", results["cells"][0]["folder"])
        scale = max(map(abs, cell["probe"])) or 1.0
        gap = max(abs(a - b) for a, b in zip(found, cell["probe"], strict=True)) / scale
        same = results["cells"][0]["calls"] == cell["calls"] and gap < 1e-3
        wrong += not same
        print(f"{'ok ' if same else 'NOT'} {cell_name(cell)} @ {cell['calls']}: {gap:.1e} relative")
    return wrong


def losses(results: dict) -> list[str]:
    """Where a stock scheduler is ahead of every solver of the registry by more than the intervals."""
    told = []
    for calls in sorted({c["nfe"] for c in results["cells"]}):
        cells = [c for c in results["cells"] if c["nfe"] == calls]
        ours = [c for c in cells if not c["solver"].startswith("diffusers:")]
        stock = [c for c in cells if c["solver"].startswith("diffusers:")]
        if not ours or not stock:
            continue
        best, peer = (min(part, key=lambda c: c["metrics"]["fd"][0]) for part in (ours, stock))
        if peer["metrics"]["fd"][0] < best["metrics"]["fd"][0]:
            clear = "" if peer["metrics"]["fd"][2] < best["metrics"]["fd"][1] else " (the intervals overlap)"
            told.append(f"- {calls} calls: `{peer['solver']}` is ahead of our best, `{best['solver']}`{clear}.")
    return told


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two solvers, 64 pictures")
    parser.add_argument("--full", action="store_true", help="every solver, 3 to 20 calls, 10,000 pictures")
    parser.add_argument("--verify", action="store_true", help="compare a sample with the committed figures")
    parser.add_argument("--json", action="store_true", help="print results as JSON")
    parser.add_argument("--n", type=int, help="pictures per cell")
    parser.add_argument("--nfe", type=int, nargs="+", help="network calls")
    parser.add_argument("--solvers", nargs="+", help="solver names")
    parser.add_argument("--out", type=Path, default=Path("runs/suite"), help="run folder (resumed if it is there)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/suite.{md,json,png}")
    args = parser.parse_args()
    committed = HERE / "results" / "suite.json"
    if args.verify:
        sys.exit(1 if verify(json.loads(committed.read_text()), args.out) else 0)
    solvers, nfe, n = list(TABLE), [5, 8], 256
    if args.quick:
        solvers, nfe, n = ["unipc", "diffusers:UniPCMultistepScheduler"], [4], 64
    if args.full:
        solvers, nfe, n = registry() + list(STOCK), list(range(3, 21)), 10_000
    job = Bench(
        args.out / ("quick" if args.quick else "full" if args.full else "table"), solvers=args.solvers or solvers,
        nfe=args.nfe or nfe, n=args.n or n, metrics=METRICS,
    )  # fmt: skip
    total = len(matrix(job.solvers, job.nfe, job.guidance_scale))
    seen: dict[str, int] = {}

    def told(cell, done: int, chunks: int) -> None:
        seen.setdefault(cell.name, len(seen) + 1)
        print(f"\r{seen[cell.name]}/{total} {cell.name}: chunk {done}/{chunks}   ", end="", file=sys.stderr, flush=True)

    results = job.run(told)
    print(file=sys.stderr)
    for cell in results["cells"]:
        cell["probe"] = probe(job.root, cell["folder"])
    write_report([job.root], job.root / "report.html")
    if args.write:
        write_results(results, committed.parent)
    print(json.dumps(results, sort_keys=True)) if args.json else print_table(results)
    assert len(preview(job.root, results["cells"][0]["folder"], 8)) == 8


def write_results(results: dict, home: Path) -> None:
    """The committed files."""
    reference, made, n = results["reference"], results["environment"], results["cells"][0]["n"]
    head = (
        f"# Quality against network calls on the embedded model\n\n"
        f"`python benchmarks/suite.py --write`; n = {n} pictures per cell, guidance as the model ships, 95 % intervals "
        f"(bootstrap over pictures, Wilson for shares), best of each number of calls in bold. Same seeds in all cells. "
        f"{results['distance']} is the Fréchet distance of the embedded classifier's features against {reference['n']} "
        f"test pictures, not FID; its floor, {reference['floor_note']}, is {reference['floor']:.3g}; it is biased "
        f"upwards by small n, alike in all cells.\n\n"
        f"Model weights {results['model_sha256'][:12]}, torch {made.get('torch')}, diffusers {made.get('diffusers')}, "
        f"{made['processor']}, one thread.\n\n"
    )
    lost = losses(results)
    tail = "\nWhere we lose:\n\n" + "\n".join(lost) + "\n" if lost else "\nNo stock scheduler in this table is ahead.\n"
    home.mkdir(exist_ok=True)
    write_whole(home / "suite.md", (head + markdown(results) + tail).encode())
    write_whole(home / "suite.json", json.dumps(results, indent=1, sort_keys=True).encode())
    write_png(results, home / "suite.png", "fd")


if __name__ == "__main__":
    main()
