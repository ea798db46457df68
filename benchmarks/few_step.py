"""Few network calls on the embedded image model: stock diffusers against DC-Solver, DualFast, teleportation and grids.

    python benchmarks/few_step.py                # the committed table: benchmarks/results/few_step.{md,json,png}
    python benchmarks/few_step.py --quick

Trajectory error: mean squared distance of the final state to a 200-step run from the same noise, on seeds that no
calibration saw. Stock schedulers run as the tables that their own code yields (Plan.from_scheduler). Every artifact
used
must have been made for the weights at hand; methods without one are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from diffsamp import calibrate, engine, teleport
from diffsamp.calibrate.artifact import SHIPPED, find
from diffsamp.errors import DiffsampError
from diffsamp.grids import Grid, grid
from diffsamp.plan import Plan
from diffsamp.registry import solver
from diffsamp.solvers.dualfast import dualfast

RESULTS = Path(__file__).parent / "results"
STOCK = {
    "DDIM": ("DDIMScheduler", {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC-2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "UniPC-3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "DEIS": ("DEISMultistepScheduler", {}),
}
CALIBRATED = {
    "dc(unipc)": ("dc", "unipc"), "dc(dpmpp-2m)": ("dc", "dpmpp-2m"), "dc(ddim)": ("dc", "ddim"),
    "dc(deis)": ("dc", "deis"), "dualfast(ddim) calibrated": ("dualfast", "ddim"),
    "dualfast(dpmpp-2m) calibrated": ("dualfast", "dpmpp-2m"), "unipc on a calibrated grid": ("grid", "unipc"),
    "all together on unipc": ("all", "unipc"),
}  # fmt: skip

Start = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def stock_plan(name: str, model: calibrate.Model, nfe: int) -> Plan:
    import diffusers

    kind, options = STOCK[name]
    config = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    spacing = {"timestep_spacing": "trailing" if kind == "DDIMScheduler" else "linspace"}
    if kind == "DDIMScheduler":
        spacing |= {"clip_sample": False}
    return Plan.from_scheduler(getattr(diffusers, kind)(**config, **spacing, **options), nfe)


def plans(model: calibrate.Model, nfe: int, scale: float, start: float | None) -> dict[str, tuple[Plan, str]]:
    """Every method that has what it needs: name → (plan, how it starts)."""
    found: dict[str, tuple[Plan, str]] = {}
    base = grid("linspace", model.process, nfe)
    for name in STOCK:
        found[name] = (stock_plan(name, model, nfe), "noise")
    for name in ("ddim", "dpmpp-2m"):
        found[f"dualfast({name}) default"] = (dualfast(solver(name)(model.process, base)), "noise")
    for name, (method, inner) in CALIBRATED.items():
        try:
            artifact = find(method, inner)
            if artifact.model["sha256"] != model.sha256:
                continue
            if method == "grid":
                plan = solver(inner)(model.process, artifact.levels(model.process, nfe, scale))
            else:
                plan = artifact.apply(solver(inner)(model.process, base), scale)
        except DiffsampError:
            continue
        found[name] = (plan, "noise")
    if start is None:
        return found
    low = model.process.level(start)
    tail = Grid.from_times(model.process, np.linspace(low.t, 0, nfe + 1)[:-1])
    first = base.levels[0]
    large = np.linspace(low.t, 0, nfe)[:-1]
    stepped = Grid(model.process, (first, *Grid.from_times(model.process, large).levels))
    for name in ("unipc", "dpmpp-2m"):
        for kind in ("teleport", "mean only", "white"):
            found[f"{name}, {kind} start"] = (solver(name)(model.process, tail), kind)
        found[f"{name}, one large step first"] = (solver(name)(model.process, stepped), "noise")
    return found


def begin(kind: str, stats: teleport.Statistics | None, x: torch.Tensor, labels: torch.Tensor, scale: float, s, t):
    """The start at level t from the noise x at level s."""
    if kind == "noise":
        return x
    if kind == "white":
        return x * (t.sigma / s.sigma)
    assert stats is not None
    if kind == "mean only":
        mean = stats.mean.float().reshape(1, *x.shape[1:])
        return t.alpha * mean + (x - s.alpha * mean) * (t.sigma / s.sigma)
    return teleport.teleport(stats, x, s, t, labels=labels, guidance_scale=scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the figures as json")
    parser.add_argument("--seeds", type=int, default=16, help="held-out seeds of the trajectory error")
    parser.add_argument("--samples", type=int, default=0, help="pictures per Fréchet distance; 0 leaves it out")
    parser.add_argument("--nfe", default="4,5,6,8,10")
    parser.add_argument("--guidance-scale", default="1,3,7.5")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    nfes = [5] if args.quick else [int(v) for v in args.nfe.split(",")]
    scales = [1.0] if args.quick else [float(v) for v in args.guidance_scale.split(",")]
    count = 4 if args.quick else args.seeds
    model = calibrate.embedded("fashion")
    path = SHIPPED / "fashion-gaussian.safetensors"
    stats = teleport.load(path) if path.exists() else None
    noise, labels = model.points(range(count))
    rows = []
    for scale in scales:
        top = grid("linspace", model.process, 5)
        x = noise * top.levels[0].sigma
        denoiser = model.guided(labels, scale)
        goal = calibrate.Reference(
            model.process, top.levels, denoiser, x, steps=50 if args.quick else 200, prediction=model.prediction
        ).at(top.levels[-1])
        for nfe in nfes:
            for name, (plan, kind) in plans(model, nfe, scale, None if stats is None else stats.start).items():
                start = begin(kind, stats, x, labels, scale, top.levels[0], plan.first_level)
                made = engine.sample(plan, denoiser, start, prediction=model.prediction)
                each = (made - goal).double().square().flatten(1).mean(1)
                rows.append(
                    {
                        "method": name, "nfe": nfe, "guidance_scale": scale, "error": float(each.mean()),
                        "standard_error": float(each.std() / len(each) ** 0.5), "median": float(each.median()),
                    }
                )  # fmt: skip
            print(f"guidance {scale:g}, {nfe} calls done", file=sys.stderr, flush=True)
    distances = frechet(model, args.samples, nfes, scales) if args.samples else []
    result = {
        "model_sha256": model.sha256, "seeds": count, "samples": args.samples, "rows": rows, "frechet": distances,
        "torch": torch.__version__, "machine": f"{platform.machine()}, 1 thread", "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    text = table(result)
    if args.json:
        print(json.dumps(result))
    else:
        print(text)
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "few_step.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "few_step.md").write_text(text)
        plot(result, args.out / "few_step.png")


def frechet(model: calibrate.Model, samples: int, nfes: list[int], scales: list[float]) -> list[dict]:
    """Feature Fréchet distance of a few methods at the middle guidance scale."""
    from diffsamp.metrics.extractors import extractor
    from diffsamp.metrics.frechet import frechet_distance
    from diffsamp.metrics.references import reference

    net = extractor("fashion-cnn")
    real = reference("embedded", net)
    scale = scales[len(scales) // 2]
    found = []
    wanted = [("UniPC-2", 10), ("DPM-Solver++ 2M", 10), ("dc(unipc)", 5), ("UniPC-2", 5)]
    for name, nfe in wanted:
        plan = plans(model, nfe, scale, None).get(name, (None, ""))[0]
        if plan is None:
            continue
        made = []
        for first in range(0, samples, 50):
            noise, labels = model.points(range(10_000 + first, 10_000 + min(first + 50, samples)))
            denoiser = model.guided(labels, scale)
            made.append(engine.sample(plan, denoiser, noise * plan.first_level.sigma, prediction=model.prediction))
        pixels = ((torch.cat(made) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        distance = frechet_distance(net(pixels)["features"], real.stats)
        found.append({"method": name, "nfe": nfe, "guidance_scale": scale, "distance": distance})
        print(f"Fréchet distance of {name} at {nfe} calls done", file=sys.stderr, flush=True)
    return found


def table(result: dict) -> str:
    rows = result["rows"]
    nfes = sorted({r["nfe"] for r in rows})
    lines = [
        "# Few network calls on the embedded image model", "",
        f"Trajectory error ×1000 (mean squared distance per pixel of the final state to a 200-step run), {result['seeds']} "  # noqa: E501
        f"seeds that no calibration saw. Weights {result['model_sha256'][:12]}; torch {result['torch']}; "
        f"{result['machine']}; {result['date']}. Bold: at or below the best stock scheduler of that column.", "",
    ]  # fmt: skip
    for scale in sorted({r["guidance_scale"] for r in rows}):
        mine = {(r["method"], r["nfe"]): r for r in rows if r["guidance_scale"] == scale}
        names = list(dict.fromkeys(r["method"] for r in rows))
        best = {n: min(mine[name, n]["error"] for name in STOCK) for n in nfes}
        lines += [f"## Guidance scale {scale:g}", "", "| method | " + " | ".join(f"{n} calls" for n in nfes) + " |"]
        lines += ["|---|" + "---|" * len(nfes)]
        for name in names:
            cells = []
            for n in nfes:
                row = mine.get((name, n))
                text = "" if row is None else f"{1000 * row['error']:.2f} ± {1000 * row['standard_error']:.2f}"
                better = row is not None and name not in STOCK and row["error"] <= best[n]
                cells.append(f"**{text}**" if better else text)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    if result["frechet"]:
        lines += [
            f"## Feature Fréchet distance, {result['samples']} pictures",
            "",
            "| method | calls | guidance | distance |",
        ]
        lines += ["|---|---|---|---|"]
        for r in result["frechet"]:
            lines.append(f"| {r['method']} | {r['nfe']} | {r['guidance_scale']:g} | {r['distance']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    scales = sorted({r["guidance_scale"] for r in rows})
    figure, axes = plt.subplots(1, len(scales), figsize=(5 * len(scales), 4), squeeze=False)
    shown = ("DDIM", "DPM-Solver++ 2M", "UniPC-2", "dc(unipc)", "dc(dpmpp-2m)", "dc(ddim)", "unipc, teleport start")
    for axis, scale in zip(axes[0], scales, strict=True):
        for name in shown:
            points = [(r["nfe"], r["error"]) for r in rows if r["method"] == name and r["guidance_scale"] == scale]
            if points:
                axis.plot(*zip(*points, strict=True), "--" if name in STOCK else "-", marker="o", label=name)
        axis.set(title=f"guidance {scale:g}", xlabel="network calls", yscale="log")
    axes[0][0].set_ylabel("trajectory error")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
