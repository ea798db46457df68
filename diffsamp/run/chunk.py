"""One chunk: the arrays of a fixed set of seeds in one .safetensors file that is written whole and carries its own
hash.

The file appears under its name only when it is complete (temporary name, fsync, rename). The hash covers names, dtypes,
shapes and bytes of the arrays, so it is the same wherever and whenever the chunk is made; times are kept elsewhere.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from diffsamp.errors import DiffsampError
from diffsamp.files import write_whole

PER_FOLDER = 1000  # files in one folder: listings of a million chunks stay quick on any file system


class CorruptChunk(DiffsampError):
    """A chunk file that is not readable or does not match its hash."""


def chunk_path(root: Path, index: int) -> Path:
    """Where chunk `index` lives."""
    return root / "chunks" / f"{index // PER_FOLDER:04d}" / f"chunk-{index:06d}.safetensors"


def content_hash(arrays: dict[str, np.ndarray]) -> str:
    """The sha256 of the arrays, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(memoryview(array.data).cast("B") if array.size else b"")
    return digest.hexdigest()


def write_chunk(root: Path, index: int, arrays: dict[str, np.ndarray]) -> str:
    """Write chunk `index` and return its hash."""
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    digest = content_hash(arrays)
    # One key: safetensors writes several in no fixed order, and equal chunks must be equal bytes.
    write_whole(chunk_path(root, index), save(arrays, {"chunk": f"{index} {digest}"}), overwrite=True)
    return digest


def read_chunk(root: Path, index: int) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of chunk `index` and their hash; raises CorruptChunk when they are not what was written."""
    path = chunk_path(root, index)
    try:
        with safe_open(str(path), "numpy") as file:
            facts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise CorruptChunk(f"chunk {index} is missing: {path}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptChunk(f"chunk {index} is unreadable: {path} ({error})") from None
    digest = content_hash(arrays)
    if facts.get("chunk") != f"{index} {digest}":
        raise CorruptChunk(f"chunk {index} does not match its hash: {path}")
    return arrays, digest
