"""Which implementation runs: by the device of the tensor, the ``backend`` argument and ``DIFFSAMP_BACKEND``.

``auto`` takes Triton for GPU tensors where it is installed and torch otherwise. A backend that is named runs or raises.
``compiled`` is torch.compile of the linear and the guided step; ``auto`` never takes it, because the first call of each
shape takes seconds. Triton is not imported here, only looked for.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import cache

import torch

BACKENDS = ("auto", "triton", "torch", "compiled", "naive")


class BackendError(ValueError):
    """The backend that was asked for cannot run here."""


def interpreting() -> bool:
    """Triton's interpreter is on: it must be set before Triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_present() -> bool:
    """Triton can be imported (Linux only, so far)."""
    return importlib.util.find_spec("triton") is not None


@cache
def compiler_missing(device: str, cxx: str | None, path: str | None) -> str | None:
    """What torch.compile lacks for tensors on a kind of device, or None; ``cxx`` and ``path`` are the environment's."""
    if device == "cuda":
        return None if triton_present() else "the package triton is not installed (pip install triton, on Linux)"
    names = [cxx] if cxx else ["g++", "clang++", "c++", "cl"]
    if any(shutil.which(name, path=path) for name in names):
        return None
    return f"there is no C++ compiler (looked for {', '.join(names)})"


def choose(backend: str | None, tensor: torch.Tensor, compiles: bool = True) -> str:
    """``triton``, ``torch``, ``compiled`` or ``naive``.

    Args:
        backend: one of ``BACKENDS``; None reads ``DIFFSAMP_BACKEND``, then ``auto``.
        tensor: the operation's main input; only its device counts.
        compiles: the operation has a ``compiled`` form.

    Raises:
        BackendError: an unknown name; Triton asked for where it is missing or the tensor is not on a GPU; ``compiled``
            asked for where there is no compiler or the operation has no such form.
    """
    # "numba" in the environment is for the solvers' own loop; it says nothing about the operations here.
    wish = backend or os.environ.get("DIFFSAMP_BACKEND", "").replace("numba", "auto") or "auto"
    if wish not in BACKENDS:
        raise BackendError(f"backend={wish!r} is not known; accepted: {', '.join(BACKENDS)}")
    if wish == "auto":
        return "triton" if tensor.is_cuda and triton_present() else "torch"
    if wish == "compiled":
        missing = "this operation has no such form; use backend='torch'"
        if compiles:
            missing = compiler_missing(tensor.device.type, os.environ.get("CXX") or None, os.environ.get("PATH"))
        if missing is not None:
            raise BackendError(f"backend='compiled': {missing}")
    if wish == "triton":
        if not triton_present():
            raise BackendError("backend='triton': the package triton is not installed (pip install triton, on Linux)")
        if not tensor.is_cuda and not interpreting():
            raise BackendError(
                f"backend='triton': the tensor is on {tensor.device}; needs a GPU, or TRITON_INTERPRET=1 for tests"
            )
    return wish


def check_same(name: str, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``tensor``, contiguous; ValueError unless shape and device are those of ``like``."""
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)} on {tensor.device}; must be {tuple(like.shape)} on {like.device}"
        )
    return tensor.contiguous()
