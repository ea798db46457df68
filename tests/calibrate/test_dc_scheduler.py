"""DC-Solver as a diffusers scheduler: ratio 1 is the base bit for bit, and no way of running it breaks.

Nothing here is statistical.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import UniPCMultistepScheduler

import diffsamp
from diffsamp.adapters.diffusers import scheduler_class

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"process": "flow", "prediction_type": "flow_prediction", "shift": 3.0}
RATIOS = [1.0, 1.0, 1.3, 0.8, 1.2, 1.7]


def make(ratios=None, name: str = "dc", **changes):
    inner = changes.pop("options", {})
    text = "unipc:" + ",".join(f"{k}={v}" for k, v in inner.items()) if inner else "unipc"
    config = {**CONFIG, **changes}
    if name == "unipc":
        return scheduler_class("unipc")(**config, solver=text)
    return scheduler_class("dc")(
        **config, solver=f"dc({text})", solver_options=None if ratios is None else {"ratios": ratios}
    )


def network(x: torch.Tensor, t) -> torch.Tensor:
    return torch.tanh(x.double() * (1 + float(t) / 1000)).to(x.dtype)


def noise(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def run(scheduler, n: int = 6, dtype=torch.float32, begin: int = 0, **options) -> torch.Tensor:
    scheduler.set_timesteps(n, **options)
    if begin:
        scheduler.set_begin_index(begin)
    x = noise(dtype)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"order": 3}, {"variant": "bh1"}, {"disable_corrector": "[0]"}], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}, {"timestep_spacing": "trailing"}, FLOW],
    ids=["zero", "sigma_min", "trailing", "flow"],
)
def test_ratio_one_is_the_base_scheduler_bit_for_bit(changes, options, dtype):
    plain = run(make(name="unipc", options=options, **changes), dtype=dtype)
    assert torch.equal(run(make([1.0] * 6, options=options, **changes), dtype=dtype), plain)
    assert not torch.equal(run(make(RATIOS, options=options, **changes), dtype=dtype), plain)


def test_ratio_one_is_unipc_of_diffusers():
    stock = UniPCMultistepScheduler(**CONFIG, solver_order=2)
    a, b = run(stock, dtype=torch.float32), run(make([1.0] * 6), dtype=torch.float32)
    # Its coefficients are float32; ours are float64.
    assert (a - b).abs().max() < 1e-4 * a.abs().max()


@pytest.mark.parametrize("begin", [1, 2, 3, 4, 5])
def test_run_that_begins_inside_keeps_the_ratios_of_its_own_steps(begin):
    scheduler = make(RATIOS)
    inside = run(scheduler, begin=begin)
    assert torch.isfinite(inside).all()
    short = min(2, 6 - begin)
    expected = [1.0] * short + RATIOS[begin + short :]
    rows = scheduler._plan_from(begin).rows
    assert [row.rewrite is None for row in rows] == [ratio == 1.0 for ratio in expected]
    whole = scheduler.plan.rows[begin:]
    assert [a.rewrite for a in rows[short:]] == [a.rewrite for a in whole[short:]]


@pytest.mark.parametrize(("count", "n"), [(6, 8), (6, 4), (4, 6)])
def test_ratios_for_another_number_of_calls_are_not_used_and_say_so(count, n):
    with pytest.warns(UserWarning, match=f"has ratios for {count} network calls, this run has {n}"):
        other = run(make(RATIOS[:count]), n=n)
    assert torch.equal(other, run(make(name="unipc"), n=n))


def test_constants_for_another_number_of_calls_are_not_used_and_say_so():
    scheduler = scheduler_class("dualfast")(**CONFIG, solver_options={"c": [0.0, 0.1, 0.2, 0.3]})
    with pytest.warns(UserWarning, match="has c for 4 network calls, this run has 6"):
        other = run(scheduler)
    assert torch.equal(other, run(scheduler_class("dpmpp-2m")(**CONFIG)))
    scheduler.set_timesteps(4)
    assert scheduler._plan_from(2).nfe == 2


def test_saved_scheduler_comes_back_with_its_ratios(tmp_path):
    scheduler = make(RATIOS)
    scheduler.save_pretrained(tmp_path)
    again = diffsamp.DCSolverScheduler.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(again), run(scheduler))
    assert list(again.config["solver_options"]["ratios"]) == RATIOS
    copy = diffsamp.DCSolverScheduler.from_config(scheduler.config)
    assert torch.equal(run(copy), run(scheduler))


def test_two_runs_in_a_row_are_equal_also_after_another_one():
    scheduler = make(RATIOS)
    first = run(scheduler)
    assert torch.equal(run(scheduler), first)
    with pytest.warns(UserWarning):
        run(scheduler, n=9)
    run(scheduler, begin=3)
    assert torch.equal(run(scheduler), first)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-2), (torch.bfloat16, 2e-1)])
def test_half_precision_samples_run_and_stay_close(dtype, bound, order):
    made = run(make(RATIOS, options={"order": order}), dtype=dtype)
    exact = run(make(RATIOS, options={"order": order}), dtype=torch.float64)
    assert made.dtype == dtype
    assert (made.double() - exact).abs().mean() < bound * exact.abs().mean()
