"""The engine: equal to the float64 definition, explicit state, per-sample noise, safe to run concurrently."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import diffsamp
from diffsamp import engine, rng
from diffsamp.errors import DiffsampError

torch.set_num_threads(1)
PROCESS = diffsamp.Process.vp("scaled_linear", 0.00085, 0.012)
BASES = sorted(name for name, info in diffsamp.solvers().items() if not info.transform)


def _plan(name, steps=7, **options):
    return diffsamp.solver(name, **options)(PROCESS, diffsamp.grid("trailing", PROCESS, steps))


def _network(x, level):
    return torch.tanh(x + 0.001 * float(level)) + 0.1 * x.flip(-1)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", BASES)
def test_tensors_do_not_follow_the_table(name, prediction):
    plan = _plan(name)
    x = rng.normal([3, 4], (2, 5), dtype=torch.float64)
    noise = {i: rng.normal([3, 4], (2, 5), i, dtype=torch.float64) for i in range(plan.nfe)}
    found = diffsamp.sample(plan, _network, x, prediction=prediction, seeds=[3, 4])

    def output(i, row, current):
        p, q = plan.conversion(i, prediction)
        return p * current + q * _network(torch.from_numpy(current), row.level).numpy()

    expected = plan.simulate(x.numpy(), output, lambda i: noise[i].numpy())
    assert np.allclose(found.numpy(), expected, rtol=1e-6 if plan.stochastic else 1e-10, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 3, 8, 16])
def test_a_sample_depends_on_its_batch(batch):
    plan = _plan("sde-dpmpp-2m", 5)
    seeds = list(range(100, 116))
    whole = rng.normal(seeds, (3, 4, 4))
    parts = [rng.normal(seeds[i : i + batch], (3, 4, 4)) for i in range(0, 16, batch)]
    assert torch.equal(torch.cat(parts), whole)
    together = diffsamp.sample(plan, _network, whole, seeds=seeds)
    apart = [
        diffsamp.sample(plan, _network, part, seeds=seeds[i * batch : i * batch + len(part)])
        for i, part in enumerate(parts)
    ]
    assert torch.allclose(torch.cat(apart), together, atol=1e-5)


def test_two_threads_on_one_scheduler_get_each_other_s_pictures():
    scheduler = diffsamp.scheduler_class("unipc")(beta_schedule="scaled_linear")
    scheduler.set_timesteps(9)
    starts = [rng.normal([k], (3, 16, 16)) for k in range(4)]
    alone = [diffsamp.sample(scheduler.plan, _network, x, prediction="epsilon") for x in starts]
    found = [None] * 4

    def work(k):
        for _ in range(5):
            found[k] = diffsamp.sample(scheduler.plan, _network, starts[k], prediction="epsilon")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_the_start_or_the_state_is_changed_by_a_step():
    plan = _plan("unipc", 4)
    x = rng.normal([1], (2, 3))
    kept = x.clone()
    state = engine.init(plan, x)
    first = engine.step(plan, state, _network(state.input, plan.rows[0].level))
    again = engine.step(plan, state, _network(state.input, plan.rows[0].level))
    assert torch.equal(x, kept) and torch.equal(first.input, again.input) and state.index == 0 and first.index == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_are_computed_in_half_precision(dtype):
    plan = _plan("dpmpp-2m", 6)
    x = rng.normal([1], (64,), dtype=dtype)
    exact = diffsamp.sample(plan, lambda y, level: torch.tanh(y.float()), x.float())
    found = diffsamp.sample(plan, lambda y, level: torch.tanh(y.float()), x)
    assert found.dtype == dtype and (found.float() - exact).abs().max() < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: diffsamp.sample(_plan("ddpm", 3), _network, torch.zeros(2, 3), seeds=[1]), "seeds: got 1"),
        (lambda: diffsamp.sample(_plan("ddim", 3), _network, torch.zeros(2, 3, dtype=torch.int64)), "x: has dtype"),
        (lambda: diffsamp.sample(_plan("ddim", 3), lambda x, t: x * float("nan"), torch.zeros(2, 3), check_finite=True), "step 0"),  # noqa: E501
        (lambda: engine.step(_plan("ddpm", 3), engine.init(_plan("ddpm", 3), torch.zeros(1, 3)), torch.zeros(1, 3)), "noise"),  # noqa: E501
        (lambda: rng.normal([-1], (2,)), "seed"),
    ],
)  # fmt: skip
def test_bad_input_is_accepted_or_not_named(call, word):
    with pytest.raises(DiffsampError, match=word):
        call()


def test_a_step_waits_for_the_device():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    plan = _plan("unipc", 6)
    state = engine.init(plan, rng.normal([1], (4, 8, 8)))
    for row in plan.rows:
        output = _network(state.input, row.level)
        with Watch():
            state = engine.step(plan, state, output, prediction="epsilon")
    assert seen and not [name for name in seen if "_local_scalar" in name or "nonzero" in name or "copy" in name]
