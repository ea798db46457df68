"""Feynman-Kac correctors on the embedded model: guided, annealed, product and reward-tilted sampling.

    python benchmarks/correctors.py [--quick] [--json FILE]

1. FKC-CFG against plain CFG at equal network calls (plain: as many times more steps as there are particles), and plain
   CFG at the same steps: class accuracy, Fréchet distance of the classifier's features, effective sample size by step.
2. A reward-tilted run (log-probability of the class under the embedded classifier, steered) against best-of-K from the
   same number of network calls, K = 1, 2, 4, 8, 16, with the Fréchet distance beside the reward.
3. Pictures of annealed classes and of products of classes.
4. The cost of weights and resampling as a share of a step at 16 particles.

Without --quick the table, the figures and the plot in benchmarks/results/ are written again. Fréchet distances of so
few pictures are biased upwards by far more than their differences mean; compare only numbers of equal n.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
SOLVER, STEPS, PARTICLES, SCALE, ESS = "sde-dpmpp-2m", 10, 8, 4.0, 0.7


def plan_of(pipe: Any, steps: int) -> Any:
    """The stochastic plan of the embedded model."""
    import diffsamp

    diffsamp.use(pipe, SOLVER)
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.plan


def run(pipe: Any, corrector: Any, labels: tuple[int | None, ...], seeds: list[int], steps: int = STEPS) -> Any:
    """One group per seed."""
    from diffsamp import rng
    from diffsamp.adapters.particles import class_denoiser
    from diffsamp.correctors import slot_seeds

    plan = plan_of(pipe, steps)
    slots = slot_seeds(seeds, len(seeds), corrector.particles)
    x = plan.first_level.sigma * rng.normal(slots, (1, 28, 28))
    return corrector.run(plan, class_denoiser(pipe, *labels), x, prediction=pipe.scheduler.prediction, seeds=slots)


def judged(samples: torch.Tensor, labels: torch.Tensor, judge: Any) -> tuple[float, float, float]:
    """(share of the asked class, mean log-probability of it, Fréchet distance to the real test pictures)."""
    from diffsamp import models
    from diffsamp.metrics import frechet_distance

    pixels = ((samples / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    with torch.no_grad():
        logs = torch.log_softmax(judge(pixels), 1)
        features = judge.features(pixels)
    tensors, _ = models.reference()
    real = tensors["test_features"].float()
    distance = frechet_distance(features.double().numpy(), real.double().numpy())
    right = (logs.argmax(1) == labels).double().mean()
    return float(right), float(logs.gather(1, labels[:, None]).mean()), distance


def guided(pipe: Any, judge: Any, per_class: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """FKC-CFG and plain CFG; and the mean ESS share by step."""
    from diffsamp.correctors import Corrector, cfg

    target = cfg(SCALE)
    bare = Corrector(target, 1, choose="all")
    rows, curves = [], []
    variants = (
        (f"FKC-CFG, K={PARTICLES}", Corrector(target, PARTICLES, ESS), STEPS),
        ("CFG, equal calls by steps", bare, STEPS * PARTICLES),
        ("CFG, equal steps", bare, STEPS),
    )
    for name, corrector, steps in variants:
        pictures, labels = [], []
        for label in range(10):
            seeds = [1000 * label + i for i in range(per_class)]
            result = run(pipe, corrector, (label, None), seeds, steps)
            pictures.append(result.samples[torch.from_numpy(result.chosen)])
            labels += [label] * per_class
            if corrector.particles > 1:
                curves.append(np.stack([i.ess for i in result.info]) / corrector.particles)
        accuracy, reward, distance = judged(torch.cat(pictures), torch.tensor(labels), judge)
        calls = steps * corrector.particles * 2
        rows.append({"name": name, "n": len(labels), "calls": calls, "accuracy": accuracy, "log_p": reward,
                     "frechet": distance})  # fmt: skip
    return rows, np.concatenate(curves, 1)


def scaling(pipe: Any, judge: Any, groups: int) -> list[dict[str, Any]]:
    """Steering by the classifier against best-of-K, equal network calls."""
    from diffsamp.correctors import Corrector, Steering
    from diffsamp.correctors.rewards import class_log_probability

    rows = []
    classes = [i % 10 for i in range(groups)]
    pool: dict[int, Any] = {}
    for particles in (16, 1, 2, 4, 8):
        steered, best = [], []
        for label in sorted(set(classes)):
            reward = class_log_probability(judge, label)
            seeds = [5000 + i for i, c in enumerate(classes) if c == label]
            if particles == 16:
                # Plain pictures for best-of-K; the first K of every group's 16.
                pool[label] = run(pipe, Corrector(None, 16, choose="all"), (label,), seeds).samples.reshape(
                    len(seeds), 16, 1, 28, 28
                )
            plain = pool[label][:, :particles]
            with torch.no_grad():
                worth = reward(plain.flatten(0, 1)).reshape(len(seeds), particles)
            best.append(plain[torch.arange(len(seeds)), worth.argmax(1)])
            if particles == 1:
                steered.append(plain[:, 0])
                continue
            corrector = Corrector(None, particles, ESS, potential=Steering(reward, 4.0))
            result = run(pipe, corrector, (label,), seeds)
            steered.append(result.samples[torch.from_numpy(result.chosen)])
        labels = torch.tensor(sorted(classes))
        for name, made in (("steered", steered), ("best of K", best)):
            accuracy, value, distance = judged(torch.cat(made), labels, judge)
            rows.append({"name": name, "particles": particles, "n": groups, "calls": STEPS * particles,
                         "accuracy": accuracy, "log_p": value, "frechet": distance})  # fmt: skip
    return sorted(rows, key=lambda r: (r["name"], r["particles"]))


def pictures(pipe: Any) -> tuple[dict[str, list[torch.Tensor]], dict[str, float]]:
    """Rows of pictures, and the lowest ESS share of each row."""
    from diffsamp.correctors import Corrector, annealed, composed

    made: dict[str, list[torch.Tensor]] = {}
    lowest: dict[str, float] = {}
    for beta in (1.0, 1.2, 1.5):
        name = f"beta = {beta:g}"
        made[name], sizes = [], []
        for label in (0, 3, 5, 8, 9):
            result = run(pipe, Corrector(annealed(beta), PARTICLES, ESS), (label,), [70 + label])
            made[name].append(result.samples[int(result.chosen[0])])
            sizes += [float(i.ess.min()) / PARTICLES for i in result.info]
        lowest[name] = min(sizes, default=1.0)
    for pair in ((3, 5), (1, 8), (2, 8), (7, 9), (0, 6)):
        name = f"{pair[0]}*{pair[1]}"
        result = run(pipe, Corrector(composed((1.5, 1.5)), PARTICLES, ESS), (*pair, None), [90])
        made.setdefault("product", []).append(result.samples[int(result.chosen[0])])
        lowest[name] = min(float(i.ess.min()) / PARTICLES for i in result.info)
    return made, lowest


def overhead(pipe: Any, particles: int = 16, repeats: int = 5) -> dict[str, float]:
    """CPU time of weights and a forced resampling beside the network's, per step of one group."""
    from diffsamp import engine, rng
    from diffsamp.adapters.particles import class_denoiser
    from diffsamp.correctors import Corrector, cfg

    plan = plan_of(pipe, STEPS)
    denoise = class_denoiser(pipe, 3, None)
    full, uniforms = Corrector(cfg(SCALE), particles, 1.0), np.random.default_rng(0).random((1, 2 * particles))
    x = plan.first_level.sigma * rng.normal(list(range(particles)), (1, 28, 28))
    outputs = denoise(x, plan.rows[0].level)
    network = min(_timed(lambda: denoise(x, plan.rows[0].level)) for _ in range(repeats))

    def all_steps() -> None:
        state = full.init(plan, x)
        for _ in plan.rows:
            state = full.step(plan, state, outputs, x, lambda i: uniforms, prediction="v_prediction")

    def plain_steps() -> None:
        state = engine.init(plan, x)
        for _ in plan.rows:
            mixed = outputs[1] + SCALE * (outputs[0] - outputs[1])
            state = engine.step(plan, state, mixed, x, prediction="v_prediction")

    with_weights = min(_timed(all_steps) for _ in range(repeats)) / len(plan.rows)
    without = min(_timed(plain_steps) for _ in range(repeats)) / len(plan.rows)
    extra = with_weights - without
    return {"network_ms": 1e3 * network, "corrector_ms": 1e3 * extra, "share": extra / (network + without)}


