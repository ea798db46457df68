"""The table of a benchmark: in the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

from diffsamp.report.results import LOWER_IS_BETTER, cell_name, label, metric_names, scaled, show

WIDE = 400  # columns; more than any table has


def best(results: dict[str, Any], metric: str) -> dict[int, float]:
    """The best value of a metric at each number of calls asked for, of cells whose pictures are all finite."""
    found: dict[int, float] = {}
    for cell in results["cells"]:
        if metric in cell["metrics"] and not cell["not_finite"]:
            value, pick = cell["metrics"][metric][0], min if metric in LOWER_IS_BETTER else max
            found[cell["nfe"]] = pick(found.get(cell["nfe"], value), value)
    return found


def _is_best(cell: dict[str, Any], metric: str, bests: dict[str, dict[int, float]]) -> bool:
    return not cell["not_finite"] and cell["metrics"][metric][0] == bests[metric][cell["nfe"]]


def print_table(results: dict[str, Any]) -> None:
    """Print with rich; the best of each metric at each number of calls is bold."""
    from rich.console import Console
    from rich.table import Table

    names = metric_names(results)
    floor = results["reference"]["floor"]
    title = f"{results['model']}, n = {results['cells'][0]['n']} pictures per cell"
    if floor is not None:
        title += f"; floor of {results['distance']}: {floor:.3g} ({results['reference']['floor_note']})"
    table = Table(title=title.replace("[", "\\["))
    for name in ["solver", "calls", *(label(name, results) for name in names), "s/picture"]:
        table.add_column(name.replace("[", "\\["), justify="left" if name == "solver" else "right")
    bests = {name: best(results, name) for name in names}
    for cell in results["cells"]:
        row = [cell_name(cell).replace("[", "\\["), str(cell["calls"])]
        for name in names:
            values = cell["metrics"].get(name)
            text = "" if values is None else show(name, values)
            row.append(f"[bold]{text}[/bold]" if values and _is_best(cell, name, bests) else text)
        table.add_row(*row, f"{cell['seconds'] / cell['n']:.3f}")
    console = Console()
    # Into a file or a pipe a table is written at its own width, not cut to a guessed terminal's.
    (console if console.is_terminal else Console(width=WIDE)).print(table)


def markdown(results: dict[str, Any]) -> str:
    """A Markdown table with intervals; the best of each metric at each number of calls is bold."""
    names = metric_names(results)
    bests = {name: best(results, name) for name in names}
    lines = [
        "| solver | calls | " + " | ".join(label(name, results) for name in names) + " |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]
    for cell in results["cells"]:
        texts = []
        for name in names:
            values = cell["metrics"].get(name)
            text = "" if values is None else show(name, values)
            texts.append(f"**{text}**" if values and _is_best(cell, name, bests) else text)
        broken = f" ({cell['not_finite']} not finite)" if cell["not_finite"] else ""
        lines.append(f"| `{cell_name(cell)}`{broken} | {cell['calls']} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def csv_text(results: dict[str, Any]) -> str:
    """One line per cell: value, low and high of every metric."""
    names = metric_names(results)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer.writerow(["solver", "guidance_scale", "nfe", "calls", "n", "seconds", "sha256", *heads])
    for cell in results["cells"]:
        row = [cell[key] for key in ("solver", "guidance_scale", "nfe", "calls", "n", "seconds", "sha256")]
        for name in names:
            values = cell["metrics"].get(name)
            row += ["", "", ""] if values is None else scaled(name, values)
        writer.writerow(row)
    return out.getvalue()
