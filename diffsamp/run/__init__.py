"""Long runs in chunks of seeds: whole files with hashes, resume, and any number of processes on one folder.

Nothing here imports torch until a process group is asked for: `run_chunks` needs only numpy and safetensors.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Progress": "work",
    "RunFolder": "folder",
    "RunResult": "folder",
    "run_chunks": "work",
    "run_on": "engines",
    "ENGINES": "engines",
}
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"diffsamp.run.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
