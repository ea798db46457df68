"""Fréchet distances of many pictures for few_step.py: all methods at once, as many of their network calls are the same.

    python benchmarks/few_step_fd.py --cells build/few_step                     # all cells; hours
    python benchmarks/few_step_fd.py --cells build/few_step --guidance-scale 1 --nfe 5,8

Multistep solvers on the same levels begin with the same calls (their first step is DDIM's), so pictures are made block
by block for all methods of one (guidance scale, calls) together, and a call whose input and time were seen already, to
1e-5, is answered from memory. The network runs below its first resolution in bfloat16 by default; --network float32 for
the other (few_step.md has the difference on the same cells). It is compiled, by fashion_amx.cpp where the CPU has AMX,
else by torch: 2.7 times slower. Trajectory errors are few_step.py's, in float32.

A block is one file of features, written whole: a run can be killed and continued, and several processes can share one
folder. A cell is written when all its blocks are there; --partial writes it with the pictures made so far.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))


import few_step
from fashion_amx import FashionAMX, available
from few_step import CALIBRATED, DEFAULTS, KINDS, STARTED, STOCK, Bench, Cell, classifier, real

from diffsamp import calibrate, engine, models
from diffsamp.calibrate.model import Denoiser, from_pipeline
from diffsamp.errors import DiffsampError
from diffsamp.files import write_whole
from diffsamp.metrics.frechet import frechet_distance
from diffsamp.pixels import eight_bit
from diffsamp.process import Level

BLOCK, BATCH = 500, 125
SAME = 1e-5
METHODS = (*CALIBRATED, *STOCK, *DEFAULTS, *(f"{name}, {kind}" for name in STARTED for kind in KINDS[:2]))


class Shared:
    """A denoiser that answers a call it has seen, and counts what it computed and what was asked."""

    def __init__(self) -> None:
        self.computed = self.asked = 0

    def begin(self, denoiser: Denoiser) -> None:
        """For new samples."""
        self.denoiser, self.seen = denoiser, {}

    def __call__(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        self.asked += 1
        seen: list[tuple[torch.Tensor, torch.Tensor]] = self.seen.setdefault(round(level.t, 5), [])
        for known, output in seen:
            if torch.allclose(known, x, rtol=0, atol=SAME):
                return output
        self.computed += 1
        seen.append((x, self.denoiser(x, level)))
        return seen[-1][1]


class HalfConvolution(torch.nn.Module):
    """A convolution whose products are of bfloat16, in and out in float32."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, of: torch.nn.Conv2d) -> None:
        super().__init__()
        # Buffers: the network's dtype is that of its parameters, and stays float32.
        self.register_buffer("weight", of.weight.detach().bfloat16())
        self.register_buffer("bias", None if of.bias is None else of.bias.detach().bfloat16())
        assert not isinstance(of.padding, str)
        self.stride, self.padding = of.stride, of.padding

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.nn.functional.conv2d(x.bfloat16(), self.weight, self.bias, self.stride, self.padding).float()


def fast_model(network: str, amx: bool) -> calibrate.Model:
    """The embedded model with its network compiled; ``mixed``: convolutions below the first resolution in bfloat16."""
    pipeline = models.load("fashion")
    unet = pipeline.unet.eval().requires_grad_(False)
    if amx:
        pipeline.register_modules(unet=FashionAMX(unet, mixed=network == "mixed"))
        return from_pipeline(pipeline, "fashion")
    import torch._inductor.config as inductor

    inductor.freezing = True
    if network == "mixed":
        outer = ("conv_in", "conv_out", "down_blocks.0.", f"up_blocks.{len(unet.up_blocks) - 1}.")
        for name, module in list(unet.named_modules()):
            if isinstance(module, torch.nn.Conv2d) and not name.startswith(outer):
                parent, _, own = name.rpartition(".")
                setattr(unet.get_submodule(parent), own, HalfConvolution(module))
    pipeline.register_modules(unet=torch.compile(unet, dynamic=False))
    return from_pipeline(pipeline, "fashion")


