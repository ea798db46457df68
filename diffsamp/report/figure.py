"""Curves of quality against network calls as a PNG, for READMEs and papers (matplotlib, loaded when used)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from diffsamp.files import write_whole
from diffsamp.report.results import cell_name, label, metric_names, scaled


def write_png(results: dict[str, Any], path: Path, metric: str | None = None) -> None:
    """One metric (the first by default) against network calls, with 95 % intervals; logarithmic where it fits."""
    from matplotlib.figure import Figure

    name = metric or metric_names(results)[0]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    by_solver: dict[str, list[tuple[int, list[float]]]] = {}
    for cell in results["cells"]:
        if name in cell["metrics"]:
            by_solver.setdefault(cell_name(cell), []).append((cell["calls"], scaled(name, cell["metrics"][name])))
    for solver, points in by_solver.items():
        points.sort()
        calls = [p[0] for p in points]
        values = [p[1][0] for p in points]
        spread = [[v - p[1][1] for v, p in zip(values, points, strict=True)],
                  [p[1][2] - v for v, p in zip(values, points, strict=True)]]  # fmt: skip
        style = "--" if solver.startswith("diffusers:") else "-"
        axes.errorbar(calls, values, yerr=spread, marker="o", ms=4, lw=1.6, ls=style, capsize=2, label=solver)
    if name == "fd" and all(p[1][1] > 0 for points in by_solver.values() for p in points):
        axes.set_yscale("log")
    floor = results["reference"]["floor"]
    if name == "fd" and floor:
        axes.axhline(floor, color="grey", lw=1, ls=":", label="floor (real against real)")
    axes.set(xlabel="network calls", ylabel=label(name, results))
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getvalue(), overwrite=True)
