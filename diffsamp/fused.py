"""A row in one pass over the tensors on a CPU, compiled by numba where that is installed (``diffsamp[fast]``).

Torch has no operation with more than two free coefficients, so a second-order row takes four or five passes there and
is bound by memory. Compiled, every register is read once and the two results are written once. The arithmetic is the
same term by term, in the dtype of the tensors, and the same for every element: it depends on neither batch nor shape.

``DIFFSAMP_BACKEND=torch`` turns it off. It runs on one thread: where torch has more, large tensors stay with torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

SMALLEST = 1024  # elements; below, the passes cost nothing
LARGEST_SHARED = 1 << 18  # elements; above, torch's threads win
_NONE = (0.0, 0.0, 0.0, 0.0)
_KINDS = {torch.float32: np.float32(0), torch.float64: np.float64(0)}


@cache
def available() -> bool:
    """numba can be imported (it is not, here) and ``DIFFSAMP_BACKEND`` does not name another backend."""
    wish = os.environ.get("DIFFSAMP_BACKEND") or "auto"
    return wish == "auto" and importlib.util.find_spec("numba") is not None


@cache
def _loops() -> Any:
    """The compiled loops, or None where numba is there but cannot run (broken, or with no folder to cache in)."""
    try:
        return importlib.import_module("diffsamp.loops")
    except (ImportError, RuntimeError, OSError) as error:
        warnings.warn(f"numba is installed but cannot be used, rows run by torch operations: {error}", stacklevel=2)
        return None


def wanted(x: torch.Tensor, raw: torch.Tensor) -> bool:
    """This pair of tensors can go through the compiled loops, and gains by it."""
    if not available() or not x.is_cpu or raw.shape != x.shape:
        return False
    size = x.numel()
    if size < SMALLEST or (size > LARGEST_SHARED and torch.get_num_threads() > 1):
        return False
    if (x.requires_grad or raw.requires_grad) and torch.is_grad_enabled():
        return False
    # Subclasses, and the wrappers of torch.func, have no memory of their own.
    plain = type(x) is torch.Tensor and type(raw) is torch.Tensor and x.dtype in (torch.float32, torch.float64)
    return plain and not torch.compiler.is_compiling() and not torch._C._functorch.peek_interpreter_stack()


def advance(
    x: torch.Tensor,
    raw: torch.Tensor,
    older: Sequence[tuple[torch.Tensor, float]],
    weights: tuple[float, float],
    convert: tuple[float, float] | None,
) -> tuple[torch.Tensor | None, torch.Tensor] | None:
    """One row.

    Args:
        x: the network's input.
        raw: its prediction, dtype and shape of ``x``.
        older: up to four more registers with their weights.
        weights: of ``x`` and ``raw`` in the next input.
        convert: (p, q) of the converted output p·x + q·raw, or None where it is not needed.

    Returns:
        (converted output or None, next input), or None where there are too many registers or numba cannot run.
    """
    loops, kind = _loops(), _KINDS[x.dtype]
    if loops is None or len(older) > 4:
        return None
    tensors = [x, raw, *(tensor for tensor, _ in older)]
    if not all(tensor.is_contiguous() for tensor in tensors):
        tensors = [tensor.contiguous() for tensor in tensors]
    made = torch.empty_like(tensors[0])
    width = 2 if len(older) <= 2 else 4
    # Unused places read x with weight 0: it is in the cache anyway.
    addresses = [t.data_ptr() for t in tensors]
    addresses += addresses[:1] * (width - len(older))
    numbers = [*weights, *(weight for _, weight in older), *_NONE[len(older) + 4 - width :]]
    if convert is None:
        run = loops.advance_2 if width == 2 else loops.advance_4
        run(kind, x.numel(), *addresses, made.data_ptr(), *numbers)
        return None, made
    output = torch.empty_like(made)
    run = loops.convert_2 if width == 2 else loops.convert_4
    run(kind, x.numel(), *addresses, output.data_ptr(), made.data_ptr(), *convert, *numbers)
    return output, made
