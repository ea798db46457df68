"""Guided step by torch.compile: the whole-tensor form, which becomes one loop for the sums and one for the results.

The first call of each shape and option takes seconds, so it runs only where it is asked for (``backend="compiled"``).
No random number is drawn in a compiled region.
"""

from __future__ import annotations

from functools import cache

import torch

from .sums import guided_step as whole_batch
from .sums import whole


@cache
def _compiled():
    return torch.compile(whole)


def guided_step(cond, uncond, x, history, coef, step, guidance, momentum, second):
    return whole_batch(cond, uncond, x, history, coef, step, guidance, momentum, second, run=_compiled())
