"""Counter-based uniforms for masked sampling: a number depends on (seed, stream, lane) and on nothing else.

So a row of a batch draws the same numbers alone, in any batch and on any device. The hash is two rounds of the
splitmix64 finaliser (Steele et al. 2014) on a Weyl counter, vectorised over rows on the host; 53 bits are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffsamp.errors import DiffsampError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

# Streams of one row. Token draws of event e use TOKENS + e, so a remasked position gets fresh numbers.
TIMES, PERMUTATION, LEVELS, TOKENS = 1, 2, 3, 1 << 16
SECOND = 1 << 30  # an offset for a second, independent family of per-event numbers (choices, remasking)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


def hashed_bits(seeds: np.ndarray, stream: int | np.ndarray, lanes: np.ndarray) -> np.ndarray:
    """64 random bits for each lane; `seeds` int64 (R,), `stream` one or (R, 1), `lanes` int64 (R, C) or (C,)."""
    with np.errstate(over="ignore"):
        key = _mix(seeds.astype(np.int64).view(np.uint64)[:, None] + _GOLDEN)
        counter = (
            (np.asarray(stream).astype(np.uint64) << np.uint64(32)) + np.asarray(lanes).astype(np.uint64) + np.uint64(1)
        )
        return _mix(_mix(key + counter * _GOLDEN) ^ key)


def hashed_uniforms(seeds: np.ndarray, stream: int | np.ndarray, lanes: np.ndarray | int) -> np.ndarray:
    """Float64 uniforms on the 2^-53 lattice of [0, 1); an integer `lanes` stands for arange(lanes). Shape (R, C)."""
    lanes = np.arange(lanes) if isinstance(lanes, int) else lanes
    return (hashed_bits(seeds, stream, lanes) >> np.uint64(11)) * 2.0**-53


def row_seeds(
    rows: int, seeds: Sequence[int] | Tensor | None, generator: torch.Generator | Sequence[torch.Generator] | None
) -> np.ndarray:
    """One int64 seed per row: the given ones, or drawn from one generator, or one from each row's own generator."""
    if seeds is not None:
        given = np.asarray(seeds.cpu() if isinstance(seeds, Tensor) else seeds)
        if given.shape != (rows,) or not (np.issubdtype(given.dtype, np.integer) or rows == 0):
            raise DiffsampError(f"seeds must be {rows} integers, one for each row; got {given.tolist()!r:.80}")
        return given.astype(np.int64)
    if isinstance(generator, (list, tuple)):
        if len(generator) != rows:
            raise DiffsampError(f"generator is a list of {len(generator)} for {rows} rows; give one for each row")
        return np.concatenate([_draw_seeds(1, g) for g in generator]) if rows else np.empty(0, np.int64)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise DiffsampError(f"generator={generator!r:.60} must be a torch.Generator, or a list of one for each row")
    return _draw_seeds(rows, generator)


def _draw_seeds(rows: int, generator: torch.Generator | None) -> np.ndarray:
    device = generator.device if generator is not None else "cpu"
    return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator, device=device).cpu().numpy()
