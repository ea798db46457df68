"""Scheduler classes against the conventions of diffusers: configs, schedules, strength, dtypes, saving."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin

import diffsamp
from diffsamp.adapters.diffusers import scheduler_class

ROOT = Path(__file__).resolve().parents[2]
SOLVERS = sorted(diffsamp.registry.solvers())
VP = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
# No process of ours: consistency models, discrete tokens, cascades, and others with a clock of their own.
OTHER = (
    "CM", "Amused", "VQ", "UnCLIP", "Wuerstchen", "KarrasVe", "ScoreSde", "SCM", "BlockRefinement", "DiscreteDDIM",
    "EntropyBound", "RePaint", "Piflow", "Helios", "MiniMax", "FlowMap", "EulerAncestralRF", "LTX", "CosineDPM",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def quiet():
    threads, level = torch.get_num_threads(), diffusers.utils.logging.get_verbosity()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(level)
    torch.set_num_threads(threads)


def stock() -> list[str]:
    found = []
    for name in dir(diffusers):
        entry = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if not isinstance(entry, type) or not issubclass(entry, SchedulerMixin) or "_backends" in entry.__dict__:
            continue
        required = [p for p in inspect.signature(entry.__init__).parameters.values() if p.default is p.empty]
        if len(required) == 1 and not any(word in name for word in OTHER):
            found.append(name)
    return found


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loop(scheduler: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    for t in scheduler.timesteps:
        output = 0.3 * scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x


@pytest.mark.parametrize("name", stock())
def test_config_of_every_stock_scheduler_is_taken(name: str):
    source = getattr(diffusers, name)()
    ours = scheduler_class("unipc").from_config(source.config)
    flow = "FlowMatch" in name
    assert ours.config["process"] == ("flow" if flow else "edm" if name.startswith("EDM") else "vp")
    ours.set_timesteps(5)
    assert torch.isfinite(loop(ours, noise(1, 3, 4, 4))).all()
    if hasattr(source, "alphas_cumprod") and not flow:
        torch.testing.assert_close(ours.alphas_cumprod, source.alphas_cumprod.float(), rtol=1e-4, atol=1e-6)


def test_flow_values_of_other_names_are_kept():
    config = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    through = diffusers.UniPCMultistepScheduler.from_config(config)
    assert scheduler_class("unipc").from_config(through.config).config["process"] == "flow"
    assert scheduler_class("unipc").from_config(config).config["shift"] == 3.0
    wan = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    assert scheduler_class("unipc").from_config(wan.config).config["shift"] == 5.0
    heun = diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0)
    assert scheduler_class("unipc").from_config(heun.config).config["shift"] == 2.0


def test_values_that_a_pipeline_changed_are_kept():
    source = diffusers.DDIMScheduler(**VP)
    changed = dict(source.config) | {"steps_offset": 1}  # what Stable Diffusion pipelines do at construction
    assert "steps_offset" in changed["_use_default_values"]
    assert scheduler_class("ddim").from_config(changed).config["steps_offset"] == 1


def test_same_levels_as_flow_match_euler():
    for options, mu in (({"shift": 3.0}, None), ({"use_dynamic_shifting": True}, 0.7)):
        source = diffusers.FlowMatchEulerDiscreteScheduler(**options)
        ours = scheduler_class("unipc").from_config(source.config)
        for given in (None, np.linspace(1, 0.2, 5)):
            arguments = dict(mu=mu) | (dict(num_inference_steps=5) if given is None else dict(sigmas=given))
            source.set_timesteps(**arguments)
            ours.set_timesteps(**arguments)
            torch.testing.assert_close(ours.sigmas, source.sigmas, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(ours.timesteps, source.timesteps, rtol=1e-5, atol=2e-3)
            assert ours.timesteps.dtype == torch.float32


def test_sigmas_as_list_array_or_tensor_and_mu_where_it_is_not_wanted():
    ours = scheduler_class("unipc").from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    values = [1.0, 0.7, 0.3]
    seen = []
    for given in (values, np.array(values), torch.tensor(values, dtype=torch.float64)):
        ours.set_timesteps(sigmas=given, mu=0.9)
        seen.append(ours.sigmas.clone())
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="^mu: "):
        scheduler_class("unipc").from_config(dynamic.config).set_timesteps(4)


@pytest.mark.parametrize("bad", [dict(num_inference_steps=0), dict(sigmas=[0.2, 0.5]), dict(sigmas=[1.0, float("nan")]),
                                 dict(timesteps=[10, 20]), dict()])  # fmt: skip
def test_bad_schedules_are_refused_in_one_line(bad: dict[str, Any]):
    with pytest.raises(ValueError) as caught:
        scheduler_class("unipc")(**VP).set_timesteps(**bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_gives_the_denoised_sample(solver: str):
    scheduler = scheduler_class(solver)(prediction_type="sample", timestep_spacing="trailing", **VP)
    scheduler.set_timesteps(1)
    target, x = noise(2, 3, 4, 4, seed=1), noise(2, 3, 4, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(target, t, x).prev_sample
    torch.testing.assert_close(x, target, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_start_of_every_schedule_ends_at_a_known_sample(solver: str, kind: str):
    config = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config if kind == "flow" else dict(
        VP, prediction_type="epsilon", timestep_spacing="leading"
    )
    scheduler = scheduler_class(solver).from_config(config)
    target = noise(1, 3, 4, 4, seed=1)
    for steps in (1, 2, 3, 7):
        for start in range(steps):
            scheduler.set_timesteps(steps)
            begin = start * scheduler.order
            scheduler.set_begin_index(begin)
            times = scheduler.timesteps[begin:]
            x = scheduler.add_noise(target, noise(1, 3, 4, 4), times[:1])
            plan = scheduler._plan_from(begin)
            assert len(times) == len(plan)
            for t, row in zip(times, plan.rows, strict=True):
                level = row.level
                epsilon = (x - level.alpha * target) / level.sigma
                x = scheduler.step(epsilon - target if kind == "flow" else epsilon, t, x, return_dict=False)[0]
            torch.testing.assert_close(x, target, rtol=2e-3, atol=2e-3)


def test_add_noise_and_scale_noise_are_the_forward_process():
    x, e = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    flow = scheduler_class("unipc").from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    flow.set_timesteps(4)
    t, s = flow.timesteps[1:2], float(flow.sigmas[1])
    torch.testing.assert_close(flow.scale_noise(x, t, e), (1 - s) * x + s * e)
    torch.testing.assert_close(flow.add_noise(x, e, t), (1 - s) * x + s * e)
    source, ours = diffusers.DDIMScheduler(**VP), scheduler_class("unipc")(**VP)
    t = torch.tensor([10, 700])  # before set_timesteps, as in training
    torch.testing.assert_close(ours.add_noise(x, e, t), source.add_noise(x, e, t), rtol=1e-4, atol=1e-5)


def test_equal_timesteps_are_followed_by_index():
    """Stable Video Diffusion's times round to equal integers; a search by value would stop moving."""
    config = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0,
        use_karras_sigmas=True,
    ).config
    scheduler = scheduler_class("unipc").from_config(config)
    assert scheduler.config["process"] == "vp-continuous"
    scheduler.set_timesteps(30)
    x = noise(1, 4, 4, 4)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(0.1 * x, t.long() if i else t, x, return_dict=False)[0]
        assert scheduler.step_index == i + 1
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_in_half_out(dtype: torch.dtype):
    scheduler = scheduler_class("unipc")(**VP)
    scheduler.set_timesteps(4)
    x = noise(1, 3, 4, 4, dtype=dtype)
    result = scheduler.step(x, scheduler.timesteps[0], x)
    assert result.prev_sample.dtype == dtype and result.pred_original_sample.dtype == dtype
    assert isinstance(scheduler.step(x, scheduler.timesteps[1], x, return_dict=False), tuple)


