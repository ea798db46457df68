"""Categorical draw that is right in the tail, with log-probability and log-sum-exp."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..dispatch import check_same, choose

METHODS = ("tile", "race")


class Draw(NamedTuple):
    """One token per row, int64; its log-probability and the log-sum-exp of the row's scaled logits, float32."""

    tokens: torch.Tensor
    logprob: torch.Tensor
    lse: torch.Tensor


def sample_categorical(
    logits: torch.Tensor,
    *,
    seed: int | torch.Tensor,
    keys: torch.Tensor | None = None,
    step: int | torch.Tensor = 0,
    temperature: float = 1.0,
    uncond: torch.Tensor | None = None,
    cfg_scale: float | None = None,
    rows: torch.Tensor | None = None,
    mask_id: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    method: str = "tile",
    backend: str | None = None,
) -> Draw:
    """Draw one token of each row; a row's token depends on its logits and (seed, key, step), not on the batch.

    Args:
        logits: (R, V), float32, bfloat16 or float16. Minus infinity is a class of probability zero.
        seed: 63 bits, a number or an int64 tensor of one element. keys: int64, one per drawn row; default 0, 1, ...
        step: 0 to 2^31 - 1, separates draws with the same seed and keys; a number, or an int64 tensor of one element.
        temperature: above 0.
        uncond, cfg_scale: logits u + w(c - u), formed as they are read.
        rows: int64, the rows to draw; default all.
        mask_id: a class that is never drawn.
        top_k, top_p: only the k most likely classes, and of those the fewest whose mass reaches p; of equal classes
            the first. Log-probability and log-sum-exp are of what is left.
        method: "tile", a two-stage inverse CDF; or "race", an exponential race with 64 bits for each class, whose
            winner is the same for any tile size and any split of the vocabulary.

    Raises:
        ValueError: arguments out of range. A row without any possible class gives token -1.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits: {logits.dtype} of shape {tuple(logits.shape)}; must be floating (rows, classes > 0)")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; accepted: {', '.join(METHODS)}")
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature!r}; must be above 0 (use argmax for 0)")
    if (uncond is None) != (cfg_scale is None):
        raise ValueError("uncond and cfg_scale: give both or none")
    if not isinstance(step, torch.Tensor) and not 0 <= step < 2**31:
        raise ValueError(f"step={step}; must be from 0 to 2^31 - 1")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}; must be 1 or more")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p}; must be above 0 and at most 1")
    kind = choose(backend, logits, compiles=False)
    logits = logits.contiguous()
    if uncond is not None:
        uncond = check_same("uncond", uncond, logits)
    top_p = None if top_p == 1.0 else top_p
    count = logits.shape[0] if rows is None else rows.shape[0]
    own = torch.arange(count, dtype=torch.int64, device=logits.device) if keys is None else keys
    if own.shape != (count,) or own.dtype != torch.int64:
        raise ValueError(f"keys: {own.dtype} of shape {tuple(own.shape)}; must be int64 ({count},)")
    if kind == "triton":
        from .triton import sample_categorical as run
    elif kind == "naive":
        from .naive import sample_categorical as run
    else:
        from .cpu import sample_categorical as run
    return Draw(*run(logits, seed, own, step, temperature, uncond, cfg_scale, rows, mask_id, method, top_k, top_p))


__all__ = ["Draw", "sample_categorical"]
