"""Few network calls on the embedded image model: stock diffusers against DC-Solver, DualFast, teleportation and grids.

    python benchmarks/few_step.py                # measures what is missing, then writes benchmarks/results/few_step.*
    python benchmarks/few_step.py --quick

Trajectory error: mean squared distance of the final state to a 200-step run from the same noise, on seeds that no
calibration saw. FD[fashion-cnn]: Fréchet distance of the embedded classifier's features to the 10,000 real test
pictures; it depends on the number of pictures, so the distance of as many real training pictures stands beside it.
Distances of 10,000 pictures are few_step_fd.py's, into the same folder of cells.
Stock schedulers run as the tables that their own code yields (Plan.from_scheduler). Every artifact used must have been
made for the weights at hand; methods without one are left out.

Each cell is one small file in --cells, written whole; a cell that is there is not measured again, so a run can be
killed and continued, and several processes can share one folder. --restore begins with the cells of the written result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from diffsamp import calibrate, engine, teleport
from diffsamp.calibrate.artifact import SHIPPED, find
from diffsamp.errors import DiffsampError
from diffsamp.files import write_whole
from diffsamp.grids import Grid, grid
from diffsamp.pixels import eight_bit
from diffsamp.plan import Plan
from diffsamp.process import Level
from diffsamp.registry import solver
from diffsamp.solvers.dualfast import dualfast

RESULTS = Path(__file__).parent / "results"
SEEDS = 64  # of the trajectory error; pictures 0 .. SEEDS-1 of a cell
PAPER_SEEDS = 32  # the same, on the grid of the teleportation paper
FD_SAMPLES = 1000
STOCK = {
    "DDIM": ("DDIMScheduler", {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC-2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "UniPC-3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "DEIS": ("DEISMultistepScheduler", {}),
}
CALIBRATED = {
    "all on unipc": ("all", "unipc"), "unipc on a calibrated grid": ("grid", "unipc"),
    "dpmpp-2m on a calibrated grid": ("grid", "dpmpp-2m"), "dc(unipc)": ("dc", "unipc"),
    "dc(dpmpp-2m)": ("dc", "dpmpp-2m"), "dc(dpmpp-3m)": ("dc", "dpmpp-3m"), "dc(ddim), k = 1": ("dc", "ddim"),
    "dc(deis)": ("dc", "deis"), "dualfast(ddim) calibrated": ("dualfast", "ddim"),
    "dualfast(dpmpp-2m) calibrated": ("dualfast", "dpmpp-2m"),
}  # fmt: skip
DEFAULTS = {"dualfast(ddim) default": "ddim", "dualfast(dpmpp-2m) default": "dpmpp-2m"}
STARTED = ("heun", "dpmpp-2m", "unipc")
KINDS = ("teleport", "one large step", "mean only", "white")
# The paper's grid: EDM's levels from sigma 80 (rho 7), 18 of them there; those above the start that the rule gives are
# dropped.
PAPER_TOP, PAPER_STEPS, WHOLE_STEPS, TAIL_STEPS = 80.0, 18, (8, 10, 12, 15, 18), (9, 12, 15, 18)
# Levels of the whole run that the start of a run of 4 to 10 calls is measured on.
START_LEVELS = 9
# What is worth a Fréchet distance, in the order of interest: (method, calls).
WORTH = (
    ("all on unipc", 5), ("UniPC-2", 10), ("DPM-Solver++ 2M", 10), ("unipc on a calibrated grid", 5),
    ("dc(unipc)", 5), ("UniPC-2", 5), ("UniPC-2", 8), ("DPM-Solver++ 2M", 8), ("DPM-Solver++ 2M", 5), ("DDIM", 5),
    ("all on unipc", 8), ("all on unipc", 10), ("dualfast(ddim) calibrated", 5), ("dc(unipc)", 8),
    ("dc(unipc)", 10), ("DDIM", 10), ("unipc, teleport", 5), ("unipc, one large step", 5),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One measurement: a method at a number of calls and a guidance scale, on so many pictures."""

    part: str
    method: str
    nfe: int
    scale: float
    samples: int = SEEDS

    @property
    def name(self) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", self.method.lower()).strip("-")
        return f"{self.part}-{self.scale:g}-{self.nfe:02d}-{slug}-{self.samples}"

    @classmethod
    def of(cls, row: dict) -> Cell:
        """The cell that a written row is of."""
        return cls(row["part"], row["method"], row["nfe"], row["guidance_scale"], row["samples"])

    def path(self, folder: Path, network: str | None = None) -> Path:
        """Its file; ``network`` is few_step_fd.py's."""
        return folder / f"{self.name}{'' if network is None else '-' + network}.json"


