"""Masked text: quality against network calls, the temperature that float32 draws cost, and speed.

    python benchmarks/masked.py --quick              # a minute or two
    python benchmarks/masked.py --part speed --json
    python benchmarks/masked.py --write              # benchmarks/results/masked.{md,json} and two plots

quality      generative perplexity by an independent judge (a Kneser-Ney trigram on chapters that the model never saw)
             together with token entropy and distinct bigrams, since a low temperature lowers perplexity alone.
temperature  the law of a float32 race (lattice of 2^-24) applied to the model's own predictions.
sampled_...  the same cost seen in samples, of the text model and of a table with a Zipf law: published float32 races
             against exact draws of the same ancestral law.
speed        CPU seconds of one thread, composed of measured parts, calls x (body + head + sampler) + steps x draw,
             with a random network of 4 layers and width 256.
end_to_end   a few of the same cases run whole.

Three peers are measured beside our samplers: "published", the loop of `published_ancestral.py`; "naive", the same loop
keeping the network's output only, so that each step forms its probabilities again; and "tuned", our own
`masked.ancestral`, which races in place. Bars are judged against the first; the others are printed next to it.
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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels" / "torch-ext")]
import published_ancestral as published  # noqa: E402
from kneser_ney import KneserNey  # noqa: E402
from masked_report import bars, markdown, plots  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from diffsamp import masked  # noqa: E402
from diffsamp.files import write_whole  # noqa: E402
from diffsamp.masked.ancestral import ancestral, race  # noqa: E402
from diffsamp.masked.text_model import MaskedTransformer, TextModelConfig  # noqa: E402

RESULTS = HERE / "results"


# ---------------------------------------------------------------------------------------------------------- quality


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def text_facts(rows: list[list[int]], judge: KneserNey) -> dict[str, float]:
    """Judge's perplexity, token entropy in nats and share of distinct bigrams, per sequence, with standard errors."""
    nats, error = mean_and_error([judge.nats(row) for row in rows])
    entropies, distinct = [], []
    for row in rows:
        share = np.array(list(Counter(row).values())) / len(row)
        entropies.append(float(-(share * np.log(share)).sum()))
        distinct.append(len(set(zip(row, row[1:], strict=False))) / (len(row) - 1))
    facts = {"samples": len(rows), "gen_perplexity": math.exp(nats), "gen_perplexity_se": math.exp(nats) * error}
    for name, values in (("entropy", entropies), ("distinct_2", distinct)):
        facts[name], facts[f"{name}_se"] = mean_and_error(values)
    return facts


def heldout() -> tuple[masked.TextModel, KneserNey, torch.Tensor]:
    model = masked.load_text_model()
    data = load_file(str(HERE / "data" / "kjv_heldout.safetensors"))
    return model, KneserNey(data["judge"].tolist(), 3, model.vocab_size - 1), data["test"].long()


