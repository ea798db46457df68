"""The guided step of the kernels against the guidance and the engine, through whole runs."""

from __future__ import annotations

import pytest
import torch

import diffsamp
from diffsamp import engine
from diffsamp.guidance import APG, CFG, RescaledCFG, fused
from diffsamp.guidance.step import guided_step

STEPS = 6


def run(method, name, prediction):
    generator = torch.Generator().manual_seed(0)
    process = diffsamp.Process.vp()
    plan = diffsamp.solver(name)(process, diffsamp.grid("linspace", process, STEPS))
    state, memory = engine.init(plan, torch.randn(2, 3, 8, 8, generator=generator)), method.init(2, STEPS)
    while state.index < len(plan.rows):
        cond, uncond = (0.5 * state.input + torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2))
        state, memory = guided_step(plan, state, method, memory, cond, uncond, prediction=prediction)
    return state, memory


@pytest.mark.parametrize("method", [CFG(3.0), APG(3.0, eta=0.2, norm=5.0), APG(3.0, momentum=0.0)])
@pytest.mark.parametrize("name", ["euler", "dpmpp-2m", "unipc"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_kernel_gives_another_run(method, name, prediction, monkeypatch):
    calls = []
    monkeypatch.setattr(fused, "kernel", lambda *a, _run=fused.kernel, **k: calls.append(1) or _run(*a, **k))
    monkeypatch.setenv("DIFFSAMP_BACKEND", "torch")
    want, wanted_memory = run(method, name, prediction)
    assert not calls
    monkeypatch.setenv("DIFFSAMP_BACKEND", "naive")
    got, memory = run(method, name, prediction)
    assert len(calls) == STEPS, "the kernel was not taken in every row"
    scale = want.input.abs().max()
    assert (got.input - want.input).abs().max() < 2e-5 * scale and (got.base - want.base).abs().max() < 2e-5 * scale
    assert memory.step == STEPS and (memory.buffer is None) == (wanted_memory.buffer is None)


def test_other_guidance_is_given_to_the_kernel(monkeypatch):
    monkeypatch.setattr(fused, "kernel", lambda *a, **k: pytest.fail("the kernel does not know this guidance"))
    monkeypatch.setenv("DIFFSAMP_BACKEND", "naive")
    for method in (RescaledCFG(3.0), APG(3.0, norm=5.0, norm_kind="rms")):
        assert run(method, "unipc", "epsilon")[0].input.isfinite().all()
