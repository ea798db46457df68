"""The manifest: one line of JSON per finished chunk, only ever appended to.

The chunk files are the truth; the manifest adds hashes and times and saves opening every file. A line that a crash
tore is passed over, and a chunk whose line was lost is verified by its own hash and entered again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffsamp.errors import DiffsampError

NAME = "manifest.jsonl"


def append(root: Path, entry: dict[str, Any]) -> None:
    """Add one line; concurrent writers do not mix lines (O_APPEND, one write)."""
    path = root / NAME
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            torn = size and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, (b"\n" if torn else b"") + json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        finally:
            os.close(handle)
    except OSError as error:
        raise DiffsampError(f"cannot write {path}: {error.strerror or error}") from None


def read(root: Path) -> dict[int, dict[str, Any]]:
    """The latest entry of each chunk; lines that do not parse are passed over."""
    try:
        data = (root / NAME).read_bytes()
    except FileNotFoundError:
        return {}
    lines = data.split(b"\n")
    try:
        # One parse of everything is several times quicker than a parse of each line.
        entries = json.loads(b"[" + b",".join(line for line in lines if line) + b"]")
    except ValueError:
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
    return {e["chunk"]: e for e in entries if isinstance(e, dict) and isinstance(e.get("chunk"), int)}