def quality(quick: bool) -> list[dict[str, Any]]:
    model, judge, test = heldout()
    rows, length = (4, 64) if quick else (16, 128)
    x = torch.full((rows, length), model.mask_id)
    start = torch.linspace(0, len(test) - length, rows).long()
    real = test[start[:, None] + torch.arange(length)].tolist()
    table = [{"sampler": "real text (test chapters)", "calls": 0, **text_facts(real, judge)}]
    hit = masked.FirstHitting
    few, many = ((8, 16), 16) if quick else ((8, 32), 128)
    middle = few[-1]
    cells: list[tuple[str, Any, str, dict[str, Any]]] = [
        (name, sampler(steps), "random", {})
        for steps in dict.fromkeys((*few, many))
        for name, sampler in (
            ("first hitting", lambda n: hit(steps=n)),
            ("first hitting, 2nd order", lambda n: hit(steps=n, extrapolate=n < 128)),
            ("count-first ancestral", masked.CountFirst),
            ("ReMDM, rescale 0.1", lambda n: masked.ReMDM(n, "rescale", 0.1)),
            ("P2, eta 1", lambda n: masked.P2(n)),
        )
        if not (name.endswith("2nd order") and steps == 128)  # one token a call: nothing to extrapolate
    ]
    cells += [
        (f"{name} order", hit(steps=middle), name, {}) for name in ("confidence", "entropy", "margin", "low-confidence")
    ]
    cells += [
        ("ReMDM, cap 0.05", masked.ReMDM(middle, "cap", 0.05), "random", {}),
        ("ReMDM, conf 0.5", masked.ReMDM(middle, "conf", 0.5), "random", {}),
        ("P2, eta 0", masked.P2(middle, 0.0), "random", {}),
        ("first hitting, T = 0.8", hit(steps=middle), "random", {"temperature": 0.8}),
        ("first hitting, top-p 0.9", hit(steps=middle), "random", {"top_p": 0.9}),
    ]
    for name, sampler, order, options in cells:
        tokens, facts = masked.sample(
            model, x, mask_id=model.mask_id, sampler=sampler, order=order, seeds=range(rows), record_entropy=False,
            **options,
        )  # fmt: skip
        table.append({"sampler": name, "calls": facts["calls"], **text_facts(tokens.tolist(), judge)})
        progress(f"{name}, {facts['calls']} calls")
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


def zipf(classes: int = 50_257) -> np.ndarray:
    weight = 1 / np.arange(1, classes + 1)
    return weight / weight.sum()


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
    law = []
    for steps in (256, 1024, 2048, 10_000, 50_000, 250_000):
        entry: dict[str, Any] = {"steps": steps}
        for name, source in (("embedded model, V=1,024", p), ("Zipf, V=50,257", zipf()[None])):
            q, rate = lattice_law(source, steps)
            entropy = [float(-(a * np.log(np.maximum(a, 1e-300))).sum(-1).mean()) for a in (source, q)]
            entry[name] = {
                "temperature": effective_temperature(source, q),
                "rate": float(rate.mean()),
                "entropy_change": entropy[1] - entropy[0],
            }
        law.append(entry)
    return {"law": law, "predictions": len(p)}


# ---------------------------------------------------------------------------------------------------------- sampled


