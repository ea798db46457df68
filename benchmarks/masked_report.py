"""Bars, tables and plots of `benchmarks/masked.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PEERS = ("naive", "published", "tuned")
# (ours, peer's precision, L, V, N, needed): the design's bars on runs composed of parts.
COMPOSED = [
    ("count-first", "fp64", 128, 4096, 512, 3.0),
    ("count-first", "fp32", 128, 4096, 512, 2.0),
    ("count-first", "fp64", 128, 32768, 2048, 20.0),
    ("count-first", "fp64", 1024, 256, 1024, 0.95),
    ("first hitting", "fp64", 512, 4096, 2048, 3.5),
    ("count-first", "fp64", 1024, 32768, 10_000, 15.0),
    ("first hitting", "fp64", 1024, 32768, 10_000, 15.0),
]
WHOLE = [
    ("count-first", "fp64", 128, 4096, 512, 3.0),
    ("count-first", "fp32", 128, 4096, 512, 2.0),
    ("first hitting", "fp64", 512, 4096, 2048, 3.5),
]


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars of the design that the result can judge: needed, and measured against the naive cached loop.

    "published" and "tuned" are the ratios to the other peers, which keep the probabilities too; "network" is the share
    of our own time that the network takes.
    """
    out: list[dict[str, Any]] = []
    whole = result.get("end_to_end", [])

    def add(name: str, needed: float, measured: float, **beside: float | None) -> None:
        out.append({"bar": name, "needed": needed, "measured": measured, "met": bool(measured >= needed), **beside})

    def ratio(row: dict[str, Any], ours: str, peer: str) -> float | None:
        seconds = row["seconds"]
        return seconds[peer] / seconds[ours] if peer in seconds else None

    for kind, wanted, rows in (
        ("composed", COMPOSED, result.get("speed", {}).get("composed", [])),
        ("end to end", WHOLE, [r for r in whole if not r["memory_kept"]]),
        ("end to end, memory kept", WHOLE, [r for r in whole if r["memory_kept"]]),
    ):
        found = {(row["L"], row["V"], row["N"]): row for row in rows}
        for ours, precision, a, b, n, need in wanted:
            if (a, b, n) not in found:
                continue
            for head in ("", ", one-row head"):
                naive, *others = (ratio(found[a, b, n], ours + head, f"{peer} {precision}") for peer in PEERS)
                if naive is not None:
                    name = f"{ours}{head} / {precision}, L={a} V={b} N={n}, {kind}"
                    share = found[a, b, n]["network"][ours + head]
                    add(name, need, naive, **dict(zip(PEERS[1:], others, strict=True)), network=share)
    if "speed" not in result:
        return out
    cells = result["speed"]["composed"]
    slowest = [min(r["seconds"][f"{peer} fp64"] / r["seconds"]["count-first"] for r in cells)
               for peer in PEERS]  # fmt: skip
    beside = dict(zip(PEERS[1:], slowest[1:], strict=True))
    add("count-first / fp64, worst of all cells, composed", 0.95, slowest[0], **beside)
    for row in result["speed"]["parts"]:
        a, b, ms = row["L"], row["V"], row["ms"]
        full, one = (ms["body"] + ms[head] + ms["sampler"] for head in ("head", "head, one row"))
        if (a, b) == (128, 32768):
            add(f"one-row head / full head, first hitting, L={a} V={b}", 2.0, full / one)
            add(f"inverse-CDF row / fp64 Gumbel row, V={b}", 2.0, ms["fp64 Gumbel row"] / ms["inverse-CDF row"])
        if (a, b) == (512, 4096):
            add("denoiser time / sampler overhead, L=512 V=4096 (5 % allowed)", 20.0,
                (ms["body"] + ms["head"]) / ms["sampler"])  # fmt: skip
    return out


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(r) + " |" for r in rows), ""]


