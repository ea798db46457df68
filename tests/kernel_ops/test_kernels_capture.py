"""A launch that a CUDA graph can capture: nothing is read back to the host and nothing is copied from it.

There is no GPU here, so the launches are recorded in place of run; every operation of torch around them is seen by a
dispatch mode. What the kernels read at run time is tested in the interpreter (``counter_on_the_device``).
"""

from __future__ import annotations

import importlib

import pytest
import torch
from diffsamp_kernels import guided_coefficients
from torch.utils._python_dispatch import TorchDispatchMode

# A read to the host, a tensor made from Python numbers (a copy from the host), and copies in general.
FORBIDDEN = {"_local_scalar_dense", "lift_fresh", "_to_copy", "copy_", "nonzero", "item", "is_nonzero", "equal"}


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Launches:
    """Stands in for a kernel: ``kernel[grid](...)`` notes its arguments."""

    def __init__(self):
        self.arguments = []

    def __getitem__(self, grid):
        assert all(isinstance(n, int) and n > 0 for n in grid)
        return lambda *arguments, **options: self.arguments.append(arguments)


def replaced(monkeypatch, module, *names):
    launches = Launches()
    for name in names:
        monkeypatch.setattr(module, name, launches)
    return launches


def test_linear_step_reads_its_counter_on_the_host(monkeypatch):
    module = importlib.import_module("diffsamp_kernels.linear_step.triton")
    launches = replaced(monkeypatch, module, "linear_step_kernel")
    bank, table, step = [torch.zeros(5000) for _ in range(3)], torch.zeros(7, 1, 3), torch.zeros(1, dtype=torch.int64)
    out = [torch.empty(5000)]
    with Seen() as seen:
        assert module.linear_step(bank, table, step, out)[0] is out[0]
    assert not seen.names, "a step into given outputs is one launch and no operation besides"
    (arguments,) = launches.arguments
    assert (
        any(a is step for a in arguments) and any(a is table for a in arguments) and any(a is out[0] for a in arguments)
    )
    assert not any(isinstance(a, float) for a in arguments), "a coefficient was baked into the launch"


@pytest.mark.parametrize("guidance", ["cfg", "rescale", "apg"])
def test_guided_step_reads_its_counter_on_the_host(guidance, monkeypatch):
    module = importlib.import_module("diffsamp_kernels.guided_step.triton")
    launches = replaced(monkeypatch, module, "guide_reduce_kernel", "guide_apply_kernel")
    c, u, x = (torch.zeros(2, 5000) for _ in range(3))
    coef, step = guided_coefficients((1.0, 1.0), scale=3.0)[None], torch.zeros(1, dtype=torch.int64)
    with Seen() as seen:
        module.guided_step(c, u, x, (), coef, step, guidance, None, True)
    assert not FORBIDDEN & set(seen.names)
    assert len(launches.arguments) == (1 if guidance == "cfg" else 2)
    for arguments in launches.arguments:
        assert any(a is step for a in arguments) and any(a is coef for a in arguments)
        assert not any(isinstance(a, float) for a in arguments)


@pytest.mark.parametrize("method", ["tile", "race"])
@pytest.mark.parametrize("step", [3, torch.tensor([3])])
def test_draw_copies_numbers_to_the_device(method, step, monkeypatch):
    module = importlib.import_module("diffsamp_kernels.categorical.triton")
    names = [n for n in vars(module) if n.endswith("_kernel")]
    assert len(names) == 5
    launches = replaced(monkeypatch, module, *names)
    keys = torch.arange(4)
    with Seen() as seen:
        module.sample_categorical(torch.zeros(4, 9000), 1, keys, step, 0.7, None, None, None, 2, method, 5, 0.9)
    assert not FORBIDDEN & set(seen.names)
    assert len(launches.arguments) == 3
    assert not any(isinstance(a, float) for arguments in launches.arguments for a in arguments)
