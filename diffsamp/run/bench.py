"""A benchmark: every cell of the matrix run in chunks, then measured, and the results written whole.

    results.json          protocol, reference with its floor, environment, one entry per cell
    cells/<cell>/         a run folder each, see folder.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.files import write_whole
from diffsamp.run.engines import run_on
from diffsamp.run.environment import environment
from diffsamp.run.folder import RunFolder, RunResult
from diffsamp.run.matrix import Cell, matrix

Told = Callable[[Cell, int, int], None]


@dataclass
class Bench:
    """What is asked of a benchmark.

    `samples_from` is the trajectory error's reference, as solver@calls; `artifacts` is a folder of calibrated ratios in
    place of those that ship; `chosen` are cells to run in place of the whole matrix.
    """

    root: Path
    model: str = "fashion"
    solvers: Sequence[str] = ("unipc", "dpmpp-2m", "ddim")
    nfe: Sequence[int] = (4, 8)
    guidance_scale: Sequence[float | None] = (None,)
    n: int = 192
    seed: int = 0
    chunk: int = 64
    metrics: Sequence[str] = ("fd", "kid", "accuracy", "precision", "recall")
    protocol: str = "embedded"
    extractor: str | None = None
    resize: str | None = None
    feature_weights: str | None = None
    reference: str = "embedded"
    samples_from: str = "unipc@50"
    grid: str | None = None
    engine: str = "auto"
    threads: int = 1
    device: str = "cpu"
    keep: int = 64
    keep_all: bool = False
    prompts: Sequence[str] = ()
    replicates: int = 50
    artifacts: str | None = None
    chosen: Sequence[Cell] = ()
    warnings: list[str] = field(default_factory=list)

    def cells(self) -> list[Cell]:
        """The cells in the order in which they are run."""
        for cell in self.chosen:
            matrix([cell.solver], [cell.nfe], [cell.guidance_scale])  # refuses what cannot be run
        return list(self.chosen) or matrix(self.solvers, self.nfe, self.guidance_scale)

    def run(self, told: Told | None = None) -> dict[str, Any]:
        """Run or resume all cells, measure them, write results.json, and return what it holds."""
        from diffsamp.metrics import Protocol, check_metrics, extractor, reference

        wanted = check_metrics(self.metrics)
        protocol = Protocol.named(self.protocol, self.n, extractor=self.extractor, resize=self.resize)
        cells = self.cells()
        features = extractor(
            protocol.extractor, resize=protocol.resize, feature_weights=self.feature_weights, device=self.device
        )
        real = reference(self.reference, features)
        runner = _Runner(self, features, real.stats.width, told)
        for cell in cells:
            runner.prepare(cell)  # what cannot be run is refused before hours of what can
        found = [(cell, *runner.run(cell)) for cell in cells]
        paths: dict[Any, np.ndarray] = {}
        if "trajectory" in wanted:
            for scale in dict.fromkeys(cell.guidance_scale for cell in cells):
                paths[scale] = runner.run(self._reference_cell(scale))[0].arrays["samples"]
        return self._write(protocol, features, real, wanted, found, paths, runner.fingerprint)

    def _reference_cell(self, scale: float | None) -> Cell:
        solver, at, calls = self.samples_from.rpartition("@")
        if not at or not calls.isdecimal():
            raise DiffsampError(f"samples_from={self.samples_from!r}; accepted: solver@calls, such as unipc@50")
        return Cell(solver, int(calls), scale)

    def _write(
        self, protocol: Any, features: Any, real: Any, wanted: Sequence[str], found: list[Any], paths: dict[Any, Any],
        fingerprint: str,
    ) -> dict[str, Any]:  # fmt: skip
        from diffsamp.metrics import FrechetStats, evaluate

        entries = []
        for cell, result, calls in found:
            measured = evaluate(
                wanted, result.arrays, real, samples_reference=paths.get(cell.guidance_scale),
                replicates=self.replicates,
            )  # fmt: skip
            warning = FrechetStats.of(result.arrays["features"]).warning
            if warning and warning not in self.warnings:
                self.warnings.append(warning)
            broken = int((result.arrays["finite"] == 0).sum())
            entries.append(
                {
                    **cell.facts(), "folder": cell.folder, "calls": calls, "n": len(result.arrays["features"]),
                    "sha256": result.sha256, "seconds": result.seconds, "not_finite": broken,
                    "metrics": {k: [v.value, v.low, v.high] for k, v in measured.items()},
                }
            )  # fmt: skip
        floor, note = real.floor_at(self.n)
        results = {
            "format": 1, "model": self.model, "model_sha256": fingerprint, "protocol": protocol.facts(),
            "distance": features.distance_name, "extractor_sha256": features.fingerprint,
            "reference": {"name": real.name, "n": real.stats.n, "floor": floor, "floor_note": note,
                          "fingerprint": real.fingerprint},
            "samples_from": self.samples_from if paths else None, "seed": self.seed, "chunk": self.chunk,
            "replicates": self.replicates, "warnings": self.warnings, "environment": environment(), "cells": entries,
        }  # fmt: skip
        data = json.dumps(results, indent=1, sort_keys=True).encode()
        write_whole(self.root / "results.json", data, overwrite=True)
        return results


class _Runner:
    """Loads the model once, when the first cell needs it, and runs cells one after another."""

    def __init__(self, bench: Bench, features: Any, width: int | None, told: Told | None) -> None:
        import torch

        from diffsamp.run.pipelines import load_model

        torch.set_num_threads(bench.threads)
        self.bench, self.features, self.width, self.told = bench, features, width, told
        self.pipe, self.fingerprint = load_model(bench.model, bench.device)
        # What a saved scheduler's config says of its class is what a stock or registry solver is made from.
        self.config = dict(self.pipe.scheduler.config)
        self.config["_class_name"] = type(self.pipe.scheduler).__name__

    def prepare(self, cell: Cell) -> tuple[str, int, int]:
        """The solver's full name, its steps and its network calls; raises DiffsampError for what cannot be run."""
        from diffsamp.run.calibrated import check_grid, with_ratios
        from diffsamp.run.pipelines import guidance_of, set_solver, steps_for

        bench, scale = self.bench, guidance_of(self.pipe, cell.guidance_scale)
        made, artifact = with_ratios(
            cell.solver, model=bench.model, sha256=self.fingerprint, nfe=cell.nfe, guidance_scale=scale,
            folder=bench.artifacts,
        )  # fmt: skip
        set_solver(self.pipe, made, self.config, bench.grid)
        steps = steps_for(self.pipe.scheduler, cell.nfe)
        self.pipe.scheduler.set_timesteps(steps)
        check_grid(cell.solver, artifact, self.pipe.scheduler, cell.nfe, scale)
        return made, steps, len(self.pipe.scheduler.timesteps)

    def run(self, cell: Cell) -> tuple[RunResult, int]:
        """The result of a cell and its network calls per picture."""
        from diffsamp.run.pipelines import PipelineGenerator, set_solver

        bench = self.bench
        made, steps, calls = self.prepare(cell)
        set_solver(self.pipe, made, self.config, bench.grid)  # a fresh one: no state of the count is left
        packages = environment()
        recipe = {
            **cell.facts(), "model": bench.model, "model_sha256": self.fingerprint, "steps": steps, "calls": calls,
            "grid": bench.grid, "extractor": self.features.name, "extractor_sha256": self.features.fingerprint,
            "resize": self.features.resize, "threads": bench.threads, "device": bench.device, "keep": bench.keep,
            "keep_all": bench.keep_all, "prompts": list(bench.prompts),
            "versions": {name: packages.get(name) for name in ("torch", "diffusers")},
        }  # fmt: skip
        if made != cell.solver:
            recipe["made"] = made  # another artifact is another run
        generate = PipelineGenerator(
            self.pipe, cell, self.features, steps=steps, first_seed=bench.seed, keep=bench.keep, chunk=bench.chunk,
            prompts=bench.prompts, keep_all=bench.keep_all, threads=bench.threads, width=self.width,
        )  # fmt: skip
        told = self.told
        progress = None if told is None else lambda done, total, own: told(cell, done, total)
        result = run_on(
            bench.engine, bench.root / "cells" / cell.folder, recipe, generate, bench.n, seed=bench.seed,
            chunk=bench.chunk, progress=progress,
        )  # fmt: skip
        return result, calls


def preview(root: Path, folder: str, count: int) -> np.ndarray:
    """The first pictures of a cell, uint8 [n, c, h, w]."""
    run = RunFolder.existing(root / "cells" / folder)
    parts, have = [], 0
    for _, arrays, _ in run.stream():
        if "images" not in arrays or have >= count:
            break
        parts.append(arrays["images"])
        have += len(arrays["images"])
    if not parts:
        raise DiffsampError(f"{root / 'cells' / folder} kept no pictures; run it with keep of at least 1")
    return np.concatenate(parts)[:count]
