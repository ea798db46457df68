"""A row in one pass over the tensors: on a CPU compiled by numba where that is installed (``diffsamp[fast]``), on a GPU
by the Triton kernel where ``DIFFSAMP_BACKEND=triton`` asks for it.

Torch has no operation with more than two free coefficients, so a second-order row takes four or five passes there and
is bound by memory. Compiled, every register is read once and the two results are written once. The arithmetic is the
same term by term, in the dtype of the tensors, and the same for every element: it depends on neither batch nor shape.

``DIFFSAMP_BACKEND=torch`` turns it off. The CPU loops run on one thread: where torch has more, large tensors stay with
torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch

from .errors import DiffsampError

_BACKENDS = ("auto", "numba", "triton", "torch", "compiled", "naive")
SMALLEST = 1024  # elements; below, the passes cost nothing
LARGEST_SHARED = 1 << 18  # elements; above, torch's threads win
_NONE = (0.0, 0.0, 0.0, 0.0)
_KINDS = {torch.float32: np.float32(0), torch.float64: np.float64(0)}


def _wish() -> str:
    """What ``DIFFSAMP_BACKEND`` asks for; rows are torch's where it names a form of the kernels only."""
    wish = os.environ.get("DIFFSAMP_BACKEND") or "auto"
    if wish not in _BACKENDS:
        raise DiffsampError(f"DIFFSAMP_BACKEND: got {wish!r}; accepted: {', '.join(_BACKENDS)}")
    return wish


@cache
def available() -> bool:
    """numba can be imported (it is not, here) and ``DIFFSAMP_BACKEND`` does not name another backend."""
    wish, there = _wish(), importlib.util.find_spec("numba") is not None
    if wish == "numba" and not there:
        raise DiffsampError("DIFFSAMP_BACKEND: numba is not installed (pip install 'diffsamp[fast]')")
    return there and wish in ("auto", "numba")


@cache
def _loops() -> Any:
    """The compiled loops, or None where numba is there but cannot run (broken, or with no folder to cache in)."""
    try:
        return importlib.import_module("diffsamp.loops")
    except (ImportError, RuntimeError, OSError) as error:
        warnings.warn(f"numba is installed but cannot be used, rows run by torch operations: {error}", stacklevel=2)
        return None


@cache
def on_gpu() -> bool:
    """``DIFFSAMP_BACKEND`` names Triton: rows then run by it, or raise."""
    return _wish() == "triton"


@lru_cache(maxsize=4096)
def _table(rows: tuple[tuple[float, ...], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients and row number where the kernel reads them; kept, so that only a plan's first run sends them."""
    numbers = torch.tensor([rows], dtype=torch.float32).to(device, non_blocking=True)
    return numbers, torch.zeros(1, dtype=torch.int64, device=device)


def wanted(x: torch.Tensor, raw: torch.Tensor) -> bool:
    """This pair of tensors can go through a compiled row, and gains by it."""
    # Subclasses, and the wrappers of torch.func, have no memory of their own.
    if type(x) is not torch.Tensor or type(raw) is not torch.Tensor or raw.shape != x.shape:
        return False
    dtype = x.dtype
    if on_gpu():
        if dtype is not torch.float32:
            return False
    elif not available() or not x.is_cpu or dtype not in _KINDS:
        return False
    else:
        size = x.numel()
        if size < SMALLEST or (size > LARGEST_SHARED and torch.get_num_threads() > 1):
            return False
    if (x.requires_grad or raw.requires_grad) and torch.is_grad_enabled():
        return False
    transformed = torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    return not transformed and not torch.compiler.is_compiling()


def advance(
    x: torch.Tensor,
    raw: torch.Tensor,
    others: Sequence[torch.Tensor],
    weights: tuple[float, ...],
    convert: tuple[float, float] | None,
    over: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor] | None:
    """One row.

    Args:
        x: the network's input.
        raw: its prediction, dtype and shape of ``x``.
        others: up to four more registers.
        weights: of ``x``, ``raw`` and the others in the next input.
        convert: (p, q) of the converted output p·x + q·raw, or None where it is not needed.
        over: the converted output may be written over the last of ``others``; it is then that tensor.

    Returns:
        (converted output or None, next input), or None where there are too many registers or numba cannot run.

    Raises:
        BackendError: ``DIFFSAMP_BACKEND=triton`` where Triton is missing or the tensors are not on a GPU.
    """
    count = len(others)
    if count > 4:
        return None
    if on_gpu():
        from diffsamp_kernels import linear_step

        rows = [weights]
        if convert is not None:
            rows.append((*convert, *([0.0] * count)))
        table, first = _table(tuple(rows), x.device)
        made = linear_step([x, raw, *others], table, first, backend="triton")
        return (None if convert is None else made[1]), made[0]
    loops, kind = _loops(), _KINDS[x.dtype]
    if loops is None:
        return None
    tensors = [x, raw, *others]
    for j, tensor in enumerate(tensors):
        if not tensor.is_contiguous():
            tensors[j] = tensor.contiguous()
    x = tensors[0]
    addresses = [tensor.data_ptr() for tensor in tensors]
    width = 2 if count <= 2 else 4
    if count != width:
        # Unused places read x with weight 0: it is in the cache anyway.
        addresses += addresses[:1] * (width - count)
        weights = weights + _NONE[: width - count]
    made = torch.empty_like(x)
    if over and convert is not None and 0 < count < 4 and tensors[-1] is others[-1]:
        run = (loops.replace_1, loops.replace_2, loops.replace_3)[count - 1]
        run(kind, x.numel(), *addresses[: count + 2], made.data_ptr(), *convert, *weights[: count + 2])
        return tensors[-1], made
    if convert is None:
        run = loops.advance_2 if width == 2 else loops.advance_4
        run(kind, x.numel(), *addresses, made.data_ptr(), *weights)
        return None, made
    output = torch.empty_like(x)
    run = loops.convert_2 if width == 2 else loops.convert_4
    run(kind, x.numel(), *addresses, output.data_ptr(), made.data_ptr(), *convert, *weights)
    return output, made