class Recorded:
    """A denoiser for one sequence that keeps the predictions its tokens are drawn from."""

    def __init__(self, predict: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.predict, self.kept = predict, []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits = self.predict(x)[:, positions[0]]
        self.kept.append((positions[0].clone(), logits[0].clone()))
        return logits

    def draws(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions (n, V) and the tokens (n,) of the finished x (1, L) that were drawn from them."""
        return torch.cat([row for _, row in self.kept]), x[0, torch.cat([at for at, _ in self.kept])]


@torch.no_grad()
def raced(
    predict: Callable[[torch.Tensor], torch.Tensor], length: int, mask_id: int, steps: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens (1, L), predictions (L, V), drawn tokens (L,)) of the published ancestral loop.

    Raced at masked positions only: the published loop races everywhere and throws the rest away, with the same law.
    """
    x, kept, p = torch.full((1, length), mask_id), [], None
    for i in range(steps):
        at = (x[0] == mask_id).nonzero()[:, 0]
        if not len(at):
            break
        if p is None:
            logits = predict(x)[0, at]
            p = published.probabilities(logits[None].clone(), x[:, at], mask_id, dtype)
        drawn = published.draw(p, 1 - i / steps, 1 - (i + 1) / steps, mask_id)[0]
        new = drawn != mask_id
        if bool(new.any()):
            kept.append((logits[new], drawn[new]))
            x[0, at[new]] = drawn[new]
            p = None
    return x, torch.cat([a for a, _ in kept]), torch.cat([b for _, b in kept])


def fitted_temperature(logits: torch.Tensor, tokens: torch.Tensor, mask_id: int) -> tuple[float, float]:
    """Maximum-likelihood T of tokens (n,) drawn from softmax(logits / T), and its standard error.

    In u = 1/T the log-likelihood is concave with curvature the variance of the logit, so Newton's method finds it.
    """
    logits = logits.double()
    if mask_id < logits.shape[-1]:
        logits = logits[:, [i for i in range(logits.shape[-1]) if i != mask_id]]  # the mask is the last class here
    chosen, u, curvature = logits.gather(-1, tokens[:, None])[:, 0].mean(), 1.0, 1.0
    for _ in range(30):
        p = (u * logits).softmax(-1)
        mean = (p * logits).sum(-1)
        curvature = float(((p * logits**2).sum(-1) - mean**2).mean())
        u = max(u + float(chosen - mean.mean()) / curvature, 0.05)
    return 1 / u, 1 / (u * u * math.sqrt(curvature * len(tokens)))


def expected_surprisal(p: np.ndarray, steps: int) -> float:
    """Mean of -log p over all revelations of float32 ancestral sampling from one law p, by the law of the lattice."""
    surprisal, masks, total = -np.log(p), 1.0, 0.0
    for i in range(steps):
        t = 1 - i / steps
        q, rate = lattice_law(p, steps, t)
        # The mask survives with probability s/t; the classes together win with rate x (t - s)/t.
        fall = masks * (1.0 if i == steps - 1 else min(float(rate) / (steps * t), 1.0))
        total, masks = total + fall * float((q * surprisal).sum()), masks - fall
    return total


Run = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def summary(model: str, draws: str, steps: int, runs: list[Run], mask_id: int) -> dict[str, Any]:
    """Fitted temperature and surprisal of the tokens of several runs (tokens, predictions, drawn)."""
    logits, tokens = (torch.cat([r[k] for r in runs]) for k in (1, 2))
    surprisal, error = mean_and_error((-logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]).tolist())
    t, t_error = fitted_temperature(logits, tokens, mask_id)
    progress(f"{model}, {draws}, {steps} steps: T = {t:.3f} +- {t_error:.3f}")
    return {"model": model, "draws": draws, "steps": steps, "samples": len(runs), "tokens": len(tokens),
            "surprisal": surprisal, "surprisal_se": error, "temperature": t, "temperature_se": t_error}  # fmt: skip


def exact(predict: Callable[[torch.Tensor], torch.Tensor], length: int, mask_id: int, steps: int, seed: int) -> Run:
    """The same law as `raced` by `CountFirst` and safe draws."""
    net = Recorded(predict)
    x, _ = masked.sample(net, torch.full((1, length), mask_id), mask_id=mask_id, sampler=masked.CountFirst(steps),
                         seeds=[seed], record_entropy=False)  # fmt: skip
    return (x, *net.draws(x))


def sampled_text(quick: bool) -> list[dict[str, Any]]:
    """Text of the embedded model drawn with float32 races and exactly, at the same numbers of ancestral steps."""
    model, judge, _ = heldout()
    length, out = 32 if quick else 128, []
    for steps, low, right in [(500, 2, 2)] if quick else [(10_000, 6, 12), (50_000, 2, 4)]:
        torch.manual_seed(0)
        raced_runs = [raced(lambda x: model(x), length, model.mask_id, steps, torch.float32) for _ in range(low)]
        exact_runs = [exact(lambda x: model(x), length, model.mask_id, steps, i) for i in range(right)]
        for draws, runs in (("float32 race", raced_runs), ("exact (count-first)", exact_runs)):
            facts = text_facts([r[0][0].tolist() for r in runs], judge)
            out.append(summary("embedded model", draws, steps, runs, model.mask_id) | facts)
    return out


def sampled_table(quick: bool) -> list[dict[str, Any]]:
    """Tokens of a table that predicts a Zipf law everywhere."""
    p = zipf(1000 if quick else 50_257)
    steps, mask_id = (128 if quick else 2048), len(p)
    logits = torch.cat([torch.from_numpy(np.log(p)).float(), torch.full((1,), -1e6)])

    def predict(x: torch.Tensor) -> torch.Tensor:
        return logits.repeat(1, x.shape[1], 1)

    torch.manual_seed(0)
    low = raced(predict, 8 if quick else 96, mask_id, steps, torch.float32)
    high = raced(predict, 8 if quick else 16, mask_id, steps, torch.float64)
    right = exact(predict, 64 if quick else 128, mask_id, steps, 0)
    entropy = float(-(p * np.log(p)).sum())
    return [
        summary("Zipf table", draws, steps, [run], mask_id) | {"expected_surprisal": expected}
        for draws, run, expected in (
            ("float32 race", low, expected_surprisal(p, steps)),
            ("float64 race", high, entropy),
            ("exact (count-first)", right, entropy),
        )
    ]


# ------------------------------------------------------------------------------------------------------------ speed


def network(length: int, vocabulary: int) -> MaskedTransformer:
    torch.manual_seed(0)
    return MaskedTransformer(
        TextModelConfig(vocab_size=vocabulary + 1, mask_id=vocabulary, max_length=length, width=256, layers=4, heads=4)
    ).eval()


def least(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Smallest CPU seconds of this thread for each function, the functions taking turns."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.thread_time()
            function()
            best[name] = min(best.get(name, math.inf), time.thread_time() - start)
    return best


def fresh(function: Callable[..., Any], *arguments: Any, kept: bool = False) -> Any:
    """The function's result from a process of its own.

    What the allocator has seen before decides whether an array of some megabytes is new memory or not, and with it half
    of the time of a loop that allocates: the published draw at L=128, V=4,096 takes 5 or 9.5 ms, from run to run.
    `kept` tells glibc to give no memory back, which is the faster of the two.
    """
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    if kept:
        os.environ.update(dict.fromkeys(names, str(2**31 - 1)))
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        if kept:
            for name in names:
                del os.environ[name]


@torch.no_grad()
def parts(length: int, vocabulary: int, rounds: int) -> dict[str, float]:
    """CPU seconds of the parts of one call, batch 1."""
    net = network(length, vocabulary)
    x = torch.full((1, length), vocabulary)
    hidden = net.hidden(x)
    logits = net.head(hidden)
    usable = logits[0, :, :vocabulary].contiguous()
    row, u = usable[:1], torch.rand(1, 2, dtype=torch.float64)
    begun = masked.init(masked.FirstHitting(), x, mask_id=vocabulary, seeds=[0], record_entropy=False)

    def sampler(events: int = 4) -> float:
        """Seconds of a step outside the network, which runs in between: what it leaves in the caches is its own."""
        state, inside = begun, 0.0

        def denoiser(ids: torch.Tensor, t: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            nonlocal inside
            start = time.thread_time()
            net.hidden(ids)
            inside += time.thread_time() - start
            return logits[:, positions[0]]

        start = time.thread_time()
        for _ in range(events):
            state = masked.step(state, denoiser)
        return (time.thread_time() - start - inside) / events

    functions: dict[str, Callable[[], Any]] = {"body": lambda: net.hidden(x), "head": lambda: net.head(hidden)}
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        p, noise = usable.softmax(-1, dtype=dtype), torch.empty(length, vocabulary + 1, dtype=dtype)
        functions[f"tuned probabilities {name}"] = partial(usable.softmax, -1, dtype=dtype)
        functions[f"tuned draw {name}"] = lambda p=p, noise=noise: race(p, 0.2, noise.uniform_())
    large = least(functions, rounds)
    small = least(
        {
            "head, one row": lambda: net.head(hidden[:, :1]),
            "inverse-CDF row": lambda: masked.categorical.draw(row, lambda shape: u),
            "fp64 Gumbel row": lambda: masked.sample_categorical(row, precision="fp64"),
        },
        10 * rounds,
    )
    return large | small | {"sampler": min(sampler() for _ in range(2 * rounds))}


@torch.no_grad()
def published_parts(length: int, vocabulary: int, steps: int) -> dict[str, float]:
    """CPU seconds of the parts of the published loop (lower quartile), timed in its first steps, network in between."""
    net, x = network(length, vocabulary), torch.full((1, length), vocabulary)
    out = {}
    for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32)):
        spent: dict[str, list[float]] = {}
        published.sample(net, x, vocabulary, 2 * length, dtype, stop=steps, spent=spent)
        out |= {f"published {part} {name}": float(np.quantile(seconds, 0.25)) for part, seconds in spent.items()}
    return out


def all_parts(length: int, vocabulary: int, rounds: int) -> dict[str, float]:
    return published_parts(length, vocabulary, 3 * rounds) | parts(length, vocabulary, rounds)


def composed(length: int, vocabulary: int, steps: int, c: dict[str, float]) -> dict[str, Any]:
    """Seconds of whole runs from the parts `c`; calls are the expected ones."""
    calls = float(masked.expected_calls(steps, length))
    forward, one_row = c["body"] + c["head"] + c["sampler"], c["body"] + c["head, one row"] + c["sampler"]
    peers = {}
    for p in ("fp64", "fp32"):
        seen = c["body"] + c["head"]
        peers[f"published {p}"] = calls * (seen + c[f"published probabilities {p}"]) + steps * c[f"published draw {p}"]
        peers[f"naive {p}"] = calls * seen + steps * (c[f"published probabilities {p}"] + c[f"published draw {p}"])
        peers[f"tuned {p}"] = calls * (seen + c[f"tuned probabilities {p}"]) + steps * c[f"tuned draw {p}"]
    ours = {
        "count-first": calls * forward,
        "first hitting": length * forward,
        "count-first, one-row head": calls * one_row,
        "first hitting, one-row head": length * one_row,
    }
    network = {name: (c["body"] + c["head, one row" if "one-row" in name else "head"]) for name in ours}
    shares = {name: network[name] / (network[name] + c["sampler"]) for name in ours}
    return {"L": length, "V": vocabulary, "N": steps, "calls": calls, "seconds": {**peers, **ours}, "network": shares}


def speed(quick: bool) -> dict[str, Any]:
    sizes = [(128, 256), (128, 4096)] if quick else [(n, v) for n in (128, 256, 512, 1024) for v in (256, 4096, 32768)]
    measured, table = [], []
    for length, vocabulary in sizes:
        # More rounds where they are short: a shared machine needs many tries for one that was left alone.
        rounds = 3 if quick else min(max(int(2e7 / (length * vocabulary)), 2), 5)
        c = fresh(all_parts, length, vocabulary, rounds)
        # Arrays of 32 MB and more are new memory every time, small ones never; in between it is a matter of luck.
        if 2**21 < length * vocabulary * 8 < 2**25 and not quick:
            tries = [c, *(fresh(published_parts, length, vocabulary, 3 * rounds) for _ in range(2))]
            c |= {name: float(np.median([t[name] for t in tries])) for name in tries[1]}
        measured.append({"L": length, "V": vocabulary, "ms": {k: round(1e3 * v, 3) for k, v in c.items()}})
        grid = {length, 2048, 10_000} | ({512} if (length, vocabulary) == (128, 4096) else set())
        table += [composed(length, vocabulary, steps, c) for steps in sorted(grid)]
        progress(f"L={length}, V={vocabulary}")
    return {"parts": measured, "composed": table}


@torch.no_grad()
def whole(length: int, vocabulary: int, steps: int, peers: tuple[str, ...]) -> dict[str, Any]:
    """CPU seconds and network calls of whole runs, batch 1, and the network's share of the time of ours."""
    net, x = network(length, vocabulary), torch.full((1, length), vocabulary)
    calls: dict[str, int] = {}
    inside: dict[str, float] = {}

    def loop(name: str) -> None:
        kind, precision = name.split()
        if kind == "tuned":
            calls[name] = ancestral(lambda ids, t: net(ids), x, mask_id=vocabulary, steps=steps, precision=precision)[1]
            return
        keep, dtype = "logits" if kind == "naive" else "probabilities", getattr(torch, precision.replace("fp", "float"))
        calls[name] = published.sample(net, x, vocabulary, steps, dtype, keep=keep)[1]

    def ours(name: str, sampler: Any) -> None:
        def timed(ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
            start = time.thread_time()
            logits = net(ids, positions=positions)
            inside[name] += time.thread_time() - start
            return logits

        def full(ids: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return timed(ids)

        def at_rows(ids: torch.Tensor, t: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return timed(ids, positions)

        inside[name], denoiser = 0.0, at_rows if "one-row" in name else full
        _, facts = masked.sample(denoiser, x, mask_id=vocabulary, sampler=sampler, seeds=[0], record_entropy=False)
        calls[name] = facts["calls"]

    runs = {name: partial(loop, name) for name in peers}
    for name, sampler in (("count-first", masked.CountFirst(steps)), ("first hitting", masked.FirstHitting())):
        for head in ("", ", one-row head"):
            runs[name + head] = partial(ours, name + head, sampler)
    torch.manual_seed(0)
    seconds = least(runs, 1)
    shares = {name: spent / seconds[name] for name, spent in inside.items()}
    return {"L": length, "V": vocabulary, "N": steps, "seconds": seconds, "calls": calls, "network": shares}


def end_to_end(quick: bool) -> list[dict[str, Any]]:
    every = ("published fp64", "published fp32", "naive fp64", "naive fp32", "tuned fp64")
    # L, V, N, peers, processes, memory kept
    cases: list[tuple[int, int, int, tuple[str, ...], int, bool]] = [(64, 1024, 128, every, 1, False)] if quick else [
        (128, 256, 128, every, 1, False), (128, 4096, 512, every, 3, False), (128, 4096, 512, every, 1, True),
        (512, 4096, 2048, ("published fp64", "naive fp64"), 1, False)]  # fmt: skip
    table = []
    for length, vocabulary, steps, peers, processes, kept in cases:
        tries = [fresh(whole, length, vocabulary, steps, peers, kept=kept) for _ in range(processes)]
        seconds = {name: float(np.median([t["seconds"][name] for t in tries])) for name in tries[0]["seconds"]}
        ranges = {name: [min(v), max(v)] for name in seconds if (v := [t["seconds"][name] for t in tries])}
        table.append(tries[0] | {"seconds": seconds, "range": ranges, "processes": processes, "memory_kept": kept})
        progress(f"end to end, L={length}, V={vocabulary}, N={steps}{', memory kept' if kept else ''}")
    return table


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


PARTS: dict[str, Callable[[bool], Any]] = {
    "quality": quality, "temperature": temperature, "sampled_text": sampled_text, "sampled_table": sampled_table,
    "speed": speed, "end_to_end": end_to_end,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    parser.add_argument("--part", choices=list(PARTS), action="append")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/masked.* (merged by part)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    path = RESULTS / "masked.json"
    if args.write and path.exists():
        result = json.loads(path.read_text())
    result |= {"machine": f"{platform.machine()} CPU, shared", "torch": torch.__version__}
    for part in args.part or PARTS:
        result[part] = PARTS[part](args.quick)
    result["bars"] = bars(result)
    text = markdown(result)
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        for name, content in (("masked.json", json.dumps(result, indent=1) + "\n"), ("masked.md", text)):
            write_whole(RESULTS / name, content.encode(), overwrite=True)
        plots(result, RESULTS)
    print(json.dumps(result) if args.json else text)


if __name__ == "__main__":
    main()
