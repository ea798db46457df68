"""Guidance from weak to strong on the embedded Fashion-MNIST model: CFG and what is meant to be better.

    python benchmarks/guidance.py [--quick] [--json FILE] [--n 100] [--out benchmarks/results/guidance]

Every cell makes the same pictures (same noise, same classes) with another method and scale w, and measures
    saturation   share of pixels at an end of the range, |x| >= 0.98 (of real pictures 0.527: the ground is black)
    rms          of all pixels before clipping (of real pictures 0.824)
    contrast     standard deviation of all pixels (of real pictures 0.705)
    accuracy     share that the embedded classifier takes for the asked class
    margin       mean log-odds that it gives to that class (still tells methods apart where all are right)
    FD           Frechet distance of its features to the test split (biased upwards at this n, alike in all cells)
    precision, recall   k = 3, features, against as many test pictures
Methods are then compared at equal accuracy and at equal margin, because at equal w they do not push equally hard.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

SCALES = (2.0, 3.0, 5.0, 10.0, 20.0)
STEPS = 10
METHODS = {
    "CFG": "cfg",
    "rescale": "cfg-rescale:{w},rescale=0.7",
    "interval": "interval:{w},sigma_min=0.3,sigma_max=5",
    "APG": "apg:{w},preset=sdxl-rms",
}
STRIP_CLASSES = (0, 1, 5, 8)


def labels(n: int) -> torch.Tensor:
    """Ten classes in turn."""
    return torch.arange(n) % 10


def pictures(pipe: Any, method: str | None, w: float, n: int, batch: int = 100) -> torch.Tensor:
    """Samples (n, 1, 28, 28), nominally in [-1, 1]; the noise depends on the picture's number alone."""
    from diffsamp.adapters.guidance_hook import attach, detach

    detach(pipe)
    if method is not None:
        attach(pipe, METHODS[method].format(w=w), None if "{w}" in METHODS[method] else w)
    made = []
    for start in range(0, n, batch):
        wanted = labels(n)[start : start + batch]
        generators = [torch.Generator().manual_seed(1000 + start + i) for i in range(len(wanted))]
        made.append(
            pipe(class_labels=wanted, guidance_scale=w, num_inference_steps=STEPS, generator=generators,
                 output_type="latent").images
        )  # fmt: skip
    detach(pipe)
    return torch.cat(made)


def measure(x: torch.Tensor, classifier: Any, real: torch.Tensor, reference: Any) -> dict[str, float]:
    """The figures of one cell."""
    from diffsamp.metrics import frechet_distance, precision_recall
    from diffsamp.pixels import eight_bit

    raw = x.float()
    seen = eight_bit(raw)
    with torch.no_grad():
        features = classifier.features(seen)
        logits = classifier.head(features).double()
    wanted = labels(len(x))
    log_p = logits.log_softmax(1)
    own = log_p.gather(1, wanted[:, None])[:, 0]
    others = log_p.scatter(1, wanted[:, None], -torch.inf).logsumexp(1)
    precision, recall = precision_recall(features.double().numpy(), real.double().numpy(), k=3)
    return {
        "saturation": (raw.abs() >= 0.98).double().mean().item(),
        "beyond": (raw.abs() > 1.0).double().mean().item(),
        "contrast": raw.clamp(-1, 1).std().item(),
        "rms": raw.square().mean().sqrt().item(),
        "accuracy": (logits.argmax(1) == wanted).double().mean().item(),
        "margin": (own - others).mean().item(),
        "fd": frechet_distance(features.double().numpy(), reference),
        "precision": float(precision),
        "recall": float(recall),
    }


def at_strength(rows: list[dict[str, Any]], key: str, value: float) -> dict[str, float] | None:
    """Figures where a method first reaches an accuracy or a margin, interpolated between cells (w in its log)."""
    rows = sorted(rows, key=lambda row: row["w"])
    for low, high in zip(rows, rows[1:], strict=False):
        a, b = low[key], high[key]
        if a <= value <= b and b > a:
            share = (value - a) / (b - a)
            mixed = {name: low[name] + share * (high[name] - low[name]) for name in low if name != "method"}
            mixed["w"] = float(np.exp(np.log(low["w"]) + share * np.log(high["w"] / low["w"])))
            return mixed
    return None