class Bench:
    """The model, its references and the plans of every method."""

    def __init__(self, folder: Path, reference_steps: int = 200, seeds: int = SEEDS) -> None:
        self.model = calibrate.embedded("fashion")
        self.folder, self.reference_steps, self.seeds = folder, reference_steps, seeds
        self.first_calls: dict[tuple[str, float, float, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        path = SHIPPED / "fashion-gaussian.safetensors"
        self.stats = teleport.load(path) if path.exists() else None

    @cache  # noqa: B019 - one object per process
    def artifact(self, method: str, base: str) -> calibrate.Artifact | None:
        try:
            found = find(method, base)
        except DiffsampError:
            return None
        return found if found.model["sha256"] == self.model.sha256 else None

    def top(self, part: str) -> Level:
        """Where the start noise lives."""
        return self.paper_grid(18).levels[0] if part == "paper" else grid("linspace", self.model.process, 5).levels[0]

    def paper_grid(self, steps: int) -> Grid:
        return grid("karras", self.model.process, steps, sigma_max=PAPER_TOP)

    @cache  # noqa: B019
    def start(self, scale: float, levels: int = START_LEVELS) -> float | None:
        """sigma/alpha down to which the rule lets a run be teleported; measured on calibration noises, and kept."""
        if self.stats is None:
            return None
        facts = [self.model.sha256, [round(float(v), 9) for v in self.stats.mean], repr(self.stats.key)]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        path = self.folder / f"start-{scale:g}-{levels}-{key}.txt"
        if not path.exists():
            found = teleport.lowest_starts(self.stats, self.model, [scale], levels=levels).get(scale)
            write_whole(path, repr(found and found.level.noise_to_signal).encode(), overwrite=True)
        text = path.read_text()
        return None if text == "None" else float(text)

    def key(self, plan: Plan, kind: str) -> str:
        """What a cell's figure depends on: the plan and, where they are used, the statistics."""
        if kind not in ("teleport", "mean only") or self.stats is None:
            return plan.fingerprint
        return f"{plan.fingerprint}-{hashlib.sha256(self.stats.mean.double().numpy().tobytes()).hexdigest()[:8]}"

    def written(self, cell: Cell, key: str, network: str | None = None) -> bool:
        """Whether a figure is there that still holds: not one of another plan or of other statistics."""
        path = cell.path(self.folder, network)
        return path.exists() and json.loads(path.read_text())["plan"] == key

    @cache  # noqa: B019
    def goal(self, part: str, scale: float) -> torch.Tensor:
        """Final states of the fine run, kept in the folder."""
        from safetensors.torch import load_file, save

        seeds = min(self.seeds, PAPER_SEEDS) if part == "paper" else self.seeds
        path = self.folder / f"goal-{part}-{scale:g}-{seeds}-{self.model.sha256[:12]}.safetensors"
        if not path.exists():
            top = self.top(part)
            noise, labels = self.model.points(range(seeds))
            made = []
            for first in range(0, seeds, 32):
                chosen = slice(first, first + 32)
                denoiser = self.model.guided(labels[chosen], scale)
                level = grid("linspace", self.model.process, 5).levels[-1]
                x = noise[chosen] * top.sigma
                made.append(
                    calibrate.Reference(
                        self.model.process, [top, self.model.process.level(1.0), level], denoiser, x,
                        steps=self.reference_steps, prediction=self.model.prediction,
                    ).at(level)
                )  # fmt: skip
            write_whole(path, save({"x": torch.cat(made)}), overwrite=True)
        return load_file(path)["x"]

    def plan(self, cell: Cell) -> tuple[Plan, str] | None:
        """(plan, how it starts), or None where the method lacks what it needs at this cell."""
        process = self.model.process
        if cell.part == "paper":
            return self.paper_plan(cell)
        base = grid("linspace", process, cell.nfe)
        if cell.method in STOCK:
            return stock_plan(cell.method, cell.nfe), "noise"
        if cell.method in DEFAULTS:
            return dualfast(solver(DEFAULTS[cell.method])(process, base)), "noise"
        if cell.method in CALIBRATED:
            method, inner = CALIBRATED[cell.method]
            artifact = self.artifact(method, inner)
            if artifact is None or f"{cell.nfe}/{cell.scale:g}" not in artifact.settings:
                return None
            if method == "grid":
                return solver(inner)(process, artifact.levels(process, cell.nfe, cell.scale)), "noise"
            return artifact.apply(solver(inner)(process, base), cell.scale), "noise"
        name, kind = cell.method.split(", ")
        start = self.start(cell.scale)
        if start is None:
            return None
        low = process.level(start)

        def tail(count: int) -> Grid:
            return Grid.from_times(process, np.linspace(low.t, 0, count + 1)[:-1])

        # Heun makes two calls per step but for its last; one large first step of it is an Euler step, one call.
        calls = cell.nfe - (kind == "one large step")
        if name == "heun" and calls % 2 == 0:
            return None
        below = tail((calls + 1) // 2 if name == "heun" else calls)
        return self.started(name, kind, base.levels[0], below)

    def started(self, name: str, kind: str, first: Level, below: Grid) -> tuple[Plan, str]:
        """A solver on the levels ``below``, teleported to or reached in one large step from ``first``."""
        process = self.model.process
        if kind != "one large step":
            return solver(name)(process, below), kind
        if name != "heun":
            return solver(name)(process, Grid(process, (first, *below.levels))), "noise"
        euler = solver("ddim")(process, Grid(process, (first, below.levels[0])))
        rest = solver("heun")(process, below)
        return Plan((*euler.rows, *rest.rows), process, Grid(process, (first, *below.levels)), order=1), "noise"

    def paper_plan(self, cell: Cell) -> tuple[Plan, str] | None:
        name, kind, size = cell.method.split(", ")
        levels = int(size.split()[0])
        whole = self.paper_grid(levels)
        if kind == "whole":
            return solver(name)(self.model.process, whole), "noise"
        start = self.start(cell.scale, levels)
        if start is None:
            return None
        return self.started(name, kind, whole.levels[0], teleport.start_grid(whole, start))

    def begin(self, kind: str, x: torch.Tensor, labels: torch.Tensor, scale: float, s: Level, t: Level) -> torch.Tensor:
        """The start at level t from the noise x at level s."""
        if kind == "noise":
            return x
        if kind == "white":
            return x * (t.sigma / s.sigma)
        assert self.stats is not None
        if kind == "mean only":
            mean = self.stats.mean.float().reshape(1, *x.shape[1:])
            return t.alpha * mean + (x - s.alpha * mean) * (t.sigma / s.sigma)
        return teleport.teleport(self.stats, x, s, t, labels=labels, guidance_scale=scale)

    def first_call_shared(self, cell: Cell, first: int, start: torch.Tensor) -> calibrate.model.Denoiser:
        """The guided denoiser; its answer at the start noise is kept, as most methods begin with the same call."""
        _, labels = self.model.points(range(first, first + len(start)))
        denoiser = self.model.guided(labels, cell.scale)

        def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
            if not torch.equal(x, start):
                return denoiser(x, level)
            key = (cell.part, cell.scale, level.t, first, len(start))
            known = self.first_calls.get(key)
            if known is None or not torch.equal(known[0], x):
                known = self.first_calls[key] = (x, denoiser(x, level))
            return known[1]

        return denoise

    def measure(self, cell: Cell) -> dict[str, object] | None:
        """The figures of a cell; None where the method is not defined there."""
        found = self.plan(cell)
        if found is None:
            return None
        plan, kind = found
        goal = self.goal(cell.part, cell.scale)
        top, features, errors = self.top(cell.part), [], []
        for first in range(0, cell.samples, SEEDS):
            seeds = range(first, min(first + SEEDS, cell.samples))
            noise, labels = self.model.points(seeds)
            start = self.begin(kind, noise * top.sigma, labels, cell.scale, top, plan.first_level)
            denoiser = self.first_call_shared(cell, first, start)
            made = engine.sample(plan, denoiser, start, prediction=self.model.prediction)
            known = goal[first : first + len(made)]
            errors.append((made[: len(known)] - known).double().square().flatten(1).mean(1))
            if cell.samples >= FD_SAMPLES // 4:
                pixels = eight_bit(made)
                features.append(classifier()(pixels)["features"])
        each = torch.cat(errors)
        result: dict[str, object] = {
            "part": cell.part, "method": cell.method, "nfe": cell.nfe, "guidance_scale": cell.scale,
            "samples": cell.samples, "error": float(each.mean()), "median": float(each.median()),
            "standard_error": float(each.std() / len(each) ** 0.5), "each": [round(float(v), 7) for v in each],
            "plan": self.key(plan, kind),
        }  # fmt: skip
        if features:
            from diffsamp.metrics.frechet import frechet_distance

            result["fd"] = frechet_distance(np.concatenate(features), real().stats)
        return result


@cache
def classifier():
    from diffsamp.metrics.extractors import extractor

    return extractor("fashion-cnn")


@cache
def real():
    from diffsamp.metrics.references import reference

    return reference("embedded", classifier())


def floor(samples: int) -> float | None:
    """FD of as many real training pictures to the same test pictures."""
    from diffsamp import models

    return models.reference()[1]["floor"].get(str(samples))


@cache
def stock_plan(name: str, nfe: int) -> Plan:
    import diffusers

    kind, options = STOCK[name]
    config = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    spacing = {"timestep_spacing": "trailing" if kind == "DDIMScheduler" else "linspace"}
    if kind == "DDIMScheduler":
        spacing |= {"clip_sample": False}
    return Plan.from_scheduler(getattr(diffusers, kind)(**config, **spacing, **options), nfe)


def cells(bench: Bench, nfes: list[int], scales: list[float], samples: int, line4: int) -> Iterator[Cell]:
    """Everything, most wanted first. A cell with a Fréchet distance holds the trajectory error too."""
    rows, few = [*CALIBRATED, *STOCK, *DEFAULTS], [n for n in nfes if n in (5, 8)]
    started = [f"{name}, {kind}" for name in STARTED for kind in KINDS]

    def fd(chosen: tuple[tuple[str, int], ...], scale: float, count: int = samples) -> Iterator[Cell]:
        yield from (Cell("table", method, nfe, scale, count) for method, nfe in chosen if count and nfe in nfes)

    for scale in scales:
        yield from (Cell("table", m, n, scale) for n in few for m in ("all on unipc", "UniPC-2", "DPM-Solver++ 2M"))
    yield from fd(WORTH[:5], scales[0])
    yield from fd(WORTH[:3], scales[1] if len(scales) > 1 else scales[0])
    for scale in scales:
        yield from paper_cells(bench, scale, PAPER_SEEDS)
    for scale in scales:
        yield from (Cell("table", method, nfe, scale) for nfe in few for method in (*rows, *started))
    for nfe in (n for n in nfes if n not in few):
        yield from (Cell("table", method, nfe, scale) for scale in scales for method in rows)
    if samples:
        yield from paper_cells(bench, scales[0], samples // 2)
    yield from fd(WORTH[5:], scales[0])
    for scale in scales[2:]:
        yield from fd(WORTH[:3], scale)
    yield from fd(WORTH[:3], scales[0], line4)
    for nfe in (n for n in nfes if n not in few):
        yield from (Cell("table", method, nfe, scale) for scale in scales for method in started)


def paper_cells(bench: Bench, scale: float, count: int) -> Iterator[Cell]:
    """The paper's grid, whole and from the rule's start; other controls and Fréchet distances at its own 18 levels."""
    for name in STARTED[::-1]:
        wanted = [("whole", n) for n in WHOLE_STEPS] + [(kind, n) for n in TAIL_STEPS for kind in KINDS[:2]]
        if count > PAPER_SEEDS:
            wanted = [("whole", PAPER_STEPS), *((kind, PAPER_STEPS) for kind in KINDS[:2])]
        if count == PAPER_SEEDS or name == "unipc":
            wanted += [(kind, PAPER_STEPS) for kind in KINDS[2:]]
        for kind, size in wanted:
            cell = Cell("paper", f"{name}, {kind}, {size} levels", 0, scale, count)
            found = bench.plan(cell)
            if found is not None:
                yield replace(cell, nfe=found[0].nfe)


def work(bench: Bench, todo: Iterator[Cell], deadline: float) -> None:
    """Measure the cells that nobody has measured or begun."""
    done: set[tuple[str, str, int, float]] = set()
    for cell in todo:
        key = (cell.part, cell.method, cell.nfe, cell.scale)
        path, claim = cell.path(bench.folder), bench.folder / f"{cell.name}.claim"
        found = bench.plan(cell)
        if found is None:
            continue
        if bench.written(cell, bench.key(*found)):
            done.add(key)
            continue
        if time.time() > deadline or (cell.samples <= bench.seeds and key in done):
            continue
        try:
            # A claim is stale after an hour: its process was killed.
            if claim.exists() and time.time() - claim.stat().st_mtime > 3600:
                claim.unlink()
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            done.add(key)
            continue
        began = time.process_time()
        try:
            result = bench.measure(cell)
            assert result is not None
            result["model_sha256"] = bench.model.sha256
            write_whole(path, json.dumps(result).encode(), overwrite=True)
        finally:
            claim.unlink(missing_ok=True)
        done.add(key)
        print(
            f"{cell.name}: error {1000 * result['error']:.2f}, FD {result.get('fd', float('nan')):.3f} "  # type: ignore
            f"({time.process_time() - began:.0f} CPU-s)", file=sys.stderr, flush=True,
        )  # fmt: skip


def restore(folder: Path, results: Path) -> int:
    """Cells of a written result, so that measuring goes on from it on another machine; how many were missing."""
    source, count = results / "few_step.json", 0
    if not source.exists():
        raise SystemExit(f"error: --restore: {source} does not exist; give --out the folder of a written result")
    for row in json.loads(source.read_text())["rows"]:
        path = Cell.of(row).path(folder, row.get("network"))
        if not path.exists():
            write_whole(path, json.dumps(row).encode())
            count += 1
    return count


def collected(bench: Bench) -> list[dict]:
    """Cells that were measured with these weights and artifacts."""
    found = []
    for path in sorted(bench.folder.glob("*.json")):
        row = json.loads(path.read_text())
        plan = bench.plan(Cell.of(row))
        if row["model_sha256"] == bench.model.sha256 and plan is not None and bench.key(*plan) == row["plan"]:
            found.append(row)
    return found


def best_of(rows: list[dict], part: str) -> dict[tuple[str, int, float], dict]:
    """By (method, calls, scale): the trajectory error, and the Fréchet distances by (number of pictures, network).

    Cells without a trajectory error, which few_step_fd.py alone has measured, are left out.
    """
    table: dict[tuple[str, int, float], dict] = {}
    for row in sorted((r for r in rows if r["part"] == part), key=lambda r: r["samples"]):
        entry = table.setdefault((row["method"], row["nfe"], row["guidance_scale"]), {"fd": {}})
        entry |= {k: row[k] for k in ("error", "standard_error", "median", "each") if k in row}
        if "fd" in row:
            entry["fd"][row["samples"], row.get("network", "float32")] = row["fd"]
    return {key: entry for key, entry in table.items() if "error" in entry}


def distances(entry: dict) -> dict[int, float]:
    """Fréchet distances by number of pictures, of the mixed network where there are both."""
    return {count: value for (count, _), value in sorted(entry["fd"].items())}


def fd_tables(mine: dict[tuple[str, int, float], dict], names: list[str]) -> list[str]:
    """Fréchet distances: one table per guidance scale and number of pictures, calls across.

    A cell stands once, with its most pictures and the mixed network where there are both.
    """
    lines = ["## FD[fashion-cnn]", ""]
    both = [
        abs(entry["fd"][n, "mixed"] - entry["fd"][n, "float32"])
        for entry in mine.values()
        for n in {count for count, _ in entry["fd"]}
        if (n, "mixed") in entry["fd"] and (n, "float32") in entry["fd"]
    ]
    if any(network == "mixed" for entry in mine.values() for _, network in entry["fd"]):
        lines += [
            "Mixed: the convolutions below the first resolution multiply in bfloat16, everything else is float32 "
            f"(few_step_fd.py). {len(both)} cells were measured with float32 throughout as well: they differ by at "
            f"most {max(both, default=math.nan):.4f}.", "",
        ]  # fmt: skip
    shown: dict[tuple[float, int, str], dict[tuple[str, int], float]] = {}
    for (method, nfe, scale), entry in mine.items():
        if entry["fd"]:
            most = max(entry["fd"])  # "mixed" sorts after "float32"
            shown.setdefault((scale, *most), {})[method, nfe] = entry["fd"][most]
    for (scale, samples, network), values in sorted(shown.items(), key=lambda item: (item[0][0], -item[0][1])):
        nfes = sorted({n for _, n in values})
        real_floor = floor(samples)
        head = f"guidance {scale:g}, {samples:,} pictures, {network}"
        head += "" if real_floor is None else f"; real pictures {real_floor:.3f}"
        lines += [f"| {head} | " + " | ".join(f"{n} calls" for n in nfes) + " |", "|---|" + "---|" * len(nfes)]
        best = {n: min((values[m, n] for m in STOCK if (m, n) in values), default=0.0) for n in nfes}
        for name in names:
            texts = [f"{values[name, n]:.3f}" if (name, n) in values else "" for n in nfes]
            texts = [
                f"**{text}**" if text and name not in STOCK and values[name, n] < best[n] else text
                for n, text in zip(nfes, texts, strict=True)
            ]
            if any(texts):
                lines.append(f"| {name} | " + " | ".join(texts) + " |")
        lines.append("")
    return lines


def paired(a: dict, b: dict) -> str:
    """Mean difference of two methods on the same seeds, in its standard errors."""
    n = min(len(a["each"]), len(b["each"]))
    gap = np.array(a["each"][:n]) - np.array(b["each"][:n])
    return f"{1000 * gap.mean():+.2f} ± {1000 * gap.std(ddof=1) / n**0.5:.2f}"


def table(bench: Bench, result: dict) -> str:
    rows = result["rows"]
    mine = best_of(rows, "table")
    nfes = sorted({n for _, n, _ in mine})
    scales = sorted({s for _, _, s in mine})
    names = [n for n in (*STOCK, *DEFAULTS, *CALIBRATED, *(f"{b}, {k}" for b in STARTED for k in KINDS))]
    lines = [
        "# Few network calls on the embedded image model", "",
        f"Trajectory error ×1000: mean squared distance per pixel of the final state to a 200-step run from the same "
        f"noise, ± its standard error, {result['seeds']} seeds that no calibration saw. Bold: below the best stock "
        f"scheduler of that column. Weights {result['model_sha256'][:12]}; torch {result['torch']}; "
        f"{result['machine']}; {result['date']}.", "",
    ]  # fmt: skip
    for scale in scales:
        lines += [f"## Guidance scale {scale:g}", "", "| method | " + " | ".join(f"{n} calls" for n in nfes) + " |"]
        lines += ["|---|" + "---|" * len(nfes)]
        best = {n: min((mine[s, n, scale]["error"] for s in STOCK if (s, n, scale) in mine), default=0) for n in nfes}
        for name in names:
            texts = []
            for n in nfes:
                row = mine.get((name, n, scale))
                text = "" if row is None else f"{1000 * row['error']:.2f} ± {1000 * row['standard_error']:.2f}"
                texts.append(f"**{text}**" if row and name not in STOCK and row["error"] < best[n] else text)
            if any(texts):
                lines.append(f"| {name} | " + " | ".join(texts) + " |")
        lines.append("")
    lines += ["## Five calibrated calls against eight stock ones", ""]
    lines += ["Difference of the trajectory error ×1000 on the same seeds (below 0: ours is closer).", ""]
    lines += ["| guidance | ours, 5 calls | to UniPC-2, 8 calls | to DPM-Solver++ 2M, 8 calls |", "|---|---|---|---|"]
    for scale in scales:
        ours = [(mine[m, 5, scale]["error"], m) for m in CALIBRATED if (m, 5, scale) in mine]
        others = [mine.get((m, 8, scale)) for m in ("UniPC-2", "DPM-Solver++ 2M")]
        if ours and all(others):
            error, name = min(ours)
            gaps = " | ".join(paired(mine[name, 5, scale], other) for other in others if other)
            lines.append(f"| {scale:g} | {name}: {1000 * error:.2f} | {gaps} |")
    return "\n".join([*lines, "", *fd_tables(mine, names), *paper_table(bench, rows)])


def calls_at(curve: list[tuple[int, float]], error: float) -> float | None:
    """Calls at which a falling curve (calls, error) reaches ``error``, log-linear between its points; None outside."""
    for (n, high), (m, low) in zip(curve, curve[1:], strict=False):
        if low <= error <= high:
            return n + (m - n) * (math.log(high / error) / math.log(high / low) if high > low else 0.0)
    return None


def paper_table(bench: Bench, rows: list[dict]) -> list[str]:
    mine = best_of(rows, "paper")
    if not mine:
        return []
    lines = [
        "## Teleportation on the paper's grid", "",
        f"EDM's levels from sigma {PAPER_TOP:g}: whole, and without those above the start that the rule gives. Calls: "
        f"trajectory error ×1000 as mean and (median), {PAPER_SEEDS} seeds; FD[fashion-cnn] of "
        f"{FD_SAMPLES // 2} pictures where it was measured. Saved: against the calls at which the whole grid, "
        "interpolated between its rows, has the same error (mean; median).", "",
    ]  # fmt: skip
    for scale in sorted({s for _, _, s in mine}):
        starts = {n: bench.start(scale, n) for n in TAIL_STEPS}
        head = "; start at sigma " + ", ".join(f"{v:.3g} ({n} levels)" for n, v in starts.items() if v is not None)
        lines += [f"### Guidance scale {scale:g}{head}", ""]
        lines += ["| solver | levels | whole | " + " | ".join(KINDS) + " | saved by teleport | by the large step |"]
        lines += ["|---|---|---|" + "---|" * (len(KINDS) + 2)]
        for name in STARTED:
            found = {
                m.split(", ", 1)[1]: (n, row)
                for (m, n, s), row in mine.items()
                if s == scale and m.split(", ")[0] == name
            }

            def text(key: str, found=found) -> str:
                if key not in found:
                    return ""
                n, row = found[key]
                fd = "".join(f"; FD {v:.3f}" for v in distances(row).values())
                return f"{n}: {1000 * row['error']:.2f} ({1000 * row['median']:.2f}){fd}"

            def saved(key: str, found=found) -> str:
                if key not in found:
                    return ""
                n, row = found[key]
                texts = []
                for what in ("error", "median"):
                    curve = sorted((c, r[what]) for k, (c, r) in found.items() if k.startswith("whole"))
                    calls = calls_at(curve, row[what])
                    below = bool(curve) and row[what] < curve[-1][1]
                    texts.append(
                        f"{1 - n / calls:.0%}" if calls else (f"over {1 - n / curve[-1][0]:.0%}" if below else "-")
                    )
                return "; ".join(texts)

            for size in sorted({*WHOLE_STEPS, *TAIL_STEPS}):
                keys = [f"{kind}, {size} levels" for kind in ("whole", *KINDS)]
                if any(key in found for key in keys):
                    cells_of = " | ".join([*map(text, keys), saved(keys[1]), saved(keys[2])])
                    lines.append(f"| {name} | {size} | {cells_of} |")
        lines.append("")
    return lines


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Which ticks get a label is LogFormatter's choice; 0.6, not 6e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    mine = best_of(result["rows"], "table")
    scales = sorted({s for _, _, s in mine})
    figure, axes = plt.subplots(2, len(scales), figsize=(4.6 * len(scales), 7.6), squeeze=False)
    shown = (
        "DDIM", "DPM-Solver++ 2M", "UniPC-2", "dualfast(ddim) calibrated", "dc(ddim), k = 1", "dc(unipc)",
        "unipc on a calibrated grid", "all on unipc",
    )  # fmt: skip
    counts = {s: Counter(n for (_, _, at), e in mine.items() if at == s for n in distances(e)) for s in scales}
    # The number of pictures that most cells have.
    many = {s: max(found, key=lambda n: (found[n], n), default=0) for s, found in counts.items()}
    panels = [(axis, scale, "error") for axis, scale in zip(axes[0], scales, strict=True)]
    panels += [(axis, scale, "fd") for axis, scale in zip(axes[1], scales, strict=True)]
    for axis, scale, what in panels:
        for i, name in enumerate(shown):
            points = []
            for (m, n, s), r in sorted(mine.items()):
                value = 1000 * r["error"] if what == "error" else distances(r).get(many[scale])
                if m == name and s == scale and value is not None:
                    points.append((n, value))
            if points:
                whole = name.startswith("all")
                axis.plot(
                    *zip(*points, strict=True), "--" if name in STOCK else "-", marker="*" if whole else "o",
                    ms=11 if whole else 4, color="black" if whole else f"C{i}", label=name,
                )  # fmt: skip
        of = f", {many[scale]:,} pictures" if what == "fd" else ""
        axis.set(title=f"guidance {scale:g}{of}", xlabel="network calls", yscale="log")
        axis.grid(alpha=0.3, which="both")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(Plain(minor_thresholds=(2, 1), labelOnlyBase=False))
    axes[0][0].set_ylabel("trajectory error ×1000")
    axes[1][0].set_ylabel("FD[fashion-cnn]")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few cells on 8 seeds, nothing written")
    parser.add_argument("--json", action="store_true", help="print the figures as json")
    parser.add_argument("--samples", type=int, default=FD_SAMPLES, help="pictures per Fréchet distance; 0: none")
    parser.add_argument("--line4", type=int, default=0, help="pictures per Fréchet distance of three main cells")
    parser.add_argument("--nfe", default="4,5,6,8,10")
    parser.add_argument("--guidance-scale", default="1,3,7.5")
    parser.add_argument("--cells", type=Path, default=Path("build/few_step"), help="folder of the measured cells")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after so many")
    parser.add_argument("--restore", action="store_true", help="first take the cells of the written result")
    parser.add_argument("--table-only", action="store_true", help="write the table from what is there")
    parser.add_argument("--no-table", action="store_true", help="measure only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), reference_steps=30, seeds=8)
            todo = [replace(c, samples=8) for c in cells(bench, [5], [1.0], 0, 0) if c.part == "table"]
            work(bench, iter(todo), float("inf"))
            finish(bench, args)
        return
    args.cells.mkdir(parents=True, exist_ok=True)
    if args.restore:
        print(f"{restore(args.cells, args.out)} cells taken from {args.out}", file=sys.stderr)
    bench = Bench(args.cells)
    if not args.table_only:
        nfes = [int(v) for v in args.nfe.split(",")]
        scales = [float(v) for v in args.guidance_scale.split(",")]
        work(bench, cells(bench, nfes, scales, args.samples, args.line4), time.time() + 60 * args.minutes)
    if not args.no_table:
        finish(bench, args)


def finish(bench: Bench, args: argparse.Namespace) -> None:
    """Print the result and, but for a quick run, write it."""
    result = {
        "model_sha256": bench.model.sha256, "seeds": bench.seeds, "rows": collected(bench),
        "torch": torch.__version__, "machine": f"{platform.machine()}, 1 thread", "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    text = table(bench, result)
    print(json.dumps(result) if args.json else text)
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        content = json.dumps(result, separators=(",", ":")).replace('},{"part', '},\n{"part') + "\n"
        write_whole(args.out / "few_step.json", content.encode(), overwrite=True)
        write_whole(args.out / "few_step.md", text.encode(), overwrite=True)
        plot(result, args.out / "few_step.png")


if __name__ == "__main__":
    try:
        main()
    except DiffsampError as error:
        raise SystemExit(f"error: {error}") from None
