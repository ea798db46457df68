"""Guided step: guidance, conversion of the prediction and a row of the plan, in one or two passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..dispatch import check_same, choose
from .coefficients import COLUMNS, guided_coefficients

GUIDANCES = ("cfg", "rescale", "apg")


class Guided(NamedTuple):
    """What a guided step returns; ``second`` and ``momentum`` are None where they were not asked for."""

    next_input: torch.Tensor
    x0: torch.Tensor
    momentum: torch.Tensor | None
    second: torch.Tensor | None


def guided_step(
    cond: torch.Tensor,
    uncond: torch.Tensor,
    x: torch.Tensor,
    history: Sequence[torch.Tensor] = (),
    *,
    coef: torch.Tensor,
    step: int | torch.Tensor = 0,
    guidance: str = "cfg",
    momentum: torch.Tensor | None = None,
    second: bool = False,
    backend: str | None = None,
) -> Guided:
    """One guided solver step; guidance acts on x0, whatever the network predicts.

    With c, u the two predictions as x0 and d = c - u (+ momentum·buffer): "cfg" is c + (w-1)d; "rescale" scales that to
    the standard deviation of c (arXiv:2305.08891, equation 16); "apg" is Algorithm 1 of arXiv:2410.02416.

    Args:
        cond, uncond: the network's raw predictions, (batch, ...).
        x: what the network was evaluated at. history: up to 3 older registers h1, h2, h3.
        coef: (steps, 18) float64 from :func:`guided_coefficients`, on the device of ``cond``. step: its row.
        momentum: APG's buffer (zeros at the start), or None for none; the new one is returned, this one is kept.
        second: also compute the second row.

    Raises:
        ValueError: unknown guidance, momentum outside of APG, or sizes that do not agree.
    """
    if guidance not in GUIDANCES:
        raise ValueError(f"guidance={guidance!r} is not known; accepted: {', '.join(GUIDANCES)}")
    if momentum is not None and guidance != "apg":
        raise ValueError(f"momentum: only 'apg' has it, got guidance={guidance!r}")
    if coef.ndim != 2 or coef.shape[1] != COLUMNS or coef.dtype != torch.float64:
        raise ValueError(f"coef: {coef.dtype} of shape {tuple(coef.shape)}; must be float64 (steps, {COLUMNS})")
    if len(history) > 3:
        raise ValueError(f"history: {len(history)} registers; at most 3")
    cond = cond.contiguous()
    uncond, x = check_same("uncond", uncond, cond), check_same("x", x, cond)
    bank = tuple(check_same(f"history[{i}]", h, cond) for i, h in enumerate(history))
    if momentum is not None:
        momentum = check_same("momentum", momentum, cond)
    kind = choose(backend, cond)
    if kind == "triton":
        from .triton import guided_step as run
    elif kind == "naive":
        from .naive import guided_step as run
    elif kind == "compiled":
        from .compiled import guided_step as run
    else:
        from .cpu import guided_step as run
    return Guided(*run(cond, uncond, x, bank, coef, step, guidance, momentum, second))


__all__ = ["Guided", "guided_coefficients", "guided_step"]
