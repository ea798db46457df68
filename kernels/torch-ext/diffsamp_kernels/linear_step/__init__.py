"""Linear step: any row of a solver's plan, Y = C·H, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..dispatch import check_same, choose
from .cpu import combine
from .naive import linear_step as naive


def linear_step(
    registers: Sequence[torch.Tensor],
    table: torch.Tensor,
    step: int | torch.Tensor = 0,
    out: Sequence[torch.Tensor] | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """Apply row ``step`` of ``table`` to a bank of registers: out[m] = Σ_k table[step, m, k]·registers[k].

    Args:
        registers: 1 to 6 tensors of one shape and device; float32, bfloat16, float16, or float64 (torch and naive).
        table: (steps, M, K) float32 or float64 on the registers' device; M from 1 to 3, K registers.
        step: row, a number or an int64 tensor of one element on the device (a captured graph then reads it anew).
        out: M contiguous tensors to write to; must not share memory with ``registers``.
        backend: see :func:`diffsamp_kernels.choose`.

    Returns:
        M tensors with the dtype of the first register.

    Raises:
        ValueError: sizes that do not agree; BackendError where a named backend cannot run.
    """
    if not 1 <= len(registers) <= 6:
        raise ValueError(f"registers: got {len(registers)}; needs 1 to 6")
    first = registers[0]
    bank = [check_same(f"registers[{k}]", r, first) for k, r in enumerate(registers)]
    if table.ndim != 3 or table.shape[2] != len(bank) or not 1 <= table.shape[1] <= 3:
        raise ValueError(f"table: shape {tuple(table.shape)}; must be (steps, 1 to 3, {len(bank)})")
    kind = choose(backend, first)
    if out is not None:
        if len(out) != table.shape[1] or any(not o.is_contiguous() or o.shape != first.shape for o in out):
            raise ValueError(f"out: needs {table.shape[1]} contiguous tensors of shape {tuple(first.shape)}")
    if kind == "naive":
        made = naive(bank, table, step)
        return made if out is None else tuple(o.copy_(m) for o, m in zip(out, made, strict=True))
    if kind == "triton":
        from .triton import linear_step as launch

        return launch(bank, table, step, out)
    if kind == "compiled":
        from .compiled import linear_step as generated

        made = generated(bank, table, step)
        return made if out is None else tuple(o.copy_(m) for o, m in zip(out, made, strict=True))
    return combine(table[int(step)].tolist(), bank, out)


__all__ = ["combine", "linear_step"]