def _timed(work: Any) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def table(found: dict[str, Any]) -> str:
    """The results as markdown."""
    lines = [
        "# Correctors on the embedded model", "",
        f"{found['machine']}, torch {found['torch']}, one thread; {SOLVER}, {STEPS} steps, ESS threshold {ESS}; "
        f"weights of the model {found['model'][:12]}.",
        "Fréchet distances of so few pictures are biased upwards; compare only equal n.", "",
        f"## Guidance scale {SCALE:g}", "",
        "| | pictures | network calls each | class accuracy | log p(class) | Fréchet distance |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in found["guided"]:
        lines.append(f"| {r['name']} | {r['n']} | {r['calls']} | {r['accuracy']:.3f} | {r['log_p']:.3f} | "
                     f"{r['frechet']:.2f} |")  # fmt: skip
    lines += ["", f"Lowest mean ESS over steps: {min(found['ess_by_step']):.2f} of K.", "",
              "## Steering by the classifier", "",
              "| | K | pictures | calls each | class accuracy | log p(class) | Fréchet distance |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in found["scaling"]:
        lines.append(f"| {r['name']} | {r['particles']} | {r['n']} | {r['calls']} | {r['accuracy']:.3f} | "
                     f"{r['log_p']:.3f} | {r['frechet']:.2f} |")  # fmt: skip
    o = found["overhead"]
    lines += ["", "## Cost at 16 particles", "",
              f"Weights and resampling at every step: {o['corrector_ms']:.2f} ms beside {o['network_ms']:.1f} ms of "
              f"network, "
              f"{100 * o['share']:.1f} % of a step.", "", "## Lowest ESS of the pictures, share of K", "",
              ", ".join(f"{k}: {v:.2f}" for k, v in found["lowest_ess"].items())]  # fmt: skip
    return "\n".join(lines) + "\n"


def plots(found: dict[str, Any], made: dict[str, list[torch.Tensor]]) -> None:
    """Curves and pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.plot(range(1, len(found["ess_by_step"]) + 1), found["ess_by_step"], marker="o")
    left.axhline(ESS, color="grey", linestyle=":")
    left.set(xlabel="step", ylabel="mean ESS / K before resampling", title=f"FKC-CFG, w = {SCALE:g}, K = {PARTICLES}")
    left.set_ylim(0, 1.05)
    for name in ("steered", "best of K"):
        rows = [r for r in found["scaling"] if r["name"] == name]
        right.plot([r["particles"] for r in rows], [r["log_p"] for r in rows], marker="o", label=name)
    right.set(xlabel="particles K", ylabel="mean log p(class)", title="Reward at equal network calls")
    right.set_xscale("log", base=2)
    right.legend()
    _save(figure, "correctors-curves.png", plt)
    figure, axes = plt.subplots(len(made), 5, figsize=(6, 1.35 * len(made)))
    titles = ("3*5", "1*8", "2*8", "7*9", "0*6")
    for line, (name, row) in zip(axes, made.items(), strict=True):
        for i, (axis, picture) in enumerate(zip(line, row, strict=True)):
            axis.imshow(picture[0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if name == "product":
                axis.set_xlabel(titles[i], fontsize=8)
        line[0].set_ylabel(name, fontsize=8)
    _save(figure, "correctors-pictures.png", plt)


def _save(figure: Any, name: str, plt: Any) -> None:
    figure.tight_layout()
    partial = RESULTS / f"{name}.part"
    figure.savefig(partial, dpi=110, format="png")
    os.replace(partial, RESULTS / name)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few pictures; nothing is written to results/")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import diffsamp
    from diffsamp import models

    pipe, judge = diffsamp.load("fashion"), models.classifier()
    start = time.process_time()
    made, lowest = pictures(pipe)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()} CPU", "torch": torch.__version__, "model": models.fingerprint("fashion"),
        "overhead": overhead(pipe), "lowest_ess": lowest,
    }  # fmt: skip
    found["guided"], ess = guided(pipe, judge, 1 if arguments.quick else 4)
    found["ess_by_step"] = ess.mean(1).tolist()
    found["scaling"] = scaling(pipe, judge, 10 if arguments.quick else 30)
    found["cpu_seconds"] = time.process_time() - start
    print(table(found))
    written = json.dumps(found, indent=1)
    if arguments.json is not None:
        _write(arguments.json, written)
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        _write(RESULTS / "correctors.json", written)
        _write(RESULTS / "correctors.md", table(found))
        plots(found, made)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    main()
