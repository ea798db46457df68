"""``diffsamp report``: finished benchmarks as one HTML file, and as PNG, CSV, JSON or Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import DiffsampError

KINDS = (".html", ".png", ".csv", ".json", ".md")


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that diffsamp bench finished.")],
    out: Annotated[
        Path, typer.Option(help="The file to write; its ending says the kind: .html, .png, .csv, .json, .md.")
    ] = Path("report.html"),
    pictures: Annotated[int, typer.Option(help="Pictures per cell in the HTML.")] = 12,
    metric: Annotated[str | None, typer.Option(help="The metric of a .png; the first by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a report of one or more benchmarks. The HTML needs no network and no other file."""
    from ..files import write_whole
    from ..report import csv_text, markdown, read_results, write_png, write_report
    from ..report.results import metric_names

    if out.suffix not in KINDS:
        raise DiffsampError(f"out: {out} ends in {out.suffix!r}; accepted: {', '.join(KINDS)}")
    if out.exists() and not force:
        raise DiffsampError(f"out: {out} exists; choose another place or use --force")
    if pictures < 1:
        raise DiffsampError(f"pictures: got {pictures}; must be 1 or above")
    if out.suffix == ".html":
        write_report(runs, out, pictures=pictures)
    else:
        found = [results for _, results in read_results(runs)]
        if out.suffix == ".png":
            if len(found) > 1:
                raise DiffsampError(f"runs: {len(found)} folders; a .png shows one")
            if metric is not None and metric not in metric_names(found[0]):
                raise DiffsampError(
                    f"metric: {metric!r} was not measured; accepted: {', '.join(metric_names(found[0]))}"
                )
            write_png(found[0], out, metric)
        elif out.suffix == ".json":
            write_whole(out, json.dumps(found, indent=1, sort_keys=True).encode(), overwrite=force)
        else:
            text = "\n".join(map(csv_text if out.suffix == ".csv" else markdown, found))
            write_whole(out, text.encode(), overwrite=force)
    print(out)
