"""The compiled one-pass rows against torch's own operations, and when they must stay out of the way."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffsamp
from diffsamp import engine, fused

SOLVERS = sorted(name for name, info in diffsamp.solvers().items() if not info.transform)


def run(plan, x, prediction, watch=None):
    """A run with a fixed smooth network; ``watch`` collects every state."""

    def network(value, level):
        return torch.tanh(value * 0.7 + 0.1) * 0.9

    return diffsamp.sample(
        plan, network, x, prediction=prediction, seeds=range(x.shape[0]),
        callback=None if watch is None else lambda i, state: watch.append(state),
    )  # fmt: skip


def test_numba_is_there_so_that_these_tests_test_something():
    assert fused.available()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_compiled_run_equals_the_run_by_torch_operations(name, prediction):
    process = diffsamp.Process.vp()
    plan = diffsamp.solver(name)(process, diffsamp.grid("karras", process, 9))
    for dtype, tolerance in ((torch.float32, 3e-5), (torch.float64, 1e-12)):
        x = torch.randn(2, 3, 19, 19, dtype=dtype, generator=torch.Generator().manual_seed(0))
        compiled_states: list = []
        made = run(plan, x, prediction, compiled_states)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "available", lambda: False)
            states: list = []
            expected = run(plan, x, prediction, states)
        scale = max(float(expected.abs().max()), 1.0)
        assert float((made - expected).abs().max()) <= tolerance * scale
        for ours, theirs in zip(compiled_states, states, strict=True):
            scale = max(float(theirs.base.abs().max()), 1.0)
            assert float((ours.base - theirs.base).abs().max()) <= 10 * tolerance * scale
            assert len(ours.history) == len(theirs.history)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 700), registers=st.integers(0, 4), double=st.booleans(), convert=st.booleans(),
    strided=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_one_row_equals_its_sum_for_every_size_stride_and_number_of_registers(
    size, registers, double, convert, strided, seed
):
    source = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    wide = torch.randn(registers + 2, size, 2, dtype=dtype, generator=source)
    bank = [row[:, 0] if strided else row[:, 0].contiguous() for row in wide]
    weights = np.random.default_rng(seed).normal(size=registers + 4)
    before = [value.clone() for value in bank]
    output, following = fused.advance(
        bank[0], bank[1], bank[2:], (*weights[:2].tolist(), *weights[4:].tolist()),
        (weights[2], weights[3]) if convert else None,
    )  # fmt: skip
    exact = sum((value.double() * w for value, w in zip(bank, [*weights[:2], *weights[4:]], strict=True)))
    tolerance = 1e-14 if double else 4e-6
    assert torch.allclose(following.double(), exact, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(value, kept) for value, kept in zip(bank, before, strict=True)), "a register was written to"
    if convert:
        exact = bank[0].double() * weights[2] + bank[1].double() * weights[3]
        assert torch.allclose(output.double(), exact, rtol=tolerance, atol=tolerance)
    else:
        assert output is None


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_donated_state_gives_the_same_run_and_no_tensor_of_the_caller_is_written_to(name, prediction):
    process = diffsamp.Process.vp()
    plan = diffsamp.solver(name)(process, diffsamp.grid("karras", process, 9))
    start = torch.randn(2, 3, 19, 19, generator=torch.Generator().manual_seed(0))
    noise = engine.noise_source(plan, start, [0, 1], None)
    ends, seen = [], []
    for donate in (False, True):
        state = engine.init(plan, start)
        while state.index < len(plan.rows):
            i, raw = state.index, torch.tanh(state.input * 0.7 + 0.1) * 0.9
            seen += [(raw, raw.clone()), (state.input, state.input.clone())]
            drawn = noise(i) if plan.rows[i].uses_noise else None
            state = engine.step(plan, state, raw, drawn, prediction=prediction, donate=donate)
        ends.append(state)
    assert all(torch.equal(value, before) for value, before in seen)
    scale = max(float(ends[0].input.abs().max()), 1.0)
    assert float((ends[0].input - ends[1].input).abs().max()) <= 1e-6 * scale
    assert float((ends[0].base - ends[1].base).abs().max()) <= 1e-5 * scale


def test_the_main_solvers_do_write_over_what_they_retire():
    process = diffsamp.Process.vp()
    for name in ("unipc", "dpmpp-2m", "dpmpp-3m", "deis"):
        plan = diffsamp.solver(name)(process, diffsamp.grid("karras", process, 12))
        state = engine.init(plan, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        reused = 0
        while state.index < len(plan.rows):
            before = {m.data_ptr() for m in state.history}
            state = engine.step(plan, state, torch.tanh(state.input), prediction="v_prediction", donate=True)
            reused += state.history[0].data_ptr() in before
        assert reused >= 6, (name, reused)


def test_a_sample_does_not_depend_on_its_batch_bit_for_bit():
    process = diffsamp.Process.vp()
    plan = diffsamp.solver("unipc")(process, diffsamp.grid("karras", process, 6))
    x = torch.randn(8, 3, 23, 23, generator=torch.Generator().manual_seed(1))
    whole = run(plan, x, "epsilon")
    assert all(torch.equal(run(plan, x[i : i + 1], "epsilon")[0], whole[i]) for i in range(8))


def test_gradients_go_through_torch():
    process = diffsamp.Process.vp()
    plan = diffsamp.solver("dpmpp-2m")(process, diffsamp.grid("karras", process, 4))
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    run(plan, x, "sample").sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and float(x.grad.abs().max()) > 0


def test_transforms_of_torch_func_are_left_to_torch():
    process = diffsamp.Process.vp()
    plan = diffsamp.solver("dpmpp-2m")(process, diffsamp.grid("karras", process, 4))

    def end(x):
        state = engine.init(plan, x)
        for _ in plan.rows:
            state = engine.step(plan, state, torch.tanh(state.input), prediction="sample")
        return state.input

    x = torch.randn(3, 1, 3, 32, 32)
    assert torch.allclose(torch.func.vmap(end)(x), torch.stack([end(value) for value in x]), atol=1e-5)
    _, tangent = torch.func.jvp(end, (x[0],), (torch.ones_like(x[0]),))
    assert float(tangent.abs().max()) > 0


def test_the_environment_can_turn_it_off(monkeypatch):
    x = torch.randn(4, 32, 32)
    assert fused.wanted(x, x)
    fused.available.cache_clear()
    monkeypatch.setenv("DIFFSAMP_BACKEND", "torch")
    assert not fused.on_gpu() and not fused.wanted(x, x)
    monkeypatch.undo()
    fused.available.cache_clear()
    assert fused.wanted(x, x)


def test_an_unknown_backend_in_the_environment_is_refused_and_numba_means_the_compiled_rows(monkeypatch):
    x = torch.randn(4, 32, 32)
    for wish, wanted in (("numba", True), ("auto", True), ("naive", False), ("compiled", False)):
        fused.available.cache_clear()
        fused.on_gpu.cache_clear()
        monkeypatch.setenv("DIFFSAMP_BACKEND", wish)
        assert fused.wanted(x, x) is wanted
    fused.available.cache_clear()
    fused.on_gpu.cache_clear()
    monkeypatch.setenv("DIFFSAMP_BACKEND", "cuda")
    with pytest.raises(diffsamp.DiffsampError, match="DIFFSAMP_BACKEND: got 'cuda'; accepted: auto, numba, triton"):
        fused.wanted(x, x)
    monkeypatch.undo()
    assert fused.wanted(x, x)


def test_tensors_that_gain_nothing_or_have_another_layout_stay_with_torch(monkeypatch):
    x = torch.randn(4, 32, 32)
    assert not fused.wanted(x[:, :4, :4], x[:, :4, :4])
    assert not fused.wanted(x.half(), x.half())
    assert not fused.wanted(x, x[:2])
    assert not fused.wanted(x.to("meta"), x.to("meta"))
    large = torch.empty(fused.LARGEST_SHARED + 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert not fused.wanted(large, large)


def test_a_numba_that_cannot_run_is_a_warning_and_torch_takes_over(monkeypatch):
    real = fused.importlib.import_module

    def broken(name, *rest):
        if name == "diffsamp.loops":
            raise RuntimeError("cannot cache function: no locator available")
        return real(name, *rest)

    process = diffsamp.Process.vp()
    plan = diffsamp.solver("unipc")(process, diffsamp.grid("karras", process, 4))
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = run(plan, x, "epsilon")
    fused._loops.cache_clear()
    monkeypatch.setattr(fused.importlib, "import_module", broken)
    with pytest.warns(UserWarning, match="no locator available"):
        made = run(plan, x, "epsilon")
    fused._loops.cache_clear()
    assert float((made - expected).abs().max()) <= 3e-5 * float(expected.abs().max())


RUN_BY_TRITON = """
import torch, diffsamp
from diffsamp import fused
calls = []
import diffsamp_kernels
real = diffsamp_kernels.linear_step
def counted(*arguments, **options):
    calls.append(len(arguments[0]))
    return real(*arguments, **options)
