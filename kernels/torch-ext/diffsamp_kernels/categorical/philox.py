"""Philox4x32-10 on the host, for the two uniforms of a row; the same numbers as the Triton kernels draw."""

from __future__ import annotations

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)


def philox(seed: int, c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray) -> tuple[np.ndarray, ...]:
    """Four words for each counter (Salmon et al. 2011, 10 rounds); counters are uint64 arrays below 2^32."""
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (second >> np.uint64(32)) ^ c1 ^ k0,
            second & _LOW,
            (first >> np.uint64(32)) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return c0, c1, c2, c3


def row_uniforms(seed: int, keys: np.ndarray, step: int) -> np.ndarray:
    """Two uniforms of 53 bits in (0, 1) for each key, (rows, 2) float64; they depend on (seed, key, step) alone."""
    wide = keys.astype(np.int64).view(np.uint64)
    zero = np.zeros_like(wide)
    words = philox(seed, zero, zero + np.uint64(step & 0xFFFFFFFF), wide & _LOW, wide >> np.uint64(32))

    def unit(hi: np.ndarray, lo: np.ndarray) -> np.ndarray:
        bits = (hi << np.uint64(21)) | (lo >> np.uint64(11))
        return (bits.astype(np.float64) + 0.5) * 2.0**-53

    return np.stack([unit(words[0], words[1]), unit(words[2], words[3])], 1)
