"""A run folder: recipe, chunks, manifest, and the reduction that reads the chunks in order.

    run.json              what is run: the recipe, the seeds, the chunk size; fixed when the folder is made
    chunks/0000/chunk-000123.safetensors
    manifest.jsonl        one line per finished chunk
    claims.lock           who works on what, see claims.py
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.files import AlreadyThere, write_whole
from diffsamp.run import manifest
from diffsamp.run.chunk import CorruptChunk, chunk_path, read_chunk


@dataclass(frozen=True)
class RunResult:
    """The arrays of a whole run in the order of the seeds, and a hash that every correct run of the recipe has."""

    arrays: dict[str, np.ndarray]
    sha256: str
    chunks: int
    seconds: float


def _plain(recipe: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(recipe, sort_keys=True))
    except TypeError as error:
        raise DiffsampError(f"recipe must be plain JSON ({error})") from None


class RunFolder:
    """A folder that holds one run of `n` seeds, first `seed`, in chunks of `chunk`; made if it is not there.

    Raises DiffsampError when the folder holds another run (the message names what differs) or cannot be written.
    """

    def __init__(self, root: str | Path, recipe: dict[str, Any], n: int, *, seed: int = 0, chunk: int = 64) -> None:
        if n < 1 or chunk < 1 or seed < 0:
            raise DiffsampError(f"n={n}, chunk={chunk}, seed={seed}; accepted: at least 1, at least 1, at least 0")
        self.root, self.n, self.seed, self.chunk = Path(root), int(n), int(seed), int(chunk)
        self.facts = {"recipe": _plain(recipe), "n": self.n, "seed": self.seed, "chunk": self.chunk, "format": 1}
        self._open()

    @classmethod
    def existing(cls, root: str | Path) -> RunFolder:
        """A folder that is already there, with the run it holds."""
        facts = _read_facts(Path(root) / "run.json")
        return cls(root, facts["recipe"], facts["n"], seed=facts["seed"], chunk=facts["chunk"])

    def _open(self) -> None:
        path = self.root / "run.json"
        if not path.is_file():
            if self.root.is_dir() and any(self.root.iterdir()) and not (self.root / "claims.lock").exists():
                names = sorted(p.name for p in self.root.iterdir() if not p.name.startswith("."))
                if names and not path.is_file():
                    raise DiffsampError(
                        f"{self.root} is not empty and is no run (it holds {names[0]}); name a new folder"
                    )
            # Of processes that come at once one gives the folder its run; the others find it and compare.
            with contextlib.suppress(AlreadyThere):
                write_whole(path, json.dumps(self.facts, sort_keys=True, indent=1).encode())
        held = _read_facts(path)
        if held != self.facts:
            raise DiffsampError(f"{self.root} holds another run: {_difference(held, self.facts)}; name a new folder")

    @property
    def count(self) -> int:
        """The number of chunks."""
        return -(-self.n // self.chunk)

    def seeds(self, index: int) -> np.ndarray:
        """The seeds of a chunk, always `chunk` of them: the last chunk is padded, so that all have one shape."""
        start = self.seed + index * self.chunk
        return np.arange(start, start + self.chunk, dtype=np.int64)

    def rows(self, index: int) -> int:
        """How many rows of a chunk count."""
        return min(self.chunk, self.n - index * self.chunk)

    def present(self) -> set[int]:
        """The chunks whose files are there, by listing alone."""
        found: set[int] = set()
        base = self.root / "chunks"
        try:
            folders = os.listdir(base)
        except FileNotFoundError:
            return found
        for folder in folders:
            if not folder.isdecimal():
                continue
            # Names alone, and no look at any file: a million chunks are listed in a second or two.
            found.update(
                int(name[6:-12])
                for name in os.listdir(base / folder)
                if name.startswith("chunk-") and name.endswith(".safetensors") and name[6:-12].isdecimal()
            )
        return {index for index in found if index < self.count} if found and max(found) >= self.count else found

    def adopt(self) -> set[int]:
        """The chunks that are finished; those without a manifest line are verified and entered, bad ones set aside."""
        present = self.present()
        for index in sorted(present - {entry["chunk"] for entry in manifest.entries(self.root)}):
            try:
                digest = read_chunk(self.root, index)[1]
            except CorruptChunk:
                self.set_aside(index)
                present.discard(index)
            else:
                manifest.append(self.root, {"chunk": index, "sha256": digest, "seconds": None})
        return present

    def set_aside(self, index: int) -> None:
        """Move a bad chunk out of the way; it is kept for whoever wants to know why."""
        path = chunk_path(self.root, index)
        try:
            os.replace(path, path.with_name(f"corrupt-{path.name}"))
        except FileNotFoundError:
            pass  # another process was quicker

    def sweep(self) -> None:
        """Remove what killed writers left under temporary names; for finished runs, where nobody writes any more."""
        for path in (self.root / "chunks").glob("*/.chunk-*.partial"):
            path.unlink(missing_ok=True)

    def verify(self) -> list[int]:
        """The chunks that are missing or do not match their own or the manifest's hash; reads every file."""
        bad, entered = [], {entry["chunk"]: entry["sha256"] for entry in manifest.entries(self.root)}
        for index in range(self.count):
            try:
                digest = read_chunk(self.root, index)[1]
            except CorruptChunk:
                bad.append(index)
                continue
            if entered.get(index, digest) != digest:
                bad.append(index)
        return bad

    def stream(self) -> Iterator[tuple[int, dict[str, np.ndarray], str]]:
        """(index, arrays without the padding, hash) in order; raises CorruptChunk."""
        for index in range(self.count):
            arrays, digest = read_chunk(self.root, index)
            yield index, {name: value[: self.rows(index)] for name, value in arrays.items()}, digest

    def result(self, *, collect: bool = True) -> RunResult:
        """Read the whole run in order; raises CorruptChunk for a chunk that is missing or bad.

        Without `collect` the arrays are checked and hashed but not kept: memory does not grow with n.
        """
        parts: dict[str, list[np.ndarray]] = {}
        total = hashlib.sha256()
        for _, arrays, digest in self.stream():
            total.update(digest.encode())
            for name, value in arrays.items() if collect else ():
                parts.setdefault(name, []).append(value)
        arrays = {name: np.concatenate(values) for name, values in parts.items()}
        seconds = {entry["chunk"]: entry.get("seconds") or 0.0 for entry in manifest.entries(self.root)}
        return RunResult(arrays, total.hexdigest(), self.count, sum(seconds.values()))


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DiffsampError(f"{path.parent} holds no run (no run.json)") from None
    except (OSError, ValueError) as error:
        raise DiffsampError(f"{path} cannot be read as a run's description ({error})") from None


def _difference(held: dict[str, Any], asked: dict[str, Any]) -> str:
    flat = [{**facts, **facts.get("recipe", {})} for facts in (held, asked)]
    for key in sorted(flat[0].keys() | flat[1].keys()):
        if key != "recipe" and flat[0].get(key) != flat[1].get(key):
            return f"{key} is {flat[0].get(key)!r} there and {flat[1].get(key)!r} here"
    return "its description differs"
