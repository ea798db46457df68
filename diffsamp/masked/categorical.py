"""Categorical draws that are right in the tail.

`precision="safe"` is a two-level inverse CDF. The unnormalised weights exp(logit - max) are formed once; sums over
tiles of about sqrt(V) classes and their running total are float64; one 53-bit uniform picks the tile and a second one
the class inside it. A class of probability p is drawn with p (1 + O(1e-6)) however small p is, a class of zero weight
is unreachable, and the cost is one exp per class and two uniforms per row.

The other two are exponential races, argmax p / E. With float32 uniforms (`"fp32"`, what many samplers do) E lives on
a lattice of step 2^-24 and a class whose weight in the race is w is chosen x / (e^x - 1) times as often as it should,
x = 2^-24 / w: the tail is lost and the effective temperature is lower (Zheng et al. 2024, arXiv:2409.02908, section 5,
found the effect; the lattice law is the exact form). `"fp64"` does the same with 2^-53.

All three are exact for the logits that they are given: logits rounded to bfloat16 before the call stay rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from diffsamp_kernels.categorical import sample_categorical as kernel_categorical
from diffsamp_kernels.categorical.cpu import two_level
from diffsamp_kernels.dispatch import choose
from torch import Tensor

from diffsamp.errors import DiffsampError
from diffsamp.masked.filters import check_filters, filter_logits
from diffsamp.masked.randomness import hashed_uniforms, row_seeds

UniformSource = Callable[[tuple[int, ...]], Tensor]
PRECISIONS = ("safe", "fp64", "fp32")
_CHUNK = 1 << 19  # classes handled at a time: the weights stay in cache


def sample_categorical(
    logits: Tensor,
    generator: torch.Generator | None = None,
    precision: str = "safe",
    *,
    seeds: Sequence[int] | Tensor | None = None,
    step: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    mask_id: int | None = None,
    uniform: UniformSource | None = None,
) -> Tensor:
    """One class for each row of `logits`.

    Args:
        logits: (..., V) in float16, bfloat16, float32 or float64; softmax is never formed below float32. Minus
            infinity is a class of probability zero. Rows with plus infinity choose evenly among those classes.
        generator: a torch generator; the draws of a row then depend on its place in the batch.
        precision: "safe" (default, exact in the tail), "fp64" or "fp32" (exponential races; "fp32" is biased).
        seeds: one integer for each row (flattened); the token of a row then depends on (seed, step) and its logits.
        step: a number that separates several draws with the same seeds.
        temperature, top_k, top_p: filters, in this order; temperature 0 is argmax.
        mask_id: a class that is never drawn, if it lies inside V.
        uniform: `uniform(shape)` -> tensor in [0, 1], in place of both `generator` and `seeds`. Asked for (R, 2) by
            "safe" and (R, V) by the races.

    Returns:
        int64 tensor of shape `logits.shape[:-1]`.

    Raises:
        DiffsampError: a row with NaN or without any possible class (named), or an argument out of its range.
    """
    if precision not in PRECISIONS:
        raise DiffsampError(f"precision={precision!r} is not known; accepted: {', '.join(PRECISIONS)}")
    check_filters(temperature, top_k, top_p)
    if not isinstance(logits, Tensor):
        raise DiffsampError(f"logits must be a torch tensor (..., V); got {type(logits).__name__}")
    if logits.ndim < 1 or logits.shape[-1] == 0 or not logits.is_floating_point():
        raise DiffsampError(f"logits of shape {tuple(logits.shape)}, {logits.dtype}: floating (..., V), V > 0, needed")
    rows = logits.reshape(-1, logits.shape[-1])
    if seeds is not None and uniform is None:
        keys = row_seeds(rows.shape[0], seeds, None)

        def source(shape: tuple[int, ...]) -> Tensor:
            return torch.from_numpy(hashed_uniforms(keys, step, shape[1]))
    else:
        source = uniform or _generator_source(generator, precision, rows.device)  # type: ignore
    tokens = draw(rows, source, precision=precision, temperature=temperature, top_k=top_k, top_p=top_p, mask_id=mask_id)
    return tokens.reshape(logits.shape[:-1])


def _generator_source(generator: torch.Generator | None, precision: str, device: torch.device) -> UniformSource:
    home = generator.device if generator is not None else device
    dtype = torch.float32 if precision == "fp32" else torch.float64
    return lambda shape: torch.rand(shape, generator=generator, dtype=dtype, device=home)


def draw(
    rows: Tensor,
    source: UniformSource,
    *,
    precision: str = "safe",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    mask_id: int | None = None,
) -> Tensor:
    """The core of `sample_categorical`, for logits (R, V) and a source of uniforms; arguments are not checked again."""
    count, width = rows.shape
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=rows.device)
    plain = top_k is None and top_p is None
    if precision == "safe" and plain and temperature > 0 and (backend := kernel_backend(rows)) is not None:
        tokens = _kernel_draw(rows, source, temperature, mask_id, backend)
        if tokens is not None:
            return tokens
    u = source((count, 2 if precision == "safe" else width)) if temperature > 0 else None
    parts, chunk = [], max(1, _CHUNK // width)
    for first in range(0, count, chunk):
        part = slice(first, min(count, first + chunk))
        logits, top = _usable(rows[part], mask_id, first)
        if temperature != 1.0 or not plain:
            logits = filter_logits(logits, temperature, top_k, top_p)
            top = logits.amax(-1)
        if u is None:
            parts.append(logits.argmax(-1))
        elif precision == "safe":
            tile = 1 << max(6, (logits.shape[1].bit_length() + 1) // 2)
            parts.append(two_level(_weights(logits, top), u[part].to(rows.device, torch.float64), tile)[0])
        else:
            dtype = torch.float32 if precision == "fp32" else torch.float64
            p = logits.softmax(-1, dtype=dtype)
            parts.append(_race(p, u[part, : p.shape[1]].to(rows.device, dtype)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _usable(logits: Tensor, mask_id: int | None, first: int) -> tuple[Tensor, Tensor]:
    """Logits without the mask class, and their largest; infinite rows have their limit; bad rows are named.

    A mask that is the last class is cut off, another one is made impossible: classes keep their numbers.
    """
    if mask_id is not None and mask_id == logits.shape[-1] - 1 > 0:
        logits = logits[:, :mask_id]
    elif mask_id is not None and 0 <= mask_id < logits.shape[-1]:
        logits = logits.clone()
        logits[:, mask_id] = -math.inf
    top = logits.amax(-1)
    # The largest of a row is NaN or infinite if the row is bad. For few rows Python is done before another operation.
    if not (all(map(math.isfinite, top.tolist())) if len(top) <= 8 else bool(top.isfinite().all())):
        for fault, text in ((top.isnan(), "holds NaN"), (top == -math.inf, "has no class with probability above zero")):
            if bool(fault.any()):
                raise DiffsampError(f"logits: row {first + int(fault.nonzero()[0])} {text}")
        infinite = top == math.inf
        limit = torch.where(logits == math.inf, 0.0, -math.inf).to(logits.dtype)
        logits = torch.where(infinite[:, None], limit, logits)
        top = logits.amax(-1)
    return logits, top


def _weights(logits: Tensor, top: Tensor) -> Tensor:
    """exp(logit - top) in float32, or float64 for float64 logits."""
    if logits.dtype not in (torch.float32, torch.float64):
        logits, top = logits.float(), top.float()
    return (logits - top[:, None]).exp_()


def _race(p: Tensor, u: Tensor) -> Tensor:
    """argmax of p / E, E = -log(u); a class of zero weight cannot win, whatever u is."""
    key = p / u.log().abs()  # abs: at u = 1 the negative would be -0 and the quotient -inf
    return torch.where(p > 0, key, -1.0).argmax(-1)


def kernel_backend(rows: Tensor) -> str | None:
    """The backend of `diffsamp_kernels` that draws these rows in one kernel, or None for the way through torch."""
    if rows.dtype == torch.float64 or choose(None, rows) != "triton":
        return None
    return "triton"


def _kernel_draw(
    rows: Tensor, source: UniformSource, temperature: float, mask_id: int | None, backend: str
) -> Tensor | None:
    """Tokens (R,) by the kernel, or None where a row is not plain.

    Its noise comes from Philox keyed by row; the keys are 53 bits of `source`, so a row's token still depends on its
    seed and on nothing else of the batch. Rows with NaN, plus infinity or no class at all make the log-sum-exp not
    finite and go the slower way, which names them or takes their limit.
    """
    keys = (source((rows.shape[0], 2))[:, 0].to(torch.float64) * 2.0**53).to(torch.int64).to(rows.device)
    result = kernel_categorical(rows, seed=0, keys=keys, temperature=temperature, mask_id=mask_id, backend=backend)
    return result.tokens if bool((result.lse.isfinite() & (result.tokens >= 0)).all()) else None
