"""Reading results.json of one or more runs, and the names and formats of their figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffsamp.errors import DiffsampError

LABELS = {
    "fd": "FD",
    "fd-infinity": "FD∞",
    "kid": "KID × 1000",
    "is": "IS",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "class accuracy",
    "trajectory": "trajectory error",
}
LOWER_IS_BETTER = {"fd", "fd-infinity", "kid", "trajectory"}
SCALE = {"kid": 1000.0}


def read_results(roots: Sequence[str | Path]) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, results) of each run folder; raises DiffsampError for one that holds no finished benchmark."""
    found = []
    for root in map(Path, roots):
        path = root / "results.json"
        try:
            results = json.loads(path.read_text())
        except FileNotFoundError:
            raise DiffsampError(
                f"runs: {root} holds no results.json; accepted: a folder that diffsamp bench finished"
            ) from None
        except (OSError, ValueError) as error:
            raise DiffsampError(f"runs: {path} cannot be read ({error})") from None
        if not isinstance(results, dict) or results.get("format") != 1 or not results.get("cells"):
            raise DiffsampError(f"runs: {path} is no result of diffsamp bench of this version")
        found.append((root, results))
    if not found:
        raise DiffsampError("runs is empty; accepted: one or more folders that diffsamp bench finished")
    return found


def metric_names(results: dict[str, Any]) -> list[str]:
    """The metrics that at least one cell has, in the usual order."""
    have = {name for cell in results["cells"] for name in cell["metrics"]}
    return [name for name in LABELS if name in have]


def label(name: str, results: dict[str, Any]) -> str:
    """The figure's name as it must be called: FID only with the FID Inception."""
    base = LABELS[name]
    extractor = results["protocol"]["extractor"]
    if name == "fd":
        return results["distance"]
    if name == "fd-infinity":
        return results["distance"].replace("FD", "FD∞", 1).replace("FID", "FID∞", 1)
    if name in ("kid", "is") and extractor != "inception-fid":
        return base.replace("KID", f"KD[{extractor}]").replace("IS", f"IS[{extractor}]")
    return base


def scaled(name: str, values: Sequence[float]) -> list[float]:
    """Value and interval in the unit that is shown."""
    return [v * SCALE.get(name, 1.0) for v in values]


def show(name: str, values: Sequence[float]) -> str:
    """"3.47 ± 0.21", with the digits that the interval supports."""
    value, low, high = scaled(name, values)
    half = (high - low) / 2
    if not math.isfinite(half):
        return f"{value:.3g}"
    digits = 3 if name in ("precision", "recall", "accuracy", "trajectory") else 2
    if half > 0:
        digits = max(0, min(4, 1 - math.floor(math.log10(half))))
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def cell_name(cell: dict[str, Any]) -> str:
    """Solver, and guidance where it was given."""
    scale = cell.get("guidance_scale")
    return cell["solver"] + ("" if scale is None else f", w {scale:g}")
