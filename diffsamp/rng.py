"""Per-sample randomness: the noise of a sample depends on its seed and the step alone.

Not on the batch it is in, its place there, the order of requests, the device or the number of processes. The stream is
a counter-based generator on the host (Philox by numpy), so that it can be entered at any step without replaying the
ones before; the normals are drawn in float32 and moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .errors import DiffsampError

INITIAL = -1  # the step number of the start noise
_MASK = (1 << 64) - 1


def _generator(seed: int, step: int) -> np.random.Generator:
    if not 0 <= seed <= _MASK:
        raise DiffsampError(f"seed: got {seed}; must be between 0 and 2**64 - 1")
    return np.random.Generator(np.random.Philox(key=[seed, (step + 1) & _MASK]))


def normal(
    seeds: Sequence[int],
    shape: Sequence[int],
    step: int = INITIAL,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normal noise, one independent stream per (seed, step).

    Args:
        seeds: one seed of 0..2**64−1 per sample.
        shape: shape of one sample (without the batch axis).
        step: number of the step, 0 or above; -1 is the start noise.
        device, dtype: of the result; the values are the same on every device.

    Returns:
        tensor of shape ``(len(seeds), *shape)``.
    """
    rows = [_generator(int(seed), step).standard_normal(tuple(shape), dtype=np.float32) for seed in seeds]
    if not rows:
        return torch.empty((0, *shape), dtype=dtype, device=device)
    return torch.from_numpy(np.stack(rows)).to(device=device, dtype=dtype)


def uniform(seeds: Sequence[int], shape: Sequence[int], step: int, *, stream: int = 1) -> np.ndarray:
    """Float64 uniforms in [0, 1), one stream per (seed, step, stream); shape ``(len(seeds), *shape)``."""
    rows = [_generator(int(seed), (stream << 32) + step).random(tuple(shape)) for seed in seeds]
    return np.stack(rows) if rows else np.empty((0, *shape))


def parse_seeds(text: str) -> list[int]:
    """Seeds of a range expression: ``"0-63,100"`` gives 0..63 and 100, in that order, without repeats.

    Raises:
        DiffsampError: not a range expression, or a range that runs backwards.
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise DiffsampError(
                f"seeds: cannot read {part.strip()!r} in {text!r}; write numbers and ranges like 0-63,100"
            )
        start, stop = int(first), int(last) if dash else int(first)
        if stop < start:
            raise DiffsampError(f"seeds: range {part.strip()!r} runs backwards; write {stop}-{start}")
        if stop >= 2**63:
            raise DiffsampError(f"seeds: got {stop}; must be below 2**63")
        if stop - start >= 10_000_000:
            raise DiffsampError(f"seeds: range {part.strip()!r} is longer than 10,000,000")
        seeds.update(dict.fromkeys(range(start, stop + 1)))
    return list(seeds)