def samples(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the sampled parts that were run."""
    return [row for part in ("sampled_text", "sampled_table") for row in result.get(part, [])]


def _quality(rows: list[dict[str, Any]]) -> list[str]:
    count = rows[0]["samples"]
    head = ["sampler", "calls", "gen. perplexity", "token entropy", "distinct-2"]
    body = [
        [r["sampler"], str(r["calls"]), f"{r['gen_perplexity']:.1f} ± {r['gen_perplexity_se']:.1f}",
         f"{r['entropy']:.3f} ± {r['entropy_se']:.3f}", f"{r['distinct_2']:.3f} ± {r['distinct_2_se']:.3f}"]
        for r in rows
    ]  # fmt: skip
    return [
        "## Quality against calls",
        "",
        f"{count} sequences a row; ± is one standard error.",
        "",
        *table(head, body),
    ]


def _law(law: list[dict[str, Any]]) -> list[str]:
    names = [k for k in law[0] if k != "steps"]
    body = [
        [str(r["steps"])]
        + [f"{r[n]['temperature']:.3f}, {r[n]['rate']:.3f}, {r[n]['entropy_change']:+.2f}" for n in names]
        for r in law
    ]
    title = "## What float32 races cost: law of the 2^-24 lattice, first step"
    return [title, "", *table(["steps", *(f"{n}: T, unmask rate, entropy change" for n in names)], body)]


def _sampled(rows: list[dict[str, Any]]) -> list[str]:
    head = ["model", "draws", "steps", "samples x tokens", "fitted T", "surprisal, nats (expected)", "gen. perplexity",
            "token entropy"]  # fmt: skip
    body = []
    for r in rows:
        expected = f" ({r['expected_surprisal']:.2f})" if "expected_surprisal" in r else ""
        text = ["", ""]
        if "gen_perplexity" in r:
            text = [f"{r['gen_perplexity']:.1f} ± {r['gen_perplexity_se']:.1f}",
                    f"{r['entropy']:.3f} ± {r['entropy_se']:.3f}"]  # fmt: skip
        body.append(
            [r["model"], r["draws"], str(r["steps"]), f"{r['samples']} x {r['tokens'] // r['samples']}",
             f"{r['temperature']:.3f} ± {r['temperature_se']:.3f}",
             f"{r['surprisal']:.2f} ± {r['surprisal_se']:.2f}{expected}", *text]
        )  # fmt: skip
    return [
        "## What float32 races cost: samples",
        "",
        "Whole ancestral runs. Fitted T is the maximum-likelihood temperature of the tokens under the predictions that",
        "they were drawn from (1 is right); surprisal is their mean -log p. Races are those of the published loop.",
        "",
        *table(head, body),
    ]


def _speed(result: dict[str, Any]) -> list[str]:
    lines = [
        "## Speed",
        "",
        "Times faster than the cached ancestral sampler in float64: naive (probabilities formed in every step) /",
        "published (kept) / tuned by us (in place). Runs are composed of the parts below. Below 1 is slower.",
        "",
    ]
    ours = ["count-first", "first hitting", "count-first, one-row head", "first hitting, one-row head"]
    body = []
    for r in result["speed"]["composed"]:
        s = r["seconds"]
        pair = [" / ".join(f"{s[f'{peer} fp64'] / s[k]:.2f}" for peer in PEERS) for k in ours]
        last = " / ".join(f"{s[f'{peer} fp32'] / s['count-first']:.2f}" for peer in PEERS)
        body.append([str(r["L"]), str(r["V"]), str(r["N"]), f"{r['calls']:.0f}", *pair, last])
    lines += table(["L", "V", "N", "ancestral calls", *ours, "count-first against fp32"], body)
    lines += [
        "Where the time goes, ms of CPU a call (least of several; published parts in their loop, lower quartile):",
        "",
    ]
    names = list(result["speed"]["parts"][0]["ms"])
    lines += table(["L, V", *names], [[f"{r['L']}, {r['V']}", *(f"{r['ms'][n]:.3g}" for n in names)]
                                      for r in result["speed"]["parts"]])  # fmt: skip
    return lines


def _whole(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for r in rows for name in r["seconds"]))
    body = []
    for r in rows:
        cells = [f"{r['seconds'][n]:.2f} ({r['calls'][n]})" if n in r["seconds"] else "" for n in names]
        low, high = r["range"]["published fp64"]
        kept = ", memory kept" if r["memory_kept"] else ""
        body.append([f"{r['L']}, {r['V']}, {r['N']}{kept}", f"{r['processes']}: {low:.2f} to {high:.2f}", *cells])
    head = ["L, V, N", "processes: range of published fp64", *names]
    return [
        "End to end, CPU seconds (network calls), median over processes. With its default settings glibc may hand the",
        "arrays of the published loop back to the system at every step; `memory kept` forbids it, its best case.",
        "",
        *table(head, body),
    ]


def markdown(result: dict[str, Any]) -> str:
    """The report; parts that were not run are left out."""
    lines = ["# Masked text", "", f"{result['machine']}; torch {result['torch']}; one thread, CPU seconds.", ""]
    if "quality" in result:
        lines += _quality(result["quality"])
    if "temperature" in result:
        lines += _law(result["temperature"]["law"])
    if samples(result):
        lines += _sampled(samples(result))
    if "speed" in result:
        lines += _speed(result)
    if "end_to_end" in result:
        lines += _whole(result["end_to_end"])
    if result.get("bars"):
        lines += ["Bars, against the naive cached loop; beside it the published loop, which keeps probabilities too,",
                  "our tuned one, and the network's share of our time:", ""]  # fmt: skip
        lines += table(
            ["bar", "needed", "measured", "met", "against published", "against tuned", "network"],
            [[b["bar"], f"{b['needed']:g}", f"{b['measured']:.2f}", "yes" if b["met"] else "NO",
              *(f"{b[k]:.2f}" if b.get(k) is not None else "" for k in PEERS[1:]),
              f"{b['network']:.1%}" if b.get("network") is not None else ""] for b in result["bars"]],
        )  # fmt: skip
    return "\n".join(lines).rstrip("\n") + "\n"


def plots(result: dict[str, Any], folder: Path) -> None:
    """masked-quality.png and masked-temperature.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if "quality" in result:
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
        real = result["quality"][0]
        names = list(dict.fromkeys(r["sampler"] for r in result["quality"][1:]))
        colours = plt.get_cmap("tab20")(range(20))
        for axis, key, label in zip(
            axes,
            ("gen_perplexity", "entropy"),
            ("generative perplexity (trigram judge)", "token entropy, nats"),
            strict=True,
        ):
            for i, name in enumerate(names):
                cells = [r for r in result["quality"] if r["sampler"] == name]
                axis.errorbar([r["calls"] for r in cells], [r[key] for r in cells], [r[f"{key}_se"] for r in cells],
                              fmt="o-", label=name, ms=4, lw=1, color=colours[i % 20])  # fmt: skip
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
                axis.plot([r["steps"] for r in law], [r[name][key] for r in law], "o-", label=f"{name}, law at t = 1")
        for model, colour in (("embedded model", "C0"), ("Zipf table", "C1")):
            rows = [r for r in samples(result) if r["model"] == model]
            for draws, mark in (("float32 race", "s"), ("exact (count-first)", "^")):
                cells = [r for r in rows if r["draws"] == draws]
                if cells:
                    axes[0].errorbar([r["steps"] for r in cells], [r["temperature"] for r in cells],
                                     [r["temperature_se"] for r in cells], fmt=mark, color=colour, mfc="none", ms=7,
                                     label=f"{model}, sampled, {draws}")  # fmt: skip
        axes[0].axhline(1, color="0.4", ls="--", lw=1)
        axes[0].set(xscale="log", xlabel="sampling steps", ylabel="effective temperature")
        axes[1].set(xscale="log", xlabel="sampling steps", ylabel="change of predictive entropy, nats")
        axes[0].legend(fontsize=5.5)
        figure.savefig(folder / "masked-temperature.png", dpi=130)
