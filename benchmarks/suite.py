"""The README's table: every solver of the registry and the stock diffusers schedulers on the embedded model.

    python benchmarks/suite.py --quick        three solvers, 64 pictures: does it run
    python benchmarks/suite.py --write        the table as it is committed (about 45 minutes of one core; resumable)
    python benchmarks/suite.py --run full     3 to 20 network calls, 10,000 pictures (days on one core; start it under
                                              torchrun, or once for each core)
    python benchmarks/suite.py --verify       make the first chunk of a sample of the committed cells again and compare
    python benchmarks/suite.py --verify --cells 0      of all of them

The runs are those of runs.json; beside each stands the file of results/ that holds its expected figures. The figure is
FD[fashion-cnn], the Fréchet distance of the embedded classifier's features against the 10,000 test pictures. It is
biased upwards at small n, equally for all cells; compare cells, not papers. All cells have the same seeds, so two cells
are compared by a paired bootstrap, which is much sharper than the intervals of each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels" / "torch-ext")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from diffsamp.errors import DiffsampError  # noqa: E402
from diffsamp.report import markdown, print_table, write_png, write_report  # noqa: E402
from diffsamp.report.results import cell_name  # noqa: E402
from diffsamp.run import RunFolder  # noqa: E402
from diffsamp.run.bench import Bench, preview  # noqa: E402
from diffsamp.run.chunk import read_chunk  # noqa: E402
from diffsamp.run.matrix import Cell, matrix  # noqa: E402

# Those of diffusers that take this model's config as it is. Left out: schedulers of other processes (EDM, flow,
# consistency and distilled models), those that need torchsde, and IPNDM, which ignores the model's noise schedule.
STOCK = (
    "DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerDiscrete",
    "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete", "PNDM",
    "SASolver", "UniPCMultistep",
)  # fmt: skip
# Ours against the stock scheduler that a user would have otherwise.
PAIRS = (
    ("dc", "UniPCMultistep"), ("unipc", "UniPCMultistep"), ("dpmpp-3s", "UniPCMultistep"),
    ("dualfast", "DPMSolverMultistep"), ("dpmpp-2m", "DPMSolverMultistep"), ("ddim", "DDIM"), ("deis", "DEISMultistep"),
    ("heun", "HeunDiscrete"), ("sa-solver", "SASolver"), ("ipndm", "LMSDiscrete"),
)  # fmt: skip
METRICS = ("fd", "kid", "accuracy", "precision", "recall")
PROBE = 8  # features of the first chunk's mean that are kept, to compare a repetition on another machine with
ROUNDING = 1e-3  # of FD: below this two cells hold the same pictures but for float32 rounding
TOLERANCE = 1e-3  # of the probe, between machines; on one machine it is 0
REPLICATES = 50
# Ratios at the model's own guidance scale and grid: `diffsamp calibrate dc --nfe 3,5,8,12,20 --guidance-scale 2 --grid
# trailing --out benchmarks/data/fashion-dc-unipc.safetensors`.
ARTIFACTS = HERE / "data"


def runs() -> dict[str, dict]:
    """The registry of runs, by name."""
    return json.loads((HERE / "runs.json").read_text())


def solvers_of(names: list[str]) -> list[str]:
    """Solver names, with "registry" and "stock" spelled out."""
    from diffsamp.registry import solvers

    found: list[str] = []
    for name in names:
        if name == "registry":
            # A transform stands by its own default base.
            found += [n for n, info in solvers().items() if not info.transform or info.base is not None]
        elif name == "stock":
            found += [f"diffusers:{n}Scheduler" for n in STOCK]
        else:
            found.append(name)
    return found


def choose(cells: list[Cell], artifacts: Path) -> tuple[list[Cell], list[str]]:
    """The cells to run, and why the others are not: no ratios, too few calls, or the very table of another solver."""
    from diffsamp.run.calibrated import with_ratios
    from diffsamp.run.pipelines import guidance_of, load_model, set_solver, steps_for

    pipe, sha256 = load_model("fashion")
    config = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
    kept, same, short = [], {}, {}
    first: dict[str, Cell] = {}
    for cell in cells:
        scale = guidance_of(pipe, cell.guidance_scale)
        try:
            made, _ = with_ratios(
                cell.solver, model="fashion", sha256=sha256, nfe=cell.nfe, guidance_scale=scale, folder=artifacts
            )
            set_solver(pipe, made, config)
            pipe.scheduler.set_timesteps(steps_for(pipe.scheduler, cell.nfe))
        except DiffsampError as error:
            why = "no calibrated values" if "artifact" in str(error) else "it needs more calls"
            short.setdefault((cell.solver, why), []).append(str(cell.nfe))
            continue
        plan = None if cell.solver.startswith("diffusers:") else pipe.scheduler.plan.fingerprint
        twin = first.setdefault(plan, cell) if plan else cell
        if twin is not cell:
            same.setdefault((cell.solver, twin.solver), []).append(str(cell.nfe))
        else:
            kept.append(cell)
    notes = [f"`{a}` at {', '.join(n)} calls is `{b}`, row for row; it ran once." for (a, b), n in same.items()]
    notes += [f"`{a}` at {', '.join(n)} calls is left out: {why}." for (a, why), n in short.items()]
    return kept, notes


def finished(cells: list[Cell], root: Path) -> tuple[list[Cell], list[str]]:
    """The cells whose chunks are all there, and a note on the others."""
    kept, missing = [], {}
    for cell in cells:
        folder = root / "cells" / cell.folder
        if (folder / "run.json").is_file() and len((run := RunFolder.existing(folder)).present()) == run.count:
            kept.append(cell)
        else:
            missing.setdefault(cell.nfe, []).append(f"`{cell.solver}`")
    return kept, [f"Not run at {nfe} calls: {', '.join(names)}." for nfe, names in missing.items()]


def probe(root: Path, folder: str) -> list[float]:
    """The mean of the first features over the first chunk."""
    arrays, _ = read_chunk(root / "cells" / folder, 0)
    return [float(v) for v in arrays["features"][:, :PROBE].astype("float64").mean(0)]


def verify(expected: dict, root: Path, count: int, *, artifacts: Path = ARTIFACTS) -> int:
    """Make the first chunk of `count` expected cells again (0: all, fixed sample); the number that differ."""
    cells = expected["cells"]
    if count:
        cells = random.Random(0).sample(cells, min(count, len(cells)))
    job = Bench(
        root, chosen=[Cell(c["solver"], c["nfe"], c["guidance_scale"]) for c in cells], n=expected["chunk"],
        chunk=expected["chunk"], seed=expected["seed"], metrics=["accuracy"], artifacts=str(artifacts),
    )  # fmt: skip
    results = job.run()
    if results["model_sha256"] != expected["model_sha256"]:
        print("the embedded model is another one than that of the committed table: nothing to compare")
        return len(cells)
    wrong = 0
    for cell, made in zip(cells, results["cells"], strict=True):
        found = np.array(probe(root, made["folder"]))
        gap = float(np.abs(found - cell["probe"]).max() / max(np.abs(cell["probe"]).max(), 1e-9))
        same = made["calls"] == cell["calls"] and gap < TOLERANCE
        wrong += not same
        print(f"{'ok ' if same else 'NOT'} {cell_name(cell)} @ {cell['calls']}: {gap:.1e} relative", flush=True)
    return wrong


def replicates(results: dict, root: Path) -> list[np.ndarray]:
    """FD of each cell on the same resamples of seeds [REPLICATES]."""
    from diffsamp.metrics import FrechetStats, extractor, frechet_distance, reference

    real = reference("embedded", extractor("fashion-cnn"))
    found = []
    for cell in results["cells"]:
        run = RunFolder.existing(root / "cells" / cell["folder"])
        features = np.concatenate([arrays["features"] for _, arrays, _ in run.stream()]).astype(np.float64)
        rng = np.random.default_rng(1)
        rows = [rng.integers(0, len(features), len(features)) for _ in range(REPLICATES)]
        found.append(
            np.array([frechet_distance(FrechetStats.of(features[r]), real.stats, factor_b=real.factor) for r in rows])
        )
    return found


def compare(results: dict, drawn: list[np.ndarray]) -> dict[int, dict]:
    """At each budget: the best stock cell, our best, and for each cell how far it is behind the best stock one.

    "behind" is the difference of FD with its 95 % half width from the paired replicates. The budget is the calls asked
    for, so a two-stage method is judged by what it can do within them.
    """
    found = {}
    for nfe in sorted({c["nfe"] for c in results["cells"]}):
        here = [i for i, c in enumerate(results["cells"]) if c["nfe"] == nfe]
        fd = {i: results["cells"][i]["metrics"]["fd"][0] for i in here}
        sound = [i for i in here if not results["cells"][i]["not_finite"]]
        stock = [i for i in sound if results["cells"][i]["solver"].startswith("diffusers:")]
        ours = [i for i in sound if i not in stock]
        if not stock or not ours:
            continue
        peer, best = min(stock, key=fd.__getitem__), min(ours, key=fd.__getitem__)
        behind = {
            i: (fd[i] - fd[peer], 1.96 * float(np.std(drawn[i] - drawn[peer], ddof=1))) for i in here if i != peer
        }
        found[nfe] = {"stock": peer, "ours": best, "behind": behind}
    return found


def clearly(gap: float, half: float, scale: float) -> str:
    """Whether a difference of FD is a loss, a win, a tie, or rounding."""
    if abs(gap) < ROUNDING * scale:
        return "the same"
    return "we lose" if gap - half > 0 else "we win" if gap + half < 0 else "a tie"


def losses(results: dict, compared: dict[int, dict]) -> list[str]:
    """One line per budget: who is ahead, by how much, and whether the paired interval says so."""
    told = []
    for nfe, found in compared.items():
        ours, peer = (results["cells"][found[key]] for key in ("ours", "stock"))
        gap, half = found["behind"][found["ours"]]
        verdict = clearly(gap, half, peer["metrics"]["fd"][0])
        told.append(
            f"- {nfe} calls: our best `{ours['solver']}` {ours['metrics']['fd'][0]:.3f}, the best stock scheduler "
            f"`{peer['solver'].removeprefix('diffusers:')}` {peer['metrics']['fd'][0]:.3f}; difference "
            f"{gap:+.3f} ± {half:.3f}: **{verdict}**."
        )
    return told


def pairs(results: dict, drawn: list[np.ndarray]) -> str:
    """Named solvers of ours against a stock one at each budget: the difference of FD with its paired interval."""
    cells = results["cells"]
    budgets = sorted({c["nfe"] for c in cells})
    at = {(c["solver"], c["nfe"]): i for i, c in enumerate(cells) if not c["not_finite"]}
    lines = ["| FD of ours less FD of stock | " + " | ".join(f"{n} calls" for n in budgets) + " |"]
    lines.append("| --- |" + " ---: |" * len(budgets))
    for ours, stock in PAIRS:
        row = []
        for budget in budgets:
            a, b = at.get((ours, budget)), at.get((f"diffusers:{stock}Scheduler", budget))
            if a is None or b is None:
                row.append("")
                continue
            gap = cells[a]["metrics"]["fd"][0] - cells[b]["metrics"]["fd"][0]
            half = 1.96 * float(np.std(drawn[a] - drawn[b], ddof=1))
            word = clearly(gap, half, cells[b]["metrics"]["fd"][0])
            text = f"{gap:+.3f} ± {half:.3f}"
            row.append(f"**{text}**" if word == "we win" else f"{text} ▼" if word == "we lose" else text)
        if any(row):
            lines.append(f"| `{ours}` against {stock} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def grid_table(results: dict, compared: dict[int, dict]) -> str:
    """Solvers down, budgets across: FD with interval; the best of a column bold, those clearly behind stock marked."""
    cells = results["cells"]
    budgets = sorted({c["nfe"] for c in cells})
    names = list(dict.fromkeys(c["solver"] for c in cells))
    names.sort(key=lambda name: name.startswith("diffusers:"))
    at = {(c["solver"], c["nfe"]): i for i, c in enumerate(cells)}
    best = {n: min(c["metrics"]["fd"][0] for c in cells if c["nfe"] == n and not c["not_finite"]) for n in budgets}
    lines = ["| solver | " + " | ".join(f"{n} calls" for n in budgets) + " |", "| --- |" + " ---: |" * len(budgets)]
    for name in names:
        row = []
        for budget in budgets:
            i = at.get((name, budget))
            if i is None:
                row.append("")
                continue
            if cells[i]["not_finite"]:
                row.append("not finite")
                continue
            value, low, high = cells[i]["metrics"]["fd"]
            text = f"{value:.2f} ± {(high - low) / 2:.2f}"
            text = f"**{text}**" if value == best[budget] else text
            gap, half = compared.get(budget, {}).get("behind", {}).get(i, (0.0, 0.0))
            if not name.startswith("diffusers:") and clearly(gap, half, value) == "we lose":
                text += " ▼"
            if cells[i]["calls"] != budget:
                text += f" ({cells[i]['calls']})"
            row.append(text)
        short = name.removeprefix("diffusers:").removesuffix("Scheduler")
        shown = f"`{name}`" if short == name else f"diffusers {short}"
        lines.append(f"| {shown} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="table", choices=sorted(runs()), help="a run of runs.json")
    parser.add_argument("--quick", action="store_true", help="--run quick")
    parser.add_argument("--verify", action="store_true", help="compare a sample with the committed figures of the run")
    parser.add_argument("--cells", type=int, default=6, help="how many cells to verify; 0: all")
    parser.add_argument("--json", action="store_true", help="print results as JSON")
    parser.add_argument("--n", type=int, help="pictures per cell")
    parser.add_argument("--nfe", type=int, nargs="+", help="network calls")
    parser.add_argument("--solvers", nargs="+", help="solver names")
    parser.add_argument("--out", type=Path, default=Path("runs/suite"), help="run folder (resumed if it is there)")
    parser.add_argument("--finished", action="store_true", help="measure the cells that are finished, run no other")
    parser.add_argument("--write", action="store_true", help="write the results that benchmarks/results/ holds")
    args = parser.parse_args()
    name = "quick" if args.quick else args.run
    chosen = runs()[name]
    if args.verify:
        expected = HERE / "results" / f"{chosen['expected']}.json"
        if chosen["expected"] is None or not expected.is_file():
            sys.exit(f"run {name} has no expected figures yet; make them with --write")
        sys.exit(1 if verify(json.loads(expected.read_text()), args.out / f"verify-{name}", args.cells) else 0)
    wanted = matrix(solvers_of(args.solvers or chosen["solvers"]), args.nfe or chosen["nfe"], [None])
    cells, notes = choose(wanted, ARTIFACTS)
    if args.finished:
        cells, left = finished(cells, args.out / name)
        notes += left
    job = Bench(
        args.out / name, chosen=cells, n=args.n or chosen["n"], metrics=METRICS, artifacts=str(ARTIFACTS),
        replicates=REPLICATES,
    )  # fmt: skip
    seen: dict[str, int] = {}

    def told(cell, done: int, chunks: int) -> None:
        number = seen.setdefault(cell.name, len(seen) + 1)
        print(f"\r{number}/{len(cells)} {cell.name}: chunk {done}/{chunks}   ", end="", file=sys.stderr, flush=True)

    results = job.run(told)
    print(file=sys.stderr)
    for cell in results["cells"]:
        cell["probe"] = probe(job.root, cell["folder"])
    results["notes"] = notes
    write_report([job.root], job.root / "report.html")
    drawn = replicates(results, job.root)
    compared = compare(results, drawn)
    text = page(results, compared, pairs(results, drawn))
    if args.write:
        home = HERE / "results"
        (home / f"{chosen['expected']}.md").write_text(text)
        (home / f"{chosen['expected']}.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        write_png(results, home / f"{chosen['expected']}.png", "fd")
    if args.json:
        print(json.dumps(results, sort_keys=True))
    else:
        print_table(results)
        print("\n".join(losses(results, compared)))
    assert len(preview(job.root, results["cells"][0]["folder"], 8)) == 8


def page(results: dict, compared: dict[int, dict], paired: str) -> str:
    """The committed page."""
    reference, made, n = results["reference"], results["environment"], results["cells"][0]["n"]
    head = (
        f"# Quality against network calls on the embedded model\n\n"
        f"`python benchmarks/suite.py --write`; {results['distance']}, lower is better, n = {n} pictures per cell, "
        f"guidance as the model ships, 95 % intervals by bootstrap over pictures. Bold: the best at that number of "
        f"calls. ▼: one of ours that is clearly behind the best stock scheduler at that number of calls (paired 95 % "
        f"interval over the same seeds). In brackets: the calls made, where a budget does not divide by a step's. "
        f"{results['distance']} is the Fréchet distance of the embedded classifier's features against {reference['n']} "
        f"test pictures, not FID; its floor, {reference['floor_note']}, is {reference['floor']:.3g}; it is biased "
        f"upwards by small n, alike in all cells.\n\n"
        f"Model weights {results['model_sha256'][:12]}, torch {made.get('torch')}, diffusers {made.get('diffusers')}, "
        f"{made['processor']}, one thread.\n\n"
    )
    told = [
        "`dc` and `dualfast` stand on their default bases, `unipc` and `dpmpp-2m`. The ratios of `dc` are calibrated "
        "for this model, guidance and grid (benchmarks/data); `dualfast` has its default constants.",
        "The best of ours against the best stock one is a choice among many figures on each side, and more of ours "
        "than of stock: read a narrow win as a tie. The comparison of two named solvers has no such choice in it.",
        "The model's schedule starts at a noise-to-signal ratio of about 20,000 (ours, DPM-Solver and UniPC begin at "
        "4,096). Stock schedulers that step in that ratio by a second-order or ancestral rule break down there: theirs "
        "are the figures above 5 and the cells that are not finite.",
    ]
    notes = "\n".join(f"- {note}" for note in told + results["notes"])
    tail = "\n## Where we win, tie and lose\n\n" + "\n".join(losses(results, compared)) + "\n\n"
    tail += "Named solvers, with paired 95 % intervals (bold: ours is clearly ahead, ▼: clearly behind):\n\n" + paired
    tail += f"\n## Notes\n\n{notes}\n" if notes else ""
    return head + grid_table(results, compared) + tail + "\n## All figures\n\n" + markdown(results)


if __name__ == "__main__":
    main()
