"""The worker's loop: claim a missing chunk, generate it, write it whole, until none is missing.

Every process of a run does this on the same folder, whoever started it. There is no leader, so none can be lost: a
chunk whose worker died is free again at that moment and the next process that looks takes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.files import NotWritten
from diffsamp.run import manifest
from diffsamp.run.chunk import CorruptChunk, chunk_path, write_chunk
from diffsamp.run.claims import REDUCE, Claims
from diffsamp.run.folder import RunFolder, RunResult

Generate = Callable[[np.ndarray], dict[str, np.ndarray]]
WAIT = 0.05  # seconds between looks while others hold the last chunks


class Progress(Protocol):
    """Told after every chunk: finished chunks of the run, all chunks, and whether this process made it."""

    def __call__(self, done: int, total: int, own: bool) -> None: ...


def run_chunks(
    root: str | Path,
    recipe: dict[str, Any],
    generate: Generate,
    n: int,
    *,
    seed: int = 0,
    chunk: int = 64,
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
    collect: bool = True,
) -> RunResult:
    """Run or resume, alone or beside other processes, and return the whole result when every chunk is there.

    Args:
        root: the run's folder, shared by all processes.
        recipe: plain JSON; a folder accepts one recipe only.
        generate: from seeds [chunk] (int64) to arrays whose first axis is the seeds; it must depend on the seeds alone.
        n, seed, chunk: how many seeds, the first, and how many in a chunk (the last chunk is padded).
        rank, world: where this process starts to look, so that processes seldom meet.
        progress: see `Progress`.
        collect: whether the result holds the arrays; without them memory does not grow with n.

    Raises:
        DiffsampError: another run in the folder, a disk that is full or read-only, arrays of the wrong length.
    """
    try:
        folder = RunFolder(root, recipe, n, seed=seed, chunk=chunk)
        return _run(folder, generate, rank, world, progress, collect)
    except NotWritten as error:
        raise NotWritten(
            f"{error}; what is finished is kept, free the disk or mend the rights and run the same command again"
        ) from None


def _run(
    folder: RunFolder, generate: Generate, rank: int, world: int, progress: Progress | None, collect: bool
) -> RunResult:
    claims = Claims(folder.root)
    try:
        done = folder.adopt()
        while True:
            _sweep(folder, claims, generate, done, rank, world, progress)
            try:
                result = folder.result(collect=collect)
                folder.sweep()
                return result
            except CorruptChunk:
                # One process judges; the others see the chunk missing and help to make it again.
                if claims.take(REDUCE):
                    try:
                        for index in folder.verify():
                            folder.set_aside(index)
                    finally:
                        claims.release(REDUCE)
                else:
                    time.sleep(WAIT)
                done = folder.present()
    finally:
        claims.close()


def _sweep(
    folder: RunFolder,
    claims: Claims,
    generate: Generate,
    done: set[int],
    rank: int,
    world: int,
    progress: Progress | None,
) -> None:
    """Work until every chunk's file is there, made by this process or another."""
    first = [i for i in range(folder.count) if i % world == rank % world]
    order = first + [i for i in range(folder.count) if i % world != rank % world]
    open_chunks = [i for i in order if i not in done]
    while open_chunks:
        left, made = [], False
        for index in open_chunks:
            if chunk_path(folder.root, index).exists():
                done.add(index)
                _tell(progress, folder, done, False)
            elif (own := attempt(folder, claims, generate, index)) is None:
                left.append(index)
            else:
                made |= own
                done.add(index)
                _tell(progress, folder, done, own)
        open_chunks = left
        if left and not made:
            time.sleep(WAIT)


def attempt(folder: RunFolder, claims: Claims, generate: Generate, index: int) -> bool | None:
    """Make a chunk: True when this process made it, False when it was there, None when another process has it."""
    if not claims.take(index):
        return None
    try:
        # Another process may have finished it between a look and the claim.
        if chunk_path(folder.root, index).exists():
            return False
        _make(folder, index, generate)
        return True
    finally:
        claims.release(index)


def _make(folder: RunFolder, index: int, generate: Generate) -> None:
    start = time.perf_counter()
    arrays = {name: np.asarray(value) for name, value in generate(folder.seeds(index)).items()}
    if not arrays:
        raise DiffsampError("generate returned no arrays; accepted: a dictionary of arrays, one row per seed")
    for name, value in arrays.items():
        if not value.ndim or len(value) != folder.chunk:
            raise DiffsampError(
                f"generate returned {name} of shape {value.shape}; accepted: first axis {folder.chunk}, one row per "
                "seed"
            )
    seconds = time.perf_counter() - start
    digest = write_chunk(folder.root, index, arrays)
    worker = f"{os.uname().nodename}:{os.getpid()}"
    entry = {"chunk": index, "sha256": digest, "seconds": round(seconds, 6), "worker": worker}
    manifest.append(folder.root, entry)


def _tell(progress: Progress | None, folder: RunFolder, done: set[int], own: bool) -> None:
    if progress is not None:
        progress(len(done), folder.count, own)
