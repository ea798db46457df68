"""Masked text: quality against network calls, the temperature that float32 draws cost, and speed.

    python benchmarks/masked.py --quick              # a minute or two
    python benchmarks/masked.py --part speed --json
    python benchmarks/masked.py --write              # benchmarks/results/masked.{md,json} and two plots

quality      generative perplexity by an independent judge (a Kneser-Ney trigram on chapters that the model never saw)
             together with token entropy and distinct bigrams, since a low temperature lowers perplexity alone.
temperature  the law of a float32 race (lattice of 2^-24) applied to the model's own predictions.
speed        CPU seconds of one thread. Full runs are composed of measured parts, calls x (body + head + sampler) +
             steps x draw, with a random network of 4 layers and width 256; one case is also run end to end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from kneser_ney import KneserNey  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from diffsamp import masked  # noqa: E402
from diffsamp.masked.ancestral import ancestral, mixed_race  # noqa: E402
from diffsamp.masked.text_model import MaskedTransformer, TextModelConfig  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def cpu(function: Any, least: float = 0.15, most: int = 20) -> float:
    """Median CPU seconds of a call, over at least `least` seconds."""
    function()
    times: list[float] = []
    while not times or (sum(times) < least and len(times) < most):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return sorted(times)[len(times) // 2]


# ---------------------------------------------------------------------------------------------------------- quality


def text_facts(rows: list[list[int]], judge: KneserNey) -> dict[str, float]:
    """Judge's perplexity, token entropy in nats, share of distinct bigrams; means over rows."""
    nats = float(np.mean([judge.nats(row) for row in rows]))
    entropies = []
    for row in rows:
        share = np.array(list(Counter(row).values())) / len(row)
        entropies.append(float(-(share * np.log(share)).sum()))
    pairs = [pair for row in rows for pair in zip(row, row[1:], strict=False)]
    return {
        "gen_perplexity": math.exp(nats),
        "entropy": float(np.mean(entropies)),
        "distinct_2": len(set(pairs)) / len(pairs),
    }


def quality(quick: bool) -> list[dict[str, Any]]:
    model = masked.load_text_model()
    heldout = load_file(str(Path(__file__).parent / "data" / "kjv_heldout.safetensors"))
    judge = KneserNey(heldout["judge"].tolist(), 3, model.vocab_size - 1)
    rows, length = (4, 64) if quick else (4, 128)
    x = torch.full((rows, length), model.mask_id)
    real = heldout["test"][: rows * length].long().view(rows, length).tolist()
    table = [{"sampler": "real text (test chapters)", "calls": 0, **text_facts(real, judge)}]
    cells: list[tuple[str, Any, str, dict[str, Any]]] = []
    for steps in (8, 32) if quick else (8, 32, 128):
        cells.append(("first hitting", masked.FirstHitting(steps=steps), "random", {}))
        if steps in (8, 32):
            cells.append(("first hitting, 2nd order", masked.FirstHitting(steps=steps, extrapolate=True), "random", {}))
            cells.append(("count-first ancestral", masked.CountFirst(steps), "random", {}))
    for steps in (16,) if quick else (32,):
        cells += [
            ("confidence order", masked.FirstHitting(steps=steps), "confidence", {}),
            ("entropy order", masked.FirstHitting(steps=steps), "entropy", {}),
            ("low-confidence (legacy)", masked.FirstHitting(steps=steps), "low-confidence", {}),
        ]
    cells.append(("first hitting, T = 0.8", masked.FirstHitting(steps=32), "random", {"temperature": 0.8}))
    cells.append(("first hitting, top-p 0.9", masked.FirstHitting(steps=32), "random", {"top_p": 0.9}))
    for name, sampler, order, options in cells:
        tokens, facts = masked.sample(
            model,
            x,
            mask_id=model.mask_id,
            sampler=sampler,
            order=order,
            seeds=range(rows),
            record_entropy=False,
            **options,
        )
        table.append({"sampler": name, "calls": facts["calls"], **text_facts(tokens.tolist(), judge)})
    return table


# ------------------------------------------------------------------------------------------------------ temperature


