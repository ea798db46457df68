"""Feynman-Kac correctors on the embedded model: guided, annealed, product and reward-tilted sampling.

    python benchmarks/correctors.py [--quick] [--json FILE]

1. FKC-CFG against plain CFG at equal network calls (plain: as many times more steps as there are particles), and plain
   CFG at the same steps: class accuracy, Fréchet distance of the classifier's features, effective sample size by step.
2. A reward-tilted run (log-probability of the class under the embedded classifier, steered) against best-of-K from the
   same number of network calls, K = 1, 2, 4, 8, 16, with the Fréchet distance beside the reward.
3. Gaussians of 16 and 64 dimensions: the share of the guidance bias that K particles remove.
4. Pictures of annealed classes and of products of classes.
5. The cost of weights and resampling as a share of a step at 16 particles.

Without --quick the table, the figures and the plots in benchmarks/results/ are written again. Every figure but the
last is a function of the seeds alone; the last is a ratio of thread CPU times measured in turns, so that the load of
the machine is on both sides. Every mean has its standard error: of a proportion, of a mean over pictures, or for the
Fréchet distance the delete-a-tenth jackknife. Fréchet distances of so few pictures are biased upwards; compare equal n,
and the distance of as many real pictures from the others.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffsamp.files import write_whole
from diffsamp.pixels import eight_bit

RESULTS = Path(__file__).parent / "results"
SOLVER, STEPS, PARTICLES, SCALE, ESS = "sde-dpmpp-2m", 10, 4, 4.0, 0.7
COUNTS, REWARD_SCALE, PICTURE_PARTICLES = (1, 2, 4, 8, 16), 4.0, 8
GAUSSIAN_COUNTS = (4, 8, 16, 64, 256, 1024)


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


def judged(samples: torch.Tensor, labels: torch.Tensor, judge: Any) -> dict[str, float]:
    """Share of the asked class, mean log-probability of it, Fréchet distance to the real test pictures; with errors."""
    from diffsamp import models

    pixels = eight_bit(samples)
    logs, features = [], []
    with torch.no_grad():
        for part in pixels.split(64):
            logs.append(torch.log_softmax(judge(part), 1))
            features.append(judge.features(part))
    log_p = torch.cat(logs)
    right = (log_p.argmax(1) == labels).double()
    mine = log_p.gather(1, labels[:, None])[:, 0].double()
    n = len(labels)
    share = float(right.mean())
    # Wilson's centre keeps the error of a share of 1 away from 0.
    centre = (share * n + 2.0) / (n + 4.0)
    distance, error = distance_of(torch.cat(features).double().numpy(), models.reference()[0]["test_features"])
    return {"n": n, "accuracy": share, "accuracy_se": math.sqrt(centre * (1 - centre) / (n + 4.0)),
            "log_p": float(mine.mean()), "log_p_se": float(mine.std()) / math.sqrt(n),
            "frechet": distance, "frechet_se": error}  # fmt: skip


def distance_of(features: np.ndarray, real: torch.Tensor) -> tuple[float, float]:
    """(Fréchet distance, its delete-a-tenth jackknife error)."""
    from diffsamp.metrics import frechet_distance
    from diffsamp.metrics.moments import FrechetStats

    reference = FrechetStats.of(real.double().numpy())
    whole, parts = frechet_distance(features, reference), min(10, len(features) // 3)
    # Every tenth holds pictures of all classes: they come class by class.
    left = [frechet_distance(np.delete(features, np.s_[i::parts], 0), reference) for i in range(parts)]
    return whole, math.sqrt((parts - 1) / parts * float(np.sum((np.array(left) - np.mean(left)) ** 2)))


def real_pictures(n: int) -> dict[str, float]:
    """The Fréchet distance of n real test pictures from the others: what a perfect sampler would get."""
    from diffsamp import models

    tensors = models.reference()[0]
    features, labels = tensors["test_features"].double(), tensors["test_labels"]
    picked = torch.cat([(labels == c).nonzero()[: n // 10, 0] for c in range(10)])
    others = torch.ones(len(labels), dtype=torch.bool)
    others[picked] = False
    distance, error = distance_of(features[picked].numpy(), features[others])
    return {"n": len(picked), "frechet": distance, "frechet_se": error}


def guided(pipe: Any, judge: Any, per_class: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """FKC-CFG and plain CFG; and the ESS share, (steps, groups)."""
    from diffsamp.correctors import Corrector, cfg

    target = cfg(SCALE)
    bare = Corrector(target, 1, choose="all")
    rows, curves = [], []
    variants = (
        ("CFG, equal steps", bare, STEPS),
        (f"FKC-CFG, K={PARTICLES}", Corrector(target, PARTICLES, ESS), STEPS),
        (f"FKC-CFG, K={PARTICLES}, trapezoid", Corrector(target, PARTICLES, ESS, rule="trapezoid"), STEPS),
        ("CFG, equal calls by steps", bare, STEPS * PARTICLES),
    )
    for name, corrector, steps in variants:
        pictures = []
        for label in range(10):
            seeds = [1000 * label + i for i in range(per_class)]
            result = run(pipe, corrector, (label, None), seeds, steps)
            pictures.append(result.samples[torch.from_numpy(result.chosen)])
            if corrector.particles > 1 and corrector.rule == "auto":
                curves.append(np.stack([i.ess for i in result.info]) / corrector.particles)
        labels = torch.arange(10).repeat_interleave(per_class)
        calls = steps * corrector.particles * 2
        rows.append({"name": name, "calls": calls, **judged(torch.cat(pictures), labels, judge)})
        _progress(rows[-1])
    return rows, np.concatenate(curves, 1)


def scaling(pipe: Any, judge: Any, per_class: int) -> list[dict[str, Any]]:
    """Steering by the classifier against best-of-K, equal network calls."""
    from diffsamp.correctors import Corrector, Steering
    from diffsamp.correctors.rewards import class_log_probability

    rows = []
    labels = torch.arange(10).repeat_interleave(per_class)
    seeds = [[5000 + 1000 * label + i for i in range(per_class)] for label in range(10)]
    rewards = [class_log_probability(judge, label) for label in range(10)]
    # Plain pictures for best-of-K: the first K of every group's 16.
    pool, worth = [], []
    for label in range(10):
        plain = run(pipe, Corrector(None, 16, choose="all"), (label,), seeds[label]).samples
        pool.append(plain.reshape(per_class, 16, 1, 28, 28))
        with torch.no_grad():
            worth.append(torch.cat([rewards[label](p) for p in plain.split(64)]).reshape(per_class, 16))
    for particles in COUNTS:
        best = [p[torch.arange(per_class), w[:, :particles].argmax(1)] for p, w in zip(pool, worth, strict=True)]
        steered = [p[:, 0] for p in pool]
        for label in range(10):
            if particles > 1:
                corrector = Corrector(None, particles, ESS, potential=Steering(rewards[label], REWARD_SCALE))
                result = run(pipe, corrector, (label,), seeds[label])
                steered[label] = result.samples[torch.from_numpy(result.chosen)]
        for name, made in (("steered", steered), ("best of K", best)):
            rows.append({"name": name, "particles": particles, "calls": STEPS * particles,
                         **judged(torch.cat(made), labels, judge)})  # fmt: skip
            _progress(rows[-1])
    return sorted(rows, key=lambda r: (r["name"], r["particles"]))


def dimensions(particles: tuple[int, ...], budget: int) -> list[dict[str, Any]]:
    """Gaussians in 16 and 64 dimensions: the share of the guidance bias of the variance that K particles remove.

    q_u = N(0, 1) and q_c = N(0, .5), w = 3: the target's variance is 1/(3/.5 - 2) = .25 in every direction. Of one draw
    by weight per group, E x^2 = E sum of weight times x^2. 100 steps in float32, resampled at each, by a first-order
    kernel and two of second order; ``budget`` bounds groups times particles times dimensions.
    """
    import diffsamp
    from diffsamp.correctors import Corrector, adams_maruyama, cfg, euler_maruyama

    process = diffsamp.Process.ve(0.002, 80.0)
    levels = [(20.0 ** (1 / 7) + r * (0.02 ** (1 / 7) - 20.0 ** (1 / 7))) ** 7 for r in np.linspace(0, 1, 101)]
    grid = diffsamp.Grid(process, tuple(process.level(float(v), i) for i, v in enumerate(levels)))
    end = levels[-1] ** 2
    target = 1 / (3 / (0.5 + end) - 2 / (1 + end))

    def predict(x: torch.Tensor, level: Any) -> tuple[torch.Tensor, ...]:
        s2 = level.noise_to_signal**2
        return x * (0.5 / (0.5 + s2)), x * (1.0 / (1.0 + s2))

    rows = []
    kernels = (euler_maruyama(process, grid, z=1.0), adams_maruyama(process, grid, z=1.0))
    for plan in (*kernels, diffsamp.solver(SOLVER)(process, grid)):
        generator = torch.Generator().manual_seed(2)
        x = levels[0] * torch.randn(2**17, 1, generator=generator)
        # No step's weight counts: the drift alone. Directions are independent, so one is enough.
        bare = Corrector(cfg(3.0), 2**17, window=(1e9, 2e9)).run(plan, predict, x, generator=generator)
        alone = float(bare.samples.double().square().mean())
        for dims in (16, 64):
            for k in particles:
                groups = max(16, min(512, budget // (k * dims)))
                generator = torch.Generator().manual_seed(3)
                x = levels[0] * torch.randn(groups * k, dims, generator=generator)
                result = Corrector(cfg(3.0), k, 1.0).run(plan, predict, x, generator=generator)
                square = result.samples.double().square().mean(1).numpy().reshape(groups, k)
                removed = (alone - (result.weights * square).sum(1)) / (alone - target)
                rows.append({"kernel": plan.solver.partition(":")[0], "dims": dims, "particles": k, "groups": groups,
                             "alone": alone, "target": float(target), "removed": float(removed.mean()),
                             "removed_se": float(removed.std(ddof=1)) / math.sqrt(groups),
                             "ancestors": float(result.unique_ancestors.mean()) / k})  # fmt: skip
    return rows


def _progress(row: dict[str, Any]) -> None:
    print(json.dumps(row), file=sys.stderr, flush=True)


def pictures(pipe: Any) -> tuple[dict[str, list[torch.Tensor]], dict[str, float]]:
    """Rows of pictures, and the lowest ESS share of each row."""
    from diffsamp.correctors import Corrector, annealed, composed

    made: dict[str, list[torch.Tensor]] = {}
    lowest: dict[str, float] = {}
    for beta in (1.0, 1.2, 1.5):
        name = f"beta = {beta:g}"
        made[name], sizes = [], []
        for label in (0, 3, 5, 8, 9):
            result = run(pipe, Corrector(annealed(beta), PICTURE_PARTICLES, ESS), (label,), [70 + label])
            made[name].append(result.samples[int(result.chosen[0])])
            sizes += [float(i.ess.min()) / PICTURE_PARTICLES for i in result.info]
        lowest[name] = min(sizes, default=1.0)
    for pair in ((3, 5), (1, 8), (2, 8), (7, 9), (0, 6)):
        name = f"{pair[0]}*{pair[1]}"
        result = run(pipe, Corrector(composed((1.5, 1.5)), PICTURE_PARTICLES, ESS), (*pair, None), [90])
        made.setdefault("product", []).append(result.samples[int(result.chosen[0])])
        lowest[name] = min(float(i.ess.min()) / PICTURE_PARTICLES for i in result.info)
    return made, lowest


def overhead(pipe: Any, particles: int = 16, repeats: int = 15) -> dict[str, float]:
    """Thread CPU time of weights and a forced resampling beside the network's, per step of one group."""
    from diffsamp import engine, rng
    from diffsamp.adapters.particles import class_denoiser
    from diffsamp.correctors import Corrector, cfg

    plan = plan_of(pipe, STEPS)
    denoise = class_denoiser(pipe, 3, None)
    full, uniforms = Corrector(cfg(SCALE), particles, 1.0), np.random.default_rng(0).random((1, 2 * particles))
    x = plan.first_level.sigma * rng.normal(list(range(particles)), (1, 28, 28))
    outputs = denoise(x, plan.rows[0].level)

    def all_steps() -> None:
        state = full.init(plan, x)
        for _ in plan.rows:
            state = full.step(plan, state, outputs, x, lambda i: uniforms, prediction="v_prediction")

    def plain_steps() -> None:
        state = engine.init(plan, x)
        for _ in plan.rows:
            mixed = outputs[1] + SCALE * (outputs[0] - outputs[1])
            state = engine.step(plan, state, mixed, x, prediction="v_prediction")

    work = (lambda: denoise(x, plan.rows[0].level), all_steps, plain_steps)
    # In turns, and the least of each: another process slows all three or none.
    least = np.array([[_timed(w) for w in work] for _ in range(repeats)]).min(0)
    network, extra, plain = least[0], (least[1] - least[2]) / len(plan.rows), least[2] / len(plan.rows)
    return {"network_ms": 1e3 * network, "corrector_ms": 1e3 * extra, "share": extra / (network + plain)}


