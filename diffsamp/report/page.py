"""The report: one HTML file that needs nothing else. Data is a JSON block, drawing is the script in page.js."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.files import write_whole
from diffsamp.report.results import LOWER_IS_BETTER, cell_name, label, metric_names, read_results, scaled, show
from diffsamp.run.bench import preview

COLUMNS = 12  # pictures of a cell in a row: the same seeds in every cell


def write_report(roots: Sequence[str | Path], path: str | Path, *, pictures: int = COLUMNS) -> Path:
    """Write the report of one or more benchmark folders to `path` and return it.

    Raises DiffsampError for a folder without a finished benchmark, or a place that cannot be written.
    """
    runs = read_results(roots)
    data = [_run(root, results, pictures) for root, results in runs]
    write_whole(Path(path), render(data).encode(), overwrite=True)
    return Path(path)


def render(data: list[dict[str, Any]]) -> str:
    """The HTML of prepared runs."""
    home = resources.files("diffsamp.report")
    # "</" would end the script element, whatever string it came from.
    block = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/").replace("<!--", "<\\!--")
    page = home.joinpath("page.html").read_text()
    parts = {
        "TITLE": html.escape("diffsamp: " + ", ".join(run["model"] for run in data)),
        "STYLE": home.joinpath("page.css").read_text(),
        "DATA": block,
        "SCRIPT": home.joinpath("page.js").read_text(),
    }
    for key, value in parts.items():
        page = page.replace("{{" + key + "}}", value, 1)
    return page


def _run(root: Path, results: dict[str, Any], pictures: int) -> dict[str, Any]:
    names = metric_names(results)
    cells = []
    for cell in results["cells"]:
        metrics = {}
        for name in names:
            if name in cell["metrics"]:
                metrics[name] = {
                    "v": [v if np.isfinite(v) else None for v in scaled(name, cell["metrics"][name])],
                    "text": show(name, cell["metrics"][name]),
                }
        cells.append(
            {
                "name": cell_name(cell), "stock": cell["solver"].startswith("diffusers:"), "nfe": cell["nfe"],
                "calls": cell["calls"], "seconds": cell["seconds"] / cell["n"], "n": cell["n"], "sha": cell["sha256"],
                "broken": cell["not_finite"], "metrics": metrics, "strip": _strip(root, cell["folder"], pictures),
            }
        )  # fmt: skip
    return {
        "model": results["model"],
        "metrics": [{"key": k, "label": label(k, results), "lower": k in LOWER_IS_BETTER} for k in names],
        "cells": cells,
        "reference": results["reference"],
        "recipe": _recipe(results),
        "environment": results["environment"],
        "warnings": results["warnings"],
        "seeds": [results["seed"], results["seed"] + pictures - 1],
    }


def _recipe(results: dict[str, Any]) -> dict[str, Any]:
    protocol = results["protocol"]
    found = {
        "model": results["model"],
        "weights (sha256)": results["model_sha256"][:16],
        "pictures per cell": results["cells"][0]["n"],
        "first seed": results["seed"],
        "chunk": results["chunk"],
        "protocol": protocol["name"],
        "extractor": f"{protocol['extractor']} ({results['extractor_sha256'][:16]})",
        "resize": protocol["resize"],
        "statistics": protocol["dtype"],
        "reference": f"{results['reference']['name']}, {results['reference']['n']} pictures",
        "intervals": f"95 %, bootstrap over pictures ({results['replicates']} replicates); shares by Wilson",
    }
    if results["reference"]["floor"] is not None:
        found["floor"] = f"{results['reference']['floor']:.4g}: {results['reference']['floor_note']}"
    if results["samples_from"]:
        found["trajectory error against"] = results["samples_from"]
    return found


def _strip(root: Path, folder: str, count: int) -> str:
    """The first pictures of a cell side by side, as the data URL of a PNG; empty where the run kept none."""
    from PIL import Image

    try:
        found = preview(root, folder, count)
    except DiffsampError:
        return ""
    row = np.concatenate(list(found), axis=2)
    picture = Image.fromarray(row[0] if len(row) == 1 else row.transpose(1, 2, 0))
    if picture.height > 96:
        picture = picture.resize((picture.width * 96 // picture.height, 96), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
