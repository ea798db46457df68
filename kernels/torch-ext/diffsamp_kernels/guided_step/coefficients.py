"""The coefficient row of a guided step: 18 numbers, so that a whole run lies in one device table (steps, 18).

0 p, 1 q: x0 = p·x + q·prediction.  2 guidance scale w.  3 eta.  4 norm threshold r (0: none).  5 momentum.
6 rescale.  7 unused.  8..12 the next input over (x, x0, h1, h2, h3).  13..17 a second row over the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

COLUMNS = 18


def guided_coefficients(
    row: Sequence[float],
    second: Sequence[float] = (),
    *,
    x0: tuple[float, float] = (0.0, 1.0),
    scale: float,
    eta: float = 1.0,
    norm_threshold: float = 0.0,
    momentum: float = 0.0,
    rescale: float = 0.0,
) -> torch.Tensor:
    """One coefficient row, float64, shape (18,); stack the rows of a run.

    Args:
        row: weights of (x, x0, h1, h2, h3) in the next input; shorter is padded with zeros.
        second: the same for a second output, such as UniPC's corrected base.
        x0: (p, q) of the network's prediction type at this level.
        scale: guidance scale, 1 is none.
        eta, norm_threshold, momentum: APG's options. rescale: CFG-rescale's share, 0 to 1.
    """
    if len(row) > 5 or len(second) > 5:
        raise ValueError(f"row: {max(len(row), len(second))} weights; at most 5, of (x, x0, h1, h2, h3)")
    values = [x0[0], x0[1], scale, eta, norm_threshold, momentum, rescale, 0.0]
    for weights in (row, second):
        values += [*map(float, weights), *[0.0] * (5 - len(weights))]
    return torch.tensor(values, dtype=torch.float64)