def _timed(work: Any) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def _cells(r: dict[str, Any]) -> str:
    pairs = (("accuracy", 3), ("log_p", 3), ("frechet", 2))
    return " | ".join(f"{r[k]:.{d}f} ± {r[k + '_se']:.{d}f}" for k, d in pairs)


def table(found: dict[str, Any]) -> str:
    """The results as markdown."""
    lines = [
        "# Correctors on the embedded model", "",
        f"{found['machine']}, torch {found['torch']}, one thread; {SOLVER}, {STEPS} steps, ESS threshold {ESS}; "
        f"weights of the model {found['model'][:12]}.",
        "± is one standard error. Fréchet distances of so few pictures are biased upwards: compare equal n. "
        f"{found['real']['n']} real pictures against the others have {found['real']['frechet']:.2f} ± "
        f"{found['real']['frechet_se']:.2f}.", "",
        f"## Guidance scale {SCALE:g}", "",
        "| | pictures | network calls each | class accuracy | log p(class) | Fréchet distance |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in found["guided"]:
        lines.append(f"| {r['name']} | {r['n']} | {r['calls']} | {_cells(r)} |")
    lines += ["", "Mean ESS by step, share of K: " + ", ".join(f"{e:.2f}" for e in found["ess_by_step"]) + ".", "",
              f"## Steering by the classifier, scale {REWARD_SCALE:g}", "",
              "| | K | pictures | calls each | class accuracy | log p(class) | Fréchet distance |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in found["scaling"]:
        lines.append(f"| {r['name']} | {r['particles']} | {r['n']} | {r['calls']} | {_cells(r)} |")
    counts = sorted({r["particles"] for r in found["dimensions"]})
    lines += ["", "## Gaussians: share of the guidance bias of the variance removed by K particles", "",
              "Conditional variance .5, unconditional 1, w = 3 (target .25); 100 steps, resampled at each; one draw "
              "per group. Above 1 the variance is beyond the target's. Ancestors: share of the K first particles that "
              "have descendants.", "",
              "| kernel, variance by its drift alone | dimensions | | " + " | ".join(f"K = {k}" for k in counts) + " |",
              "|---|---|---|" + "---|" * len(counts)]  # fmt: skip
    for kernel in dict.fromkeys(r["kernel"] for r in found["dimensions"]):
        for dims in (16, 64):
            rows = [r for r in found["dimensions"] if (r["kernel"], r["dims"]) == (kernel, dims)]
            removed = " | ".join(f"{r['removed']:.2f} ± {r['removed_se']:.2f}" for r in rows)
            lines.append(f"| {kernel}, {rows[0]['alone']:.3f} | {dims} | removed | {removed} |")
            lines.append("| | | ancestors | " + " | ".join(f"{r['ancestors']:.2g}" for r in rows) + " |")
    o = found["overhead"]
    lines += ["", "## Cost at 16 particles", "",
              f"Weights and resampling at every step: {o['corrector_ms']:.2f} ms beside {o['network_ms']:.1f} ms of "
              f"network, {100 * o['share']:.1f} % of a step (thread CPU time).", "",
              f"## Lowest ESS of the pictures, share of {PICTURE_PARTICLES}", "",
              ", ".join(f"{k}: {v:.2f}" for k, v in found["lowest_ess"].items())]  # fmt: skip
    return "\n".join(lines) + "\n"


def plots(found: dict[str, Any], made: dict[str, list[torch.Tensor]]) -> None:
    """Curves and pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
    mean, spread = (np.array(found[k]) for k in ("ess_by_step", "ess_sd"))
    steps = range(1, len(mean) + 1)
    left.fill_between(steps, mean - spread, np.minimum(mean + spread, 1), alpha=0.2, lw=0, label="± sd over groups")
    left.plot(steps, mean, marker="o", label="mean")
    left.axhline(ESS, color="grey", linestyle=":", label="threshold")
    left.set(xlabel="step", ylabel="ESS / K before resampling", title=f"FKC-CFG, w = {SCALE:g}, K = {PARTICLES}")
    left.set_ylim(0, 1.05)
    left.legend(loc="lower left")
    for axis, key in ((middle, "log_p"), (right, "frechet")):
        for name in ("steered", "best of K"):
            rows = [r for r in found["scaling"] if r["name"] == name]
            axis.errorbar([r["particles"] for r in rows], [r[key] for r in rows], [r[f"{key}_se"] for r in rows],
                          marker="o", capsize=3, label=name)  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set(xlabel="particles K (equal network calls)")
    right.axhline(found["real"]["frechet"], color="grey", linestyle=":", label="as many real pictures")
    middle.set(ylabel="mean log p(class)", title=f"Reward, {found['scaling'][0]['n']} pictures")
    right.set(ylabel="Fréchet distance", title="Distance to the real pictures")
    middle.legend(loc="lower right")
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
    made = io.BytesIO()
    figure.savefig(made, dpi=110, format="png")
    write_whole(RESULTS / name, made.getvalue(), overwrite=True)
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
    made, lowest = pictures(pipe)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()} CPU", "torch": torch.__version__, "model": models.fingerprint("fashion"),
        "overhead": overhead(pipe), "lowest_ess": lowest,
    }  # fmt: skip
    per_class = 1 if arguments.quick else 20
    found["real"] = real_pictures(10 * per_class)
    found["dimensions"] = dimensions((4, 16), 2**14) if arguments.quick else dimensions(GAUSSIAN_COUNTS, 2**19)
    found["guided"], ess = guided(pipe, judge, per_class)
    found["ess_by_step"], found["ess_sd"] = ess.mean(1).tolist(), ess.std(1).tolist()
    found["scaling"] = scaling(pipe, judge, per_class)
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
    write_whole(path, text.encode(), overwrite=True)


if __name__ == "__main__":
    main()
