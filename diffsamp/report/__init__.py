"""Reports of benchmarks: a table in the terminal, and one HTML file with curves, pictures and recipes."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "write_report": "page",
    "read_results": "results",
    "print_table": "table",
    "markdown": "table",
    "csv_text": "table",
    "write_png": "figure",
}
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"diffsamp.report.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
