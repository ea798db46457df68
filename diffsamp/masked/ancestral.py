"""Ancestral sampling as many codes do it: a race over every class and the mask, at every position, in every step.

This is the baseline of the benchmarks and the test that the bias of float32 races is real; use `CountFirst`, which has
the same law at any precision. With `precision="fp32"` the race multiplies every probability by d = 1 - m(s)/m(t)
and loses what then falls below 2^-24: a lower temperature, and positions of high entropy that unmask too rarely
(Zheng et al. 2024, arXiv:2409.02908, section 5, table 2).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffsamp.errors import DiffsampError
from diffsamp.masked.categorical import UniformSource
from diffsamp.masked.denoisers import Denoiser, call
from diffsamp.masked.schedules import MaskSchedule, schedule


def mixed_race(
    logits: Tensor,
    reveal: float,
    precision: str,
    generator: torch.Generator | None = None,
    uniform: UniformSource | None = None,
) -> Tensor:
    """One step of the race for logits (R, V): a class, or V for "stays masked"; int64 (R,).

    `uniform(shape)` replaces the generator, as in `sample_categorical`.
    """
    dtype = _DTYPES[precision]
    p = logits.softmax(-1, dtype=dtype)
    shape = (p.shape[0], p.shape[1] + 1)
    if uniform is None:
        noise = torch.rand(shape, generator=generator, dtype=dtype, device=p.device)
    else:
        noise = uniform(shape).to(p.device, dtype)
    return race(p, reveal, noise)


_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def race(p: Tensor, reveal: float, noise: Tensor) -> Tensor:
    """Winners of probabilities (R, V) and the mask for uniforms (R, V + 1), which are overwritten; int64 (R,).

    Weights over exponential variates, all divided by `reveal` so that no pass scales p. log(u) is minus the variate, so
    the smallest quotient wins.
    """
    noise.log_()
    torch.div(p, noise[:, :-1], out=noise[:, :-1])
    noise[:, -1] = (1 - reveal) / reveal / noise[:, -1]
    return noise.argmin(-1)


def ancestral(
    denoiser: Denoiser,
    x: Tensor,
    *,
    mask_id: int,
    steps: int,
    precision: str = "fp64",
    cached: bool = True,
    schedule_name: str | MaskSchedule = "linear",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    """Tokens (B, L) and the number of network calls.

    All positions are drawn in every step, as in the published loops, but in place: one buffer, four passes over it.
    `cached` reuses the prediction while x stands still, which needs a network that does not look at the time. The last
    step reveals what is left.
    """
    if precision not in ("fp32", "fp64"):
        raise DiffsampError(f"precision={precision!r} is not known; accepted: fp32, fp64")
    curve = schedule(schedule_name)
    times = np.linspace(1.0, 0.0, steps + 1)
    m = curve.m(times)
    x, p, noise, width, calls = x.clone(), None, None, 0, 0
    rows = torch.arange(x.shape[0], device=x.device)
    for i in range(steps):
        masked = x == mask_id
        if not bool(masked.any()):
            break
        if p is None or not cached:
            logits = call(denoiser, x, torch.full((x.shape[0],), times[i], dtype=torch.float64), None, rows).clone()
            width = logits.shape[-1]
            if 0 <= mask_id < width:
                logits[..., mask_id] = -torch.inf
            p = logits.flatten(0, 1).softmax(-1, dtype=_DTYPES[precision])
            calls += 1
        reveal = 1.0 if i == steps - 1 else float(1 - m[i + 1] / m[i])
        if noise is None:
            noise = p.new_empty((p.shape[0], width + 1))
        tokens = race(p, reveal, noise.uniform_(generator=generator)).view(x.shape)
        new = masked & (tokens < width)
        if bool(new.any()):
            x = torch.where(new, tokens, x)
            p = None
    return x, calls
