"""The manifest: one line of JSON per finished chunk, only ever appended to.

The chunk files are the truth; the manifest adds hashes and times and saves opening every file. A line that a crash
tore is passed over, and a chunk whose line was lost is verified by its own hash and entered again.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffsamp.files import NotWritten

NAME = "manifest.jsonl"
BLOCK = 1 << 20  # bytes of lines that are parsed at once


def append(root: Path, entry: dict[str, Any]) -> None:
    """Add one line; concurrent writers do not mix lines (O_APPEND, one write)."""
    path = root / NAME
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            torn = size and os.pread(handle, 1, size - 1) != b"\n"
            line = (b"\n" if torn else b"") + json.dumps(entry, separators=(",", ":")).encode() + b"\n"
            if os.write(handle, line) < len(line):  # the disk filled up inside the line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)
    except OSError as error:
        raise NotWritten(f"cannot write {path}: {error.strerror or error}") from None


def entries(root: Path) -> Iterator[dict[str, Any]]:
    """Every entry in the order of writing; lines that do not parse are passed over. Memory does not grow with the
    file.
    """
    try:
        file = (root / NAME).open("rb")
    except FileNotFoundError:
        return
    with file:
        while lines := file.readlines(BLOCK):
            try:
                # One parse of a block is several times quicker than a parse of each line.
                found = json.loads(b"[" + b",".join(line for line in lines if line != b"\n") + b"]")
            except ValueError:
                found = [entry for entry in map(_parsed, lines) if entry is not None]
            for entry in found:
                if isinstance(entry, dict) and isinstance(entry.get("chunk"), int):
                    yield entry


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def read(root: Path) -> dict[int, dict[str, Any]]:
    """The latest entry of each chunk."""
    return {entry["chunk"]: entry for entry in entries(root)}