diffsamp_kernels.linear_step = counted
process = diffsamp.Process.vp()
for name, order in (("unipc", 2), ("dpmpp-2m", 2), ("euler-ancestral", 1)):
    plan = diffsamp.solver(name)(process, diffsamp.grid("karras", process, 5))
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    network = lambda value, level: torch.tanh(0.7 * value + 0.1)
    ends = []
    for triton in (True, False):
        fused.on_gpu = lambda: triton
        fused.available = lambda: False
        ends.append(diffsamp.sample(plan, network, x, prediction="epsilon", seeds=[0, 1]))
    assert len(calls) >= 4, (name, calls)
    calls.clear()
    gap = float((ends[0] - ends[1]).abs().max() / ends[1].abs().max())
    assert gap < 3e-5, (name, gap)
print("equal")
"""


def test_rows_by_the_triton_kernel_equal_rows_by_torch_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "DIFFSAMP_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", RUN_BY_TRITON], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stdout + done.stderr


def test_triton_asked_for_on_a_cpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(fused, "on_gpu", lambda: True)
    process = diffsamp.Process.vp()
    plan = diffsamp.solver("unipc")(process, diffsamp.grid("karras", process, 4))
    with pytest.raises(ValueError, match="triton"):
        run(plan, torch.randn(1, 3, 32, 32), "epsilon")