@dataclass(frozen=True)
class Group:
    """Cells at one guidance scale that are measured together, because they share calls.

    ``cells`` is by method and :meth:`few_step.Bench.key`: another artifact is another key.
    """

    part: str
    scale: float
    nfe: int
    cells: dict[str, Cell]

    def path(self, folder: Path, network: str, first: int, number: int) -> Path:
        return folder / f"features-{self._name(network, first)}-{number}.safetensors"

    def blocks(self, folder: Path, network: str, first: int) -> list[Path]:
        """Files of one block; a later one adds methods that had no artifact before."""
        return sorted(folder.glob(f"features-{self._name(network, first)}-*.safetensors"))

    def _name(self, network: str, first: int) -> str:
        whose = "paper-" if self.part == "paper" else ""
        return f"{whose}{self.scale:g}-{self.nfe:02d}-{network}-{first:05d}"


def known_in(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return set(file.keys())


def make_block(
    bench: Bench, fast: calibrate.Model, wanted: dict[str, Cell], first: int, shared: Shared
) -> dict[str, np.ndarray]:
    """Features of pictures ``first`` to ``first + BLOCK - 1``, by key, for the given cells of one scale and nfe."""
    some = next(iter(wanted.values()))
    top = bench.top(some.part)
    found: dict[str, list[np.ndarray]] = {key: [] for key in wanted}
    plans = {key: bench.plan(cell) for key, cell in wanted.items()}
    for start in range(first, first + BLOCK, BATCH):
        noise, labels = fast.points(range(start, start + BATCH))
        shared.begin(fast.guided(labels, some.scale))
        begun: dict[tuple[str, float], torch.Tensor] = {}
        for key, entry in plans.items():
            assert entry is not None
            plan, kind = entry
            begin = (kind, plan.first_level.t)
            if begin not in begun:
                begun[begin] = bench.begin(kind, noise * top.sigma, labels, some.scale, top, plan.first_level)
            made = engine.sample(plan, shared, begun[begin], prediction=fast.prediction)
            found[key].append(np.asarray(classifier()(eight_bit(made))["features"], dtype=np.float32))
    return {key: np.concatenate(parts) for key, parts in found.items()}


def missing(bench: Bench, network: str, cells: Iterator[Cell]) -> dict[str, Cell]:
    """Cells that are defined and not yet written, by key."""
    wanted = {}
    for cell in cells:
        found = bench.plan(cell)
        if found is None:
            continue
        key = bench.key(*found)
        if not bench.written(cell, key, network):
            wanted[f"{cell.method}|{key}"] = cell
    return wanted


def groups(
    bench: Bench, network: str, nfes: list[int], scales: list[float], methods: list[str], samples: int
) -> Iterator[Group]:
    """The table's cells, those of one scale and number of calls together."""
    for scale in scales:
        for nfe in nfes:
            cells = (Cell("table", method, nfe, scale, samples) for method in methods)
            yield Group("table", scale, nfe, missing(bench, network, cells))


def paper_groups(bench: Bench, network: str, scales: list[float], samples: int) -> Iterator[Group]:
    """The cells on the teleportation paper's grid, all of a scale together."""
    for scale in scales:
        cells = (replace(c, samples=samples) for c in few_step.paper_cells(bench, scale, few_step.PAPER_SEEDS))
        yield Group("paper", scale, 0, missing(bench, network, cells))


def measure(
    bench: Bench, fast: calibrate.Model, network: str, todo: list[Group], samples: int, deadline: float
) -> None:
    from safetensors.numpy import save

    for group in todo:
        for first in range(0, samples, BLOCK):
            if time.time() > deadline:
                return
            there = group.blocks(bench.folder, network, first)
            known = set().union(*(known_in(path) for path in there))
            wanted = {key: cell for key, cell in group.cells.items() if key not in known}
            if not wanted:
                continue
            path = group.path(bench.folder, network, first, len(there))
            claim = path.with_suffix(".claim")
            try:
                # A claim is stale after an hour: its process was killed.
                if claim.exists() and time.time() - claim.stat().st_mtime > 3600:
                    claim.unlink()
                os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            began, shared = time.process_time(), Shared()
            try:
                write_whole(path, save(make_block(bench, fast, wanted, first, shared)), overwrite=False)
            finally:
                claim.unlink(missing_ok=True)
            print(
                f"{group.part}, guidance {group.scale:g}, {group.nfe} calls, pictures {first} to {first + BLOCK - 1}: "
                f"{len(wanted)} methods, "
                f"{shared.computed} of {shared.asked} calls computed, {time.process_time() - began:.0f} CPU-s",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def finished(bench: Bench, network: str, todo: list[Group], samples: int, partial: bool) -> list[dict[str, Any]]:
    """Write the cells whose blocks are all there; with ``partial``, those that have at least two."""
    from safetensors.numpy import load_file

    rows = []
    for group in todo:
        features: dict[str, list[np.ndarray]] = {key: [] for key in group.cells}
        for first in range(0, samples, BLOCK):
            for path in group.blocks(bench.folder, network, first):
                for key, value in load_file(path).items():
                    # Only blocks without a gap, so that every cell is of the same noises.
                    if key in features and len(features[key]) == first // BLOCK:
                        features[key].append(value)
        for key, parts in features.items():
            count = BLOCK * len(parts)
            if count < (2 * BLOCK if partial else samples):
                continue
            cell = replace(group.cells[key], samples=count)
            row = {
                "part": cell.part, "method": cell.method, "nfe": cell.nfe, "guidance_scale": cell.scale,
                "samples": count, "fd": frechet_distance(np.concatenate(parts), real().stats),
                "network": network, "plan": key.split("|")[1], "model_sha256": bench.model.sha256,
            }  # fmt: skip
            write_whole(cell.path(bench.folder, network), json.dumps(row).encode(), overwrite=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", type=Path, default=Path("build/few_step"), help="folder of few_step.py's cells")
    parser.add_argument("--samples", type=int, default=10_000, help=f"pictures per cell, a multiple of {BLOCK}")
    parser.add_argument("--nfe", default="5,8,10,4,6")
    parser.add_argument("--guidance-scale", default="1,3,7.5")
    parser.add_argument("--paper", action="store_true", help="the grid of the teleportation paper instead of the table")
    parser.add_argument("--methods", help="names, separated by semicolons; all by default")
    parser.add_argument("--network", choices=("mixed", "float32"), default="mixed")
    parser.add_argument("--no-amx", action="store_true", help="the network as torch compiles it, on CPUs with AMX too")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no block after so many")
    parser.add_argument("--partial", action="store_true", help="write cells with the pictures made so far")
    parser.add_argument("--no-measure", action="store_true", help="only write what is finished")
    args = parser.parse_args()
    if args.samples < BLOCK or args.samples % BLOCK:
        raise SystemExit(f"error: --samples: got {args.samples}; must be a multiple of {BLOCK}")
    torch.set_num_threads(1)
    args.cells.mkdir(parents=True, exist_ok=True)
    methods = list(METHODS) if args.methods is None else [m.strip() for m in args.methods.split(";")]
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise SystemExit(f"error: --methods: got {unknown}; accepted, separated by semicolons: {'; '.join(METHODS)}")
    bench = Bench(args.cells)
    nfes, scales = [int(v) for v in args.nfe.split(",")], [float(v) for v in args.guidance_scale.split(",")]
    if args.paper:
        todo = list(paper_groups(bench, args.network, scales, args.samples))
    else:
        todo = list(groups(bench, args.network, nfes, scales, methods, args.samples))
    if not args.no_measure:
        fast = fast_model(args.network, available() and not args.no_amx)
        measure(bench, fast, args.network, todo, args.samples, time.time() + 60 * args.minutes)
    for row in finished(bench, args.network, todo, args.samples, args.partial):
        print(f"{row['guidance_scale']:g} {row['nfe']:2d} {row['method']:32s} {row['samples']:6d} {row['fd']:.4f}")


if __name__ == "__main__":
    try:
        main()
    except DiffsampError as error:
        raise SystemExit(f"error: {error}") from None
