"""How good are the embedded model's pictures? Class accuracy and Fréchet distance of samples, and a labelled grid.

    python benchmarks/embedded_model.py --quick
    python benchmarks/embedded_model.py --cells 2:50:1000,2:20:10000 --write --grid docs/images/fashion-grid.png

A cell is guidance scale : steps : pictures. Accuracy: the share of pictures that the embedded classifier (trained on
real pictures) puts into the class that was asked for. FD[fashion-cnn]: Fréchet distance of the classifier's 128
features to the 10,000 real test pictures; it depends on the number of pictures, so the floor beside it is the distance
of as many real *training* pictures to the same test pictures. Pictures are rounded to 8 bits first, classes are equally
frequent, picture i of a cell is made with seed i.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import diffsamp.models as models  # noqa: E402
from diffsamp.files import write_whole  # noqa: E402
from diffsamp.pixels import eight_bit  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
QUICK = "2:10:50"
FULL = "1:20:500,1.5:20:500,2:20:500,3:20:500,4:20:500,2:50:1000,2:10:10000"


def frechet_distance(features: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> float:
    """Squared Wasserstein distance of Gaussians fitted to features [n, d] and given by mean [d], cov [d, d]; float64.

    tr sqrt(A B) is taken from the eigenvalues of the symmetric sqrt(A) B sqrt(A): Heusel et al. 2017, arXiv:1706.08500.
    """
    exact = features.double()
    values, vectors = torch.linalg.eigh(torch.cov(exact.T))
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov @ root).clamp_min(0).sqrt().sum()
    return float((exact.mean(0) - mean).square().sum() + values.sum() + cov.trace() - 2 * cross)


def to_uint8(sample: torch.Tensor) -> torch.Tensor:
    """Samples in [-1, 1] as the data set stores pictures."""
    return eight_bit(sample)


def generate(pipe: Any, labels: list[int], seeds: list[int], scale: float, steps: int, batch: int = 50) -> torch.Tensor:
    """Pictures uint8 [n, 1, 28, 28], one seed each."""
    made = []
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        sample = pipe(
            labels[part], guidance_scale=scale, num_inference_steps=steps, generator=generators, output_type="latent"
        ).images
        made.append(to_uint8(sample))
    return torch.cat(made)


@torch.inference_mode()
def evaluate(pipe: Any, judge: Any, scale: float, steps: int, count: int) -> dict[str, Any]:
    """One cell: accuracy, accuracy by class, FD against the test split, and the floor if it is known for this count."""
    reference, facts = models.reference()
    labels = [i % 10 for i in range(count)]
    begun = time.process_time()
    pictures = generate(pipe, labels, list(range(count)), scale, steps)
    spent = time.process_time() - begun
    features = torch.cat([judge.features(chunk) for chunk in pictures.split(500)])
    right = judge.head(features).argmax(1) == torch.tensor(labels)
    return {
        "guidance_scale": scale,
        "steps": steps,
        "n": count,
        "accuracy": round(float(right.float().mean()), 4),
        "accuracy_by_class": [round(float(right[c::10].float().mean()), 3) for c in range(10)],
        "fd": round(frechet_distance(features, reference["test_mean"], reference["test_cov"]), 3),
        "fd_floor": facts["floor"].get(str(count)),
        "images_per_cpu_second": round(count / spent, 2),
    }


def draw_grid(pipe: Any, path: Path, scale: float, steps: int) -> None:
    """Ten pictures of each class, one class per row with its name; seeds 0..99."""
    from PIL import Image, ImageDraw

    labels = [i // 10 for i in range(100)]
    pictures = generate(pipe, labels, list(range(100)), scale, steps)[:, 0].numpy()
    zoom, left, gap = 3, 96, 2
    cell = 28 * zoom + gap
    canvas = Image.new("L", (left + 10 * cell, 10 * cell), 255)
    pen = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, 10)
        enlarged = Image.fromarray(picture).resize((28 * zoom, 28 * zoom), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (left + column * cell, row * cell))
        if column == 0:
            pen.text((6, row * cell + 36), pipe.classes[row], fill=0)
    made = io.BytesIO()
    canvas.save(made, format="PNG", optimize=True)
    write_whole(path, made.getvalue(), overwrite=True)


def as_table(result: dict[str, Any]) -> str:
    lines = [
        f"fashion {result['fingerprint'][:12]}, trained on {result['images_seen']:,} pictures; "
        f"classifier {result['classifier'][:12]}, {result['classifier_accuracy']:.2%} on the real test split; "
        f"DPM-Solver++ 2M; torch {result['torch']}, {result['machine']}; "
        f"16 guided pictures in 10 steps: {result['cpu_seconds_16_pictures_10_steps']} CPU-seconds",
        "",
        "| guidance scale | steps | n | class accuracy | FD[fashion-cnn] to test | floor (real) | img/CPU-s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in result["cells"]:
        floor = "-" if cell["fd_floor"] is None else f"{cell['fd_floor']:.3f}"
        lines.append(
            f"| {cell['guidance_scale']:g} | {cell['steps']} | {cell['n']:,} | {cell['accuracy']:.1%} "
            f"| {cell['fd']:.2f} | {floor} | {cell['images_per_cpu_second']:g} |"
        )
    if not result["cells"]:
        return "\n".join(lines)
    largest = max(result["cells"], key=lambda cell: cell["n"] * cell["steps"])
    lines += ["", f"By class, w = {largest['guidance_scale']:g}, {largest['steps']} steps, n = {largest['n']:,}: "]
    lines[-1] += ", ".join(
        f"{name} {share:.1%}"
        for name, share in zip(models.FASHION_CLASSES, largest["accuracy_by_class"], strict=True)
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"only the cell {QUICK}")
    parser.add_argument("--json", action="store_true", help="print json instead of a table")
    parser.add_argument("--cells", help=f"guidance scale:steps:pictures, ... (default {FULL}; empty: none)")
    parser.add_argument("--grid", type=Path, help="also draw the 10 x 10 grid into this PNG")
    parser.add_argument("--write", action="store_true", help="add the cells to benchmarks/results/embedded_model.*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, judge = models.load("fashion"), models.classifier()
    pipe.set_progress_bar_config(disable=True)
    facts = models.config("fashion")
    result: dict[str, Any] = {
        "fingerprint": facts["sha256"],
        "images_seen": facts["training"]["images"],
        "classifier": models.fingerprint("fashion-cnn"),
        "classifier_accuracy": models.config("fashion-cnn")["training"]["test_accuracy"],
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread used",
        "date": datetime.date.today().isoformat(),
        "cells": [],
    }
    begun = time.process_time()
    generate(pipe, [i % 10 for i in range(16)], list(range(16)), facts["guidance_scale"], 10)
    result["cpu_seconds_16_pictures_10_steps"] = round(time.process_time() - begun, 2)
    if args.grid:
        draw_grid(pipe, args.grid, facts["guidance_scale"], facts["num_inference_steps"])
    cells = args.cells if args.cells is not None else (QUICK if args.quick else FULL)
    for text in filter(None, cells.split(",")):
        scale, steps, count = text.split(":")
        result["cells"].append(evaluate(pipe, judge, float(scale), int(steps), int(count)))
        if not args.json:
            print(result["cells"][-1], file=sys.stderr, flush=True)
    if args.write:
        write(result)
    print(json.dumps(result, indent=1) if args.json else as_table(result))


def write(result: dict[str, Any]) -> None:
    """Keep earlier cells of the same weights, replace those measured again."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "embedded_model.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["fingerprint"] == result["fingerprint"] and earlier["classifier"] == result["classifier"]:
            keys = [(c["guidance_scale"], c["steps"], c["n"]) for c in result["cells"]]
            old = [c for c in earlier["cells"] if (c["guidance_scale"], c["steps"], c["n"]) not in keys]
            result["cells"] = old + result["cells"]
    result["cells"].sort(key=lambda c: (c["n"], c["steps"], c["guidance_scale"]))
    for target, text in ((path, json.dumps(result, indent=1)), (path.with_suffix(".md"), as_table(result))):
        write_whole(target, (text + "\n").encode(), overwrite=True)


if __name__ == "__main__":
    main()