def lattice_law(p: np.ndarray, steps: int, t: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(law given an unmasking, unmasking rate over the right one) of a float32 race at time t of N steps, rows of p."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        x = 2.0**-24 * steps * t / p
        kept = np.where(x > 700, 0.0, p * x / np.expm1(np.minimum(x, 700)))
    rate = kept.sum(-1)
    return kept / rate[..., None], rate


def effective_temperature(p: np.ndarray, q: np.ndarray) -> float:
    """The T for which softmax(log p / T) is closest in KL to q, averaged over rows."""
    best, logp = (math.inf, 1.0), np.log(np.maximum(p, 1e-300))
    for temperature in np.linspace(0.5, 1.1, 121):
        scaled = logp / temperature
        top = scaled.max(-1, keepdims=True)
        log_norm = top + np.log(np.exp(scaled - top).sum(-1, keepdims=True))
        best = min(best, (float(-(q * (scaled - log_norm)).sum(-1).mean()), float(temperature)))
    return best[1]


def temperature(quick: bool) -> dict[str, Any]:
    model = masked.load_text_model()
    x = torch.full((4, 64 if quick else 128), model.mask_id)
    kept = []

    def keep(state: masked.MaskedState) -> None:
        if state.calls % 16 == 1:
            logits = model(state.x)[state.masked][:, : model.mask_id]
            kept.append(logits[:: 16 if quick else 4].double().softmax(-1).numpy())

    masked.sample(model, x, mask_id=model.mask_id, sampler=masked.FirstHitting(steps=64), seeds=range(4), callback=keep)
    p = np.concatenate(kept)
    big = 1 / np.arange(1, 50_258)
    zipf = (big / big.sum())[None]
    law = []
    for steps in (256, 1024, 2048, 10_000, 50_000, 250_000):
        entry: dict[str, Any] = {"steps": steps}
        for name, source in (("embedded model, V=1,024", p), ("Zipf, V=50,257", zipf)):
            q, rate = lattice_law(source, steps)
            entropy = [float(-(a * np.log(np.maximum(a, 1e-300))).sum(-1).mean()) for a in (source, q)]
            entry[name] = {
                "temperature": effective_temperature(source, q),
                "rate": float(rate.mean()),
                "entropy_change": entropy[1] - entropy[0],
            }
        law.append(entry)
    return {"law": law, "predictions": len(p)}


# ------------------------------------------------------------------------------------------------------------ speed


def network(length: int, vocabulary: int) -> MaskedTransformer:
    torch.manual_seed(0)
    return MaskedTransformer(
        TextModelConfig(vocab_size=vocabulary + 1, mask_id=vocabulary, max_length=length, width=256, layers=4, heads=4)
    ).eval()


@torch.no_grad()
def parts(length: int, vocabulary: int) -> dict[str, float]:
    """CPU seconds of the parts of one call, batch 1."""
    net = network(length, vocabulary)
    x = torch.full((1, length), vocabulary)
    hidden = net.hidden(x)
    logits = net.head(hidden)[0].contiguous()
    usable = logits[:, :vocabulary].contiguous()

    def run(sampler: Any, events: int = 8) -> None:
        state = masked.init(sampler, x, mask_id=vocabulary, seeds=[0], record_entropy=False)
        for _ in range(events):
            state = masked.step(state, lambda ids, t, positions=None: logits[None][:, positions[0]])

    row = usable[:1]
    u = torch.rand(1, 2, dtype=torch.float64)
    return {
        "body": cpu(lambda: net.hidden(x)), "head": cpu(lambda: net.head(hidden)),
        "head_row": cpu(lambda: net.head(hidden[:, :1])),
        "race_fp32": cpu(lambda: mixed_race(usable, 0.1, "fp32")),
        "race_fp64": cpu(lambda: mixed_race(usable, 0.1, "fp64")),
        "sampler": cpu(lambda: run(masked.FirstHitting())) / 8,
        "row_safe": cpu(lambda: masked.categorical.draw(row, lambda shape: u)),
        "row_gumbel_fp64": cpu(lambda: masked.sample_categorical(row, precision="fp64")),
    }  # fmt: skip


def speed(quick: bool) -> dict[str, Any]:
    cases = [(128, 256, 128), (128, 4096, 512)] if quick else [
        (128, 256, 128), (128, 4096, 512), (128, 32768, 2048), (512, 4096, 2048), (1024, 256, 1024),
        (1024, 256, 2048), (1024, 32768, 10_000)]  # fmt: skip
    measured: dict[tuple[int, int], dict[str, float]] = {}
    table = []
    for length, vocabulary, steps in cases:
        key = (length, vocabulary)
        if key not in measured:
            measured[key] = parts(*key)
        c = measured[key]
        calls = masked.expected_calls(steps, length)
        forward = c["body"] + c["head"]
        one_row = c["body"] + c["head_row"]
        naive = {p: calls * forward + steps * c[f"race_{p}"] for p in ("fp32", "fp64")}
        ours = {
            "count-first": calls * (forward + c["sampler"]),
            "first hitting": length * (forward + c["sampler"]),
            "count-first, rows only": calls * (one_row + c["sampler"]),
            "first hitting, one-row head": length * (one_row + c["sampler"]),
        }
        table.append(
            {
                "L": length,
                "V": vocabulary,
                "N": steps,
                "ancestral_calls": calls,
                "parts_ms": {k: round(1e3 * v, 3) for k, v in c.items()},
                "seconds": {**naive, **ours},
                **{f"{name} / fp64": naive["fp64"] / t for name, t in ours.items()},
                **{f"{name} / fp32": naive["fp32"] / t for name, t in ours.items()},
                "naive uncached / count-first": (steps * forward + steps * c["race_fp64"]) / ours["count-first"],
            }
        )
    end: dict[str, Any] = {}
    length, vocabulary, steps = (64, 1024, 128) if quick else (128, 4096, 512)
    net = network(length, vocabulary)
    x = torch.full((1, length), vocabulary)
    denoiser = torch.no_grad()(lambda ids, t: net(ids))
    runs = {
        "ancestral fp64": lambda: ancestral(denoiser, x, mask_id=vocabulary, steps=steps)[1],
        "count-first": lambda: masked.sample(
            denoiser, x, mask_id=vocabulary, sampler=masked.CountFirst(steps), seeds=[0], record_entropy=False
        )[1]["calls"],
    }
    for name, function in runs.items():
        start = time.process_time()
        calls = function()
        end[name] = {"seconds": time.process_time() - start, "calls": calls}
    end["ratio"] = end["ancestral fp64"]["seconds"] / end["count-first"]["seconds"]
    end["case"] = {"L": length, "V": vocabulary, "N": steps}
    return {"composed": table, "end_to_end": end}


# ----------------------------------------------------------------------------------------------------------- report

BARS = [
    ("count-first / fp64", 128, 4096, 512, 3.0),
    ("count-first / fp32", 128, 4096, 512, 2.0),
    ("count-first / fp64", 128, 32768, 2048, 20.0),
    ("count-first / fp64", 1024, 256, 1024, 0.95),
    ("first hitting / fp64", 512, 4096, 2048, 3.5),
    ("count-first / fp64", 1024, 32768, 10_000, 15.0),
    ("first hitting / fp64", 1024, 32768, 10_000, 15.0),
]


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars of the design, with what was measured."""
    found = {(row["L"], row["V"], row["N"]): row for row in result["composed"]}
    out = [
        {"bar": f"{name}, L={a} V={b} N={n}", "measured": found[a, b, n][name], "needed": need}
        for name, a, b, n, need in BARS
        if (a, b, n) in found
    ]
    for (a, b, n), row in found.items():
        if (a, b) == (128, 32768):
            s = row["seconds"]
            out.append(
                {
                    "bar": f"one-row head against full head, L={a} V={b}",
                    "needed": 2.0,
                    "measured": s["first hitting"] / s["first hitting, one-row head"],
                }
            )
            ms = row["parts_ms"]
            out.append(
                {
                    "bar": "inverse-CDF row against fp64 Gumbel row, V=32768",
                    "needed": 2.0,
                    "measured": ms["row_gumbel_fp64"] / ms["row_safe"],
                }
            )
        if (a, b, n) == (512, 4096, 2048):
            ms = row["parts_ms"]
            out.append(
                {
                    "bar": "denoiser time over sampler overhead, L=512 V=4096 (5 % allowed)",
                    "needed": 20.0,
                    "measured": (ms["body"] + ms["head"]) / ms["sampler"],
                }
            )
    case = result["end_to_end"]["case"]
    if (case["L"], case["V"], case["N"]) == (128, 4096, 512):
        name = "count-first / fp64, end to end, L=128 V=4096 N=512"
        out.append({"bar": name, "needed": 3.0, "measured": result["end_to_end"]["ratio"]})
    for entry in out:
        entry["met"] = bool(entry["measured"] >= entry["needed"])
    return out


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Masked text", "", f"{result['machine']}; torch {result['torch']}; one thread, CPU seconds.", ""]
    if "quality" in result:
        lines += [
            "## Quality against calls",
            "",
            "| sampler | calls | gen. perplexity | token entropy | distinct-2 |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['sampler']} | {r['calls']} | {r['gen_perplexity']:.1f} | {r['entropy']:.3f} | "
            f"{r['distinct_2']:.3f} |"
            for r in result["quality"]
        ]
    if "temperature" in result:
        names = [k for k in result["temperature"]["law"][0] if k != "steps"]
        lines += [
            "",
            "## What float32 races cost (law of the 2^-24 lattice, first step)",
            "",
            "| steps | " + " | ".join(f"{n}: T, unmask rate, entropy change" for n in names) + " |",
            "|---|" + "---|" * len(names),
        ]
        lines += [
            f"| {r['steps']} | "
            + " | ".join(f"{r[n]['temperature']:.3f}, {r[n]['rate']:.3f}, {r[n]['entropy_change']:+.2f}" for n in names)
            + " |"
            for r in result["temperature"]["law"]
        ]
        lines += ["", "The law itself is checked by samples in tests/masked/test_masked_draw.py."]
    if "speed" in result:
        lines += [
            "",
            "## Speed: times faster than the naive cached ancestral sampler in float64",
            "",
            "| L | V | N | count-first | first hitting | first hitting, one-row head | count-first / fp32 naive |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['L']} | {r['V']} | {r['N']} | {r['count-first / fp64']:.2f} | "
            f"{r['first hitting / fp64']:.2f} | {r['first hitting, one-row head / fp64']:.2f} | "
            f"{r['count-first / fp32']:.2f} |"
            for r in result["speed"]["composed"]
        ]
        lines += [
            "",
            "Where the time goes, ms a call:",
            "",
            "| L, V | " + " | ".join(result["speed"]["composed"][0]["parts_ms"]) + " |",
            "|---|" + "---|" * 8,
        ]
        lines += [
            f"| {r['L']}, {r['V']} | " + " | ".join(str(v) for v in r["parts_ms"].values()) + " |"
            for r in result["speed"]["composed"]
        ]
        end = result["speed"]["end_to_end"]
        lines += [
            "",
            f"End to end, {end['case']}: ancestral fp64 {end['ancestral fp64']['seconds']:.2f} s "
            f"({end['ancestral fp64']['calls']} calls), count-first {end['count-first']['seconds']:.2f} s "
            f"({end['count-first']['calls']} calls): {end['ratio']:.2f} times.",
            "",
            "| bar | needed | measured | met |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {b['bar']} | {b['needed']} | {b['measured']:.2f} | {'yes' if b['met'] else 'NO'} |"
            for b in result["bars"]
        ]
        lines += ["", "The naive sampler here works in place; a loop that allocates is slower."]
    return "\n".join(lines) + "\n"


def plots(result: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if "quality" in result:
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
        real = result["quality"][0]
        for axis, key, label in zip(
            axes,
            ("gen_perplexity", "entropy"),
            ("generative perplexity (trigram judge)", "token entropy, nats"),
            strict=True,
        ):
            for name in dict.fromkeys(r["sampler"] for r in result["quality"][1:]):
                cells = [r for r in result["quality"] if r["sampler"] == name]
                axis.plot([r["calls"] for r in cells], [r[key] for r in cells], "o-", label=name, ms=4)
            axis.axhline(real[key], color="0.4", ls="--", lw=1, label="real text")
            axis.set(xscale="log", xlabel="network calls", ylabel=label)
        axes[0].set_yscale("log")
        axes[1].legend(fontsize=6)
        figure.savefig(folder / "masked-quality.png", dpi=130)
    if "temperature" in result:
        law = result["temperature"]["law"]
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
        for name in [k for k in law[0] if k != "steps"]:
            for axis, key in zip(axes, ("temperature", "entropy_change"), strict=True):
                axis.plot([r["steps"] for r in law], [r[name][key] for r in law], "o-", label=name)
        axes[0].axhline(1, color="0.4", ls="--", lw=1, label="exact draws")
        axes[0].set(xscale="log", xlabel="sampling steps", ylabel="effective temperature of float32 draws")
        axes[1].set(xscale="log", xlabel="sampling steps", ylabel="change of predictive entropy, nats")
        axes[0].legend(fontsize=7)
        figure.savefig(folder / "masked-temperature.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    parser.add_argument("--part", choices=["quality", "temperature", "speed"], action="append")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/masked.* (merged by part)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    path = RESULTS / "masked.json"
    if args.write and path.exists():
        result = json.loads(path.read_text())
    result |= {"machine": f"{platform.machine()} CPU, shared", "torch": torch.__version__}
    for part in args.part or ("quality", "temperature", "speed"):
        result[part] = {"quality": quality, "temperature": temperature, "speed": speed}[part](args.quick)
    if "speed" in result:
        result["bars"] = bars(result["speed"])
    text = markdown(result)
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        for name, content in (("masked.json", json.dumps(result, indent=1) + "\n"), ("masked.md", text)):
            (RESULTS / (name + ".part")).write_text(content)
            os.replace(RESULTS / (name + ".part"), RESULTS / name)
        plots(result, RESULTS)
    print(json.dumps(result) if args.json else text)


if __name__ == "__main__":
    main()