def matched(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Every method at the accuracies, or margins, that CFG reaches at its cells."""
    base = [row for row in rows if row["method"] == "none"]
    found = []
    for target in sorted({row[key] for row in rows if row["method"] == "CFG"}):
        for method in METHODS:
            here = at_strength([*base, *(row for row in rows if row["method"] == method)], key, target)
            if here is not None:
                found.append({"target": target, "method": method, **here})
    return found


def table(rows: list[dict[str, Any]], columns: tuple[str, ...], head: str) -> str:
    """A markdown table."""
    lines = [f"| {head} | w | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        name = row["method"] if "target" not in row else f"{row['target']:.3f} {row['method']}"
        lines.append(f"| {name} | {row['w']:.3g} | " + " | ".join(f"{row[column]:.3f}" for column in columns) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Figures against w, and against the margin reached."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(15, 7))
    base = next(row for row in rows if row["method"] == "none")
    names = ("rms", "accuracy", "fd", "recall")
    for axis, name in zip(axes[0], names, strict=True):
        for method in METHODS:
            line = sorted([base, *(row for row in rows if row["method"] == method)], key=lambda row: row["w"])
            axis.plot([row["w"] for row in line], [row[name] for row in line], "o-", ms=3, label=method)
        axis.set(xscale="log", xlabel="guidance scale w", title=f"{name} against w")
    for axis, name in zip(axes[1], ("rms", "saturation", "fd", "recall"), strict=True):
        for method in METHODS:
            line = sorted([base, *(row for row in rows if row["method"] == method)], key=lambda row: row["w"])
            axis.plot([row["margin"] for row in line], [row[name] for row in line], "o-", ms=3, label=method)
        axis.set(xlabel="class margin (mean log-odds)", title=f"{name} at equal strength")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def strip(first: dict[tuple[str, float], torch.Tensor], path: Path, scales: tuple[float, ...]) -> None:
    """Rows: method; columns: w; in each cell the same four pictures (same classes, same noise)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(METHODS), len(scales), figsize=(2.6 * len(scales), 0.8 * len(METHODS) + 0.4))
    for i, method in enumerate(METHODS):
        for j, w in enumerate(scales):
            row = torch.cat(list(first[method, w][list(STRIP_CLASSES), 0]), 1).clamp(-1, 1)
            axis = axes[i, j]
            axis.imshow(row, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if i == 0:
                axis.set_title(f"w = {w:g}", fontsize=9)
            if j == 0:
                axis.set_ylabel(method, fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Sample, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="40 pictures and two scales, no files")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--n", type=int, default=100, help="pictures per cell (default 100)")
    parser.add_argument("--out", type=Path, help="write OUT.json, OUT.md, OUT.png and OUT_strip.png")
    options = parser.parse_args()
    torch.set_num_threads(1)

    import diffsamp.models as models
    from diffsamp.metrics import FrechetStats

    n, scales = (40, (3.0, 10.0)) if options.quick else (options.n, SCALES)
    fingerprint = models.fingerprint("fashion")
    pipe, classifier = models.load("fashion"), models.load("fashion-cnn")
    pipe.set_progress_bar_config(disable=True)
    tensors, facts = models.reference()
    reference = FrechetStats.from_covariance(facts["test_n"], tensors["test_mean"].numpy(), tensors["test_cov"].numpy())
    order = torch.randperm(len(tensors["test_labels"]), generator=torch.Generator().manual_seed(0))
    real = tensors["test_features"][order[:n]].float()

    names = ("rms", "saturation", "contrast", "accuracy", "margin", "fd", "precision", "recall")
    cells = [("none", 1.0), *((method, w) for w in scales for method in METHODS)]
    rows: list[dict[str, Any]] = []
    first: dict[tuple[str, float], torch.Tensor] = {}
    started = time.process_time()
    for method, w in cells:
        x = pictures(pipe, None if method == "none" else method, w, n)
        first[method, w] = x[:10]
        rows.append({"method": method, "w": float(w), **measure(x, classifier, real, reference)})
        print(f"{method:<9} w {w:<5g}" + " ".join(f"{name} {rows[-1][name]:.3f}" for name in names), flush=True)
    equal, strong = matched(rows, "accuracy"), matched(rows, "margin")
    print("\nat equal class accuracy (interpolated)\n" + table(equal, names, "accuracy, method"))
    print("\nat equal margin (interpolated)\n" + table(strong, names, "margin, method"))
    record = {
        "n": n, "steps": STEPS, "methods": METHODS, "rows": rows, "equal_accuracy": equal, "equal_margin": strong,
        "model_sha256": fingerprint, "torch": torch.__version__,
        "machine": f"{platform.machine()}, 1 thread", "cpu_seconds": round(time.process_time() - started),
    }  # fmt: skip
    for path in (options.json, options.out and options.out.with_suffix(".json")):
        if path is not None:
            part = path.with_suffix(".part")
            part.write_text(json.dumps(record, indent=1))
            part.replace(path)
    if options.out is not None:
        plot(rows, options.out.with_suffix(".png"))
        strip(first, options.out.with_name(options.out.name + "_strip.png"), scales)
        about = (
            f"Fashion-MNIST, {n} pictures a cell (same noise in all), {STEPS} steps of DPM-Solver++(2M), model "
            f"{record['model_sha256'][:12]}, torch {record['torch']}, {record['machine']}. Written by\n"
            f"`python benchmarks/guidance.py --n {n} --out benchmarks/results/guidance`.\n"
            f"An accuracy of 0.95 is good to ±{1.96 * (0.95 * 0.05 / n) ** 0.5:.2f} at this n, FD is biased upwards "
            "(alike in all cells).\nReal test pictures: rms 0.824, saturation 0.527, contrast 0.705.\n"
        )
        text = (
            f"# Guidance on the embedded model\n\n{about}\n## At equal scale\n\n"
            + table(rows, names, "method")
            + "\n\n## At equal class accuracy\n\nInterpolated at the accuracies that CFG reaches.\n\n"
            + table(equal, names, "accuracy, method")
            + "\n\n## At equal margin\n\n"
            + table(strong, names, "margin, method")
            + "\n"
        )
        part = options.out.with_suffix(".md.part")
        part.write_text(text)
        part.replace(options.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
