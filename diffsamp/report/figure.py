"""Curves of quality against network calls as a PNG, for READMEs and papers (matplotlib, loaded when used)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from diffsamp.files import write_whole
from diffsamp.report.results import LOWER_IS_BETTER, cell_name, label, metric_names, scaled

MOST = 10  # curves in one figure


def write_png(results: dict[str, Any], path: Path, metric: str | None = None) -> None:
    """One metric (the first by default) against network calls, with 95 % intervals; logarithmic where it fits.

    Of many solvers the best few are drawn, half of them stock schedulers where there are that many.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator

    name = metric or metric_names(results)[0]
    curves = _curves(results, name)
    chosen = _chosen(curves, name in LOWER_IS_BETTER)
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, solver in enumerate(chosen):
        points = curves[solver]
        calls, values = [p[0] for p in points], [p[1][0] for p in points]
        spread = [[v - p[1][1] for v, p in zip(values, points, strict=True)],
                  [p[1][2] - v for v, p in zip(values, points, strict=True)]]  # fmt: skip
        stock = solver.startswith("diffusers:")
        shown = solver.replace("diffusers:", "diffusers ").replace("Scheduler", "")
        # Intervals of many curves at one place hide each other: each curve has its own small shift.
        shift = 0.004 * (index - len(chosen) / 2) * (max(calls) - min(calls))
        axes.errorbar([c + shift for c in calls], values, yerr=spread, marker="s" if stock else "o", ms=4, lw=1.4,
                      ls="--" if stock else "-", capsize=2, elinewidth=0.8, label=shown)  # fmt: skip
    if name in LOWER_IS_BETTER and all(p[1][1] > 0 for solver in chosen for p in curves[solver]):
        axes.set_yscale("log")
        for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_format(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
    floor = results["reference"]["floor"]
    if name == "fd" and floor:
        axes.axhline(floor, color="grey", lw=1, ls=":", label="floor (real against real)")
    asked = sorted({cell["nfe"] for cell in results["cells"]})
    axes.xaxis.set_major_locator(FixedLocator(asked) if len(asked) <= MOST else MaxNLocator(integer=True))
    told = f"best {len(chosen)} of {len(curves)} solvers" if len(chosen) < len(curves) else None
    axes.set(xlabel="network calls", ylabel=label(name, results))
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=7.5, frameon=False, title=told, title_fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getvalue(), overwrite=True)


def _curves(results: dict[str, Any], name: str) -> dict[str, list[tuple[int, list[float]]]]:
    """(calls, value and interval) of each solver whose pictures are all finite, by name, in order of calls."""
    found: dict[str, list[tuple[int, list[float]]]] = {}
    for cell in results["cells"]:
        if name in cell["metrics"] and not cell["not_finite"]:
            found.setdefault(cell_name(cell), []).append((cell["calls"], scaled(name, cell["metrics"][name])))
    return {solver: sorted(points) for solver, points in found.items()}


def _chosen(curves: dict[str, list[tuple[int, list[float]]]], lower: bool) -> list[str]:
    """The solvers to draw: all of a few; of many the best by their mean place among those that have every budget."""
    if len(curves) <= MOST:
        return list(curves)
    most = max(map(len, curves.values()))
    whole = [solver for solver, points in curves.items() if len(points) == most]
    places = dict.fromkeys(whole, 0)
    for budget in range(most):
        whole.sort(key=lambda solver: curves[solver][budget][1][0], reverse=not lower)
        for place, solver in enumerate(whole):
            places[solver] += place
    whole.sort(key=places.__getitem__)
    stock = [solver for solver in whole if solver.startswith("diffusers:")][: MOST // 2]
    own = [solver for solver in whole if not solver.startswith("diffusers:")][: MOST - len(stock)]
    return own + stock
