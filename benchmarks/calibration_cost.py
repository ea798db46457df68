"""What DC-Solver's calibration costs and what it gains: the scalar search beside the published recipe.

    python benchmarks/calibration_cost.py            # writes benchmarks/results/calibration_cost.{md,json}
    python benchmarks/calibration_cost.py --quick    # one toy, two numbers of calls; writes nothing

Two parts. Toys: the 8x8 analytic model for several shares of the variance inside a component (the published description
leaves it open) and seeds; how far the errors of the base are from the published ones, and the gain on 64 held-out
noises, median and worst of 3 draws of 10 points. Embedded model: network calls, CPU time and held-out error of one
setting by the search and by AdamW with 20 iterations (the authors' code) and 40 (their paper), in one process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffsamp import calibrate, engine
from diffsamp.calibrate import Reference, search_ratios
from diffsamp.calibrate.model import CALIBRATION_SEED, HELD_OUT_SEED
from diffsamp.calibrate.search import mse
from diffsamp.grids import grid
from diffsamp.plan import Plan
from diffsamp.process import Process
from diffsamp.registry import solver
from diffsamp.solvers.dc import dc
from diffsamp.testing import toys

RESULTS = Path(__file__).parent / "results"
VP = Process.vp("scaled_linear", 0.00085, 0.012)
CALLS = (5, 6, 8, 10)
SCALES = (1.0, 3.0, 7.5)
BARS = {1.0: (2.5, 3.0, 5.0, 6.0), 3.0: (1.0, 1.4, 5.0, 8.0), 7.5: (1.4, 1.0, 1.3, 3.0)}
# Published errors of UniPC-2 without its first corrector, the base of the gains, by guidance scale and calls.
PUBLISHED = {
    1.0: (0.0201, 0.0142, 0.0085, 0.0056), 3.0: (0.0213, 0.0150, 0.0085, 0.0054), 7.5: (0.0405, 0.0252, 0.0123, 0.0074),
}  # fmt: skip
SHARES, SEEDS = (0.4, 0.5, 0.6, 0.7), (0, 1, 2)


def base_of(n: int) -> Plan:
    """UniPC-2, bh2, without its first corrector, on the linspace grid down to the last level above the data."""
    return solver("unipc", disable_corrector=(0,))(VP, grid("linspace", VP, n, final="sigma_min"))


def toy_gains(share: float, seed: int, calls: tuple[int, ...], scales: tuple[float, ...]) -> list[dict[str, Any]]:
    """Base error, and gains of three draws, for every setting of one toy."""
    toy = toys.img(seed, within=share)
    parts = [toy.noise(10, 100 + draw) for draw in range(3)] + [toy.noise(64, 7)]
    labels = torch.cat([label for _, label in parts])
    x = torch.cat([noise for noise, _ in parts]) * base_of(5).first_level.sigma
    rows = []
    for scale in scales:
        levels = [level for n in calls for level in base_of(n).grid.levels]
        reference = Reference(VP, levels, toy.denoiser(labels, scale), x, steps=300)
        unseen = toy.denoiser(labels[30:], scale)
        for n in calls:
            plan, gains, used = base_of(n), [], 0
            goal = reference.at(plan.last_level)[30:]
            before = mse(engine.sample(plan, unseen, x[30:]), goal)
            for draw in range(3):
                part = slice(10 * draw, 10 * draw + 10)
                found = search_ratios(plan, reference.of(part), toy.denoiser(labels[part], scale), x[part])
                gains.append(before / mse(engine.sample(dc(plan, ratios=found.values), unseen, x[30:]), goal))
                used = max(used, found.calls)
            rows.append({
                "share": share, "seed": seed, "scale": scale, "calls": n, "base_error": before, "search_calls": used,
                "median": statistics.median(gains), "worst": min(gains), "bar": BARS[scale][CALLS.index(n)],
                "published_error": PUBLISHED[scale][CALLS.index(n)],
            })  # fmt: skip
    return rows


def on_the_embedded_model(nfe: int, scale: float, *, held_out: int, reference_steps: int) -> list[dict[str, Any]]:
    """One setting by three methods on the same points: calls, CPU seconds, held-out error."""
    model = calibrate.embedded("fashion")
    seeds = [*range(CALIBRATION_SEED, CALIBRATION_SEED + 10), *range(HELD_OUT_SEED, HELD_OUT_SEED + held_out)]
    noise, labels = model.points(seeds)
    plan = solver("unipc")(model.process, grid("linspace", model.process, nfe))
    x = noise * plan.first_level.sigma
    began = time.process_time()
    fine = Reference(
        model.process, plan.grid.levels, model.guided(labels, scale), x, steps=reference_steps,
        prediction=model.prediction,
    )  # fmt: skip
    # The fine run of the ten points that a search needs; the held-out ones are for this table.
    reference_seconds = (time.process_time() - began) * 10 / len(seeds)
    few, rest = slice(0, 10), slice(10, None)
    unseen = model.guided(labels[rest], scale)

    def held(one: Plan) -> float:
        return mse(engine.sample(one, unseen, x[rest], prediction=model.prediction), fine.of(rest).at(one.last_level))

    rows, before = [], held(plan)
    for name, options in (
        ("search", {}), ("AdamW, 20 iterations", {"method": "adamw", "iterations": 20, "guard": False}),
        ("AdamW, 40 iterations", {"method": "adamw", "iterations": 40, "guard": False}),
    ):  # fmt: skip
        began = time.process_time()
        found = search_ratios(
            plan, fine.of(few), model.guided(labels[few], scale), x[few], prediction=model.prediction, **options
        )  # fmt: skip
        # AdamW's result measures the base too, in calls that the recipe does not make.
        calls = found.calls if name == "search" else nfe + options["iterations"] * (nfe - 3)
        rows.append({
            "method": name, "nfe": nfe, "scale": scale, "calls": calls, "cpu_seconds": time.process_time() - began,
            "reference_cpu_seconds": reference_seconds, "before": before,
            "after": held(dc(plan, ratios=found.values)), "ratios": list(found.values),
        })  # fmt: skip
    return rows


def text_of(facts: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = ["# Calibrating DC-Solver: calls, time and gain", "", f"{facts['machine']}; torch {facts['torch']}.", ""]
    lines += ["## On the embedded model", "", "One setting, 10 points. Held-out error ×1000 of the final state.", ""]
    lines += ["| calls | guidance | method | network calls | CPU s | reference CPU s | before | after |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in facts["embedded"]:
        lines.append(
            f"| {row['nfe']} | {row['scale']:g} | {row['method']} | {row['calls']} | {row['cpu_seconds']:.1f} | "
            f"{row['reference_cpu_seconds']:.1f} | {1e3 * row['before']:.2f} | {1e3 * row['after']:.2f} |"
        )
    lines += ["", "## On the 8x8 toy", ""]
    lines += ["Median [worst] gain of three draws of 10 points on 64 held-out noises. A star: "]
    lines[-1] += "below the bar (2.5, 3, 5, 6 at guidance 1; 1, 1.4, 5, 8 at 3; 1.4, 1, 1.3, 3 at 7.5), or a draw that "
    lines[-1] += "loses. Deviation: rms log ratio of the base's errors to the published toy's."
    lines += ["", "| share | seed | deviation | guidance | " + " | ".join(f"{n} calls" for n in CALLS) + " |"]
    lines += ["|" + "---|" * (4 + len(CALLS))]
    for toy in sorted({(row["share"], row["seed"]) for row in facts["toys"]}):
        mine = [row for row in facts["toys"] if (row["share"], row["seed"]) == toy]
        gaps = [np.log(row["base_error"] / row["published_error"]) for row in mine]
        for scale in sorted({row["scale"] for row in mine}):
            cells = {
                row["calls"]: f"{row['median']:.2f} [{row['worst']:.2f}]"
                + ("" if row["median"] >= row["bar"] and row["worst"] >= 1 else " *")
                for row in mine if row["scale"] == scale
            }  # fmt: skip
            values = " | ".join(cells.get(n, "") for n in CALLS)
            deviation = np.sqrt(np.mean(np.square(gaps)))
            lines.append(f"| {toy[0]:g} | {toy[1]} | {deviation:.2f} | {scale:g} | {values} |")
    counted: dict[int, int] = {}
    for row in facts["toys"]:
        counted[row["calls"]] = max(row["search_calls"], counted.get(row["calls"], 0))
    lines += ["", "Network calls of a search, at most, and of the published code (20 iterations): "]
    lines[-1] += ", ".join(f"{n} calls: {used} of {n + 20 * (n - 3)}" for n, used in sorted(counted.items())) + "."
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little of everything; writes no result")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shares, seeds, calls = ((0.6,), (0,), (5, 6)) if args.quick else (SHARES, SEEDS, CALLS)
    scales = SCALES[:1] if args.quick else SCALES
    facts: dict[str, Any] = {
        "machine": f"{platform.machine()}, 1 thread", "torch": torch.__version__, "embedded": [], "toys": [],
    }  # fmt: skip
    for nfe, scale in [(4, 1.0)] if args.quick else [(5, 1.0), (5, 3.0), (10, 7.5)]:
        few = {"held_out": 2, "reference_steps": 20} if args.quick else {"held_out": 16, "reference_steps": 120}
        facts["embedded"] += on_the_embedded_model(nfe, scale, **few)
    for share in shares:
        for seed in seeds:
            facts["toys"] += toy_gains(share, seed, calls, scales)
    text = text_of(facts)
    if not args.quick:
        (RESULTS / "calibration_cost.json").write_text(json.dumps(facts, indent=1) + "\n")
        (RESULTS / "calibration_cost.md").write_text(text)
    print(json.dumps(facts) if args.json else text)


if __name__ == "__main__":
    main()