def test_a_list_of_generators_makes_samples_independent_of_the_batch():
    def run(rows: list[int]) -> torch.Tensor:
        scheduler = scheduler_class("sde-dpmpp-2m")(**VP)
        scheduler.set_timesteps(5)
        x = torch.cat([noise(1, 3, 4, 4, seed=r) for r in rows])
        return loop(scheduler, x, generator=[torch.Generator().manual_seed(r) for r in rows])

    torch.testing.assert_close(run([4, 7])[1:], run([7]))


def test_own_seed_repeats_a_run_where_no_generator_is_passed():
    scheduler = scheduler_class("sde-dpmpp-2m")(seed=5, **VP)
    results = []
    for _ in range(2):
        scheduler.set_timesteps(5)
        results.append(loop(scheduler, noise(2, 3, 4, 4)))
    assert torch.equal(*results)


def test_deepcopy_goes_on_from_the_same_place():
    scheduler = scheduler_class("unipc")(**VP)
    scheduler.set_timesteps(5)
    x = scheduler.step(noise(1, 3, 4, 4), scheduler.timesteps[0], noise(1, 3, 4, 4, seed=1), return_dict=False)[0]
    other = copy.deepcopy(scheduler)
    a = scheduler.step(x, scheduler.timesteps[1], x, return_dict=False)[0]
    b = other.step(x, other.timesteps[1], x, return_dict=False)[0]
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["unipc", "dpmpp-2m", "dualfast"])
def test_a_shallow_copy_goes_on_by_itself(name: str):
    # Large enough for the compiled rows, which write over retired outputs.
    x, output = torch.randn(2, 1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    scheduler = diffsamp.scheduler_class(name)()
    scheduler.set_timesteps(8)
    for t in scheduler.timesteps[:4]:
        x = scheduler.step(output, t, x, return_dict=False)[0]
    twins = [copy.deepcopy(scheduler), copy.copy(scheduler), scheduler]
    ends = [x, x, x]
    twins[0]._returned = x
    for t in scheduler.timesteps[4:]:
        ends = [twin.step(output, t, end, return_dict=False)[0] for twin, end in zip(twins, ends, strict=True)]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_saved_alone_and_read_back(tmp_path: Path):
    scheduler = scheduler_class("unipc").from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    scheduler.save_pretrained(tmp_path)
    back = scheduler_class("unipc").from_pretrained(tmp_path)
    assert {k: v for k, v in back.config.items() if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
    stock_again = diffusers.FlowMatchEulerDiscreteScheduler.from_config(back.config)
    assert stock_again.config["shift"] == 3.0


def test_whole_pipeline_saved_and_read_in_a_fresh_process(tmp_path: Path):
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, in_channels=3, out_channels=3,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    scheduler = scheduler_class("dpmpp-2m")(**VP, use_karras_sigmas=True)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    code = (
        "import sys, diffsamp, diffusers; p = diffusers.DDPMPipeline.from_pretrained(sys.argv[1]); "
        "print(type(p.scheduler).__name__, p.scheduler.config['use_karras_sigmas'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert done.stdout.split() == ["DPMPP2MScheduler", "True"], done.stderr[-500:]


def test_clip_sample_wraps_the_prediction():
    scheduler = scheduler_class("dpmpp-2m")(clip_sample=True, prediction_type="sample", **VP)
    scheduler.set_timesteps(4)
    x = noise(1, 3, 4, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.full_like(x, 9.0), t, x).prev_sample
    torch.testing.assert_close(x, torch.ones_like(x))


def test_a_solver_of_ours_keeps_the_name_or_options_of_another_s_config():
    first = diffsamp.UniPCScheduler(solver_options={"order": 3}, beta_schedule="scaled_linear")
    second = diffsamp.DPMPP2MScheduler.from_config(first.config)
    assert second.solver.name == "dpmpp-2m" and second.config.beta_schedule == "scaled_linear"
    named = diffsamp.UniPCScheduler.from_config(second.config, solver="unipc:order=1")
    assert named.solver.name == "unipc:order=1"
    assert diffsamp.DPMPP2MScheduler.from_config(named.config).solver.name == "dpmpp-2m"
    assert diffsamp.UniPCScheduler.from_config(first.config).solver.options == (("order", 3),)
