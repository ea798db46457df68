"""Teleportation in diffusers pipelines whose networks are exact denoisers of Gaussian data: the end of a run is known.

The network of a tiny pipeline is replaced by the exact one, so a run that starts in the wrong place, at the wrong level
or with a history ends somewhere else. Nothing here is statistical.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny_pipelines import FAMILIES, build

import diffsamp
from diffsamp import engine
from diffsamp.adapters.teleport import attach
from diffsamp.errors import DiffsampError
from diffsamp.teleport import Statistics, gaussian_denoiser, gaussian_map, teleport

STEPS = 24


def statistics(shape: tuple[int, ...], start: float = 3.0, shift: float = 0.0, key: dict | None = None) -> Statistics:
    d, generator = math.prod(shape), np.random.default_rng(0)
    basis = np.linalg.qr(generator.normal(size=(d, 6)))[0]
    mean = generator.normal(size=d) * 0.5 + shift * np.sin(np.arange(d))
    return Statistics(
        torch.tensor(mean), torch.tensor(basis), torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.2]), 0.05, shape, 1000,
        key=key or {}, start=start,
    )  # fmt: skip


def raw(scheduler, given: torch.Tensor, t: float, stats: Statistics) -> torch.Tensor:
    """The exact network's output for its input: noise, velocity or preconditioned output, as the scheduler has it."""
    process, kind = scheduler.process, scheduler.config["process"]
    level = process.level(math.exp(4 * t)) if kind == "edm" else process.level_at(t)
    x = given.double()
    if kind == "edm":
        x = x * (level.sigma**2 + scheduler.config["sigma_data"] ** 2) ** 0.5
    p, q = process.x0_coefficients(level, scheduler.prediction)
    return (gaussian_denoiser(stats, x, level) - p * x) / q


@contextmanager
def exact_network(tiny, *statistics: Statistics):
    """Replaces the network's forward; with two statistics the first half of a batch is unconditional."""
    calls, module = [], tiny.denoiser
    forward = module.forward

    def replaced(*given, **named):
        x = given[0] if given else named.get("sample", named.get("hidden_states"))
        t = given[1] if len(given) > 1 else named["timestep"]
        t = float(t.flatten()[0]) if isinstance(t, torch.Tensor) else float(t)
        parts = x.chunk(len(statistics))
        made = [raw(tiny.pipe.scheduler, part, t, one) for part, one in zip(parts, statistics, strict=True)]
        calls.append(t)
        output = torch.cat(made).to(x.dtype)
        return (output,) if named.get("return_dict") is False else type("Output", (), {"sample": output})()

    module.forward = replaced
    try:
        yield calls
    finally:
        module.forward = forward
        diffsamp.restore(tiny.pipe)


def start_noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)).double()


def as_latents(images: torch.Tensor) -> torch.Tensor:
    """Numpy pictures of a pixel pipeline, (n, h, w, c) in [0, 1], as what the scheduler ended with."""
    return images.permute(0, 3, 1, 2).double() * 2 - 1


def end_of(plan, stats: Statistics, start: torch.Tensor) -> torch.Tensor:
    """What the plan makes of ``start`` with the exact denoiser of ``stats``, in float64."""
    return engine.sample(plan, lambda x, level: gaussian_denoiser(stats, x, level), start)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_unconditional_pipeline_starts_at_the_level_of_the_statistics_with_no_call_above_it(name):
    tiny, shape = build(name), (3, 8, 8)
    large = statistics(shape)
    # Small data, so that the pipeline's clamp of pictures to [0, 1] changes nothing.
    stats = Statistics(large.mean * 0.2, large.basis, large.eigenvalues * 0.02, 0.001, shape, 1000, start=0.4)
    with exact_network(tiny, stats) as calls:
        diffsamp.use(tiny.pipe, "unipc", scheduler_options={"clip_sample": False})
        tiny.run(STEPS)
        whole = len(calls)
        calls.clear()
        diffsamp.use(tiny.pipe, teleport=stats)
        ours = as_latents(tiny.run(STEPS))
        plan = tiny.pipe.scheduler.plan
    assert whole == STEPS and len(calls) == plan.nfe < 0.8 * STEPS
    assert plan.first_level.noise_to_signal >= 0.4 > plan.rows[1].level.noise_to_signal
    top = plan.process.level_at(999)
    x = start_noise(shape) * top.sigma
    exact = end_of(plan, stats, gaussian_map(stats, x, top, plan.first_level))
    white = end_of(plan, stats, x)
    assert (ours - exact).abs().max() < 1e-5
    assert (white - exact).abs().max() > 0.05


def guided(u: Statistics, c: Statistics, scale: float) -> Statistics:
    """Two Gaussians of one covariance under guidance are a Gaussian with the guided mean."""
    return Statistics(u.mean + scale * (c.mean - u.mean), u.basis, u.eigenvalues, u.residual, u.shape, u.count)


@pytest.mark.parametrize(
    ("name", "process", "start"), [("sd1", "vp", 3.0), ("sd1", "edm", 6.0), ("sd3", "flow", 2.0)]
)
def test_guided_text_pipeline_spends_one_call_on_the_mean_and_goes_on_at_the_tail(name, process, start):
    tiny, scale = build(name), 3.0
    shape = (tiny.denoiser.config.in_channels, 8, 8)
    u, c = statistics(shape, start), statistics(shape, start, shift=0.3)
    options = {"scheduler_options": {"process": "edm"}, "grid": "karras"} if process == "edm" else {}
    with exact_network(tiny, u, c) as calls:
        diffsamp.use(tiny.pipe, "unipc", **options)
        tiny.run(STEPS, guidance_scale=scale)
        assert len(calls) == STEPS
        calls.clear()
        diffsamp.use(tiny.pipe, teleport=u)
        ours = tiny.run(STEPS, guidance_scale=scale).double()
        scheduler = tiny.pipe.scheduler
        levels, tail = scheduler._grid.levels, scheduler._plan_from(1)
        x = start_noise(shape) * scheduler.init_noise_sigma
    assert len(calls) == tail.nfe + 1 < 0.8 * STEPS
    assert levels[0].noise_to_signal > 4 * start
    assert levels[1].noise_to_signal >= start > levels[2].noise_to_signal
    assert tail.rows[0].depth == 1  # no output from above is read there
    aim = guided(u, c, scale)
    exact = end_of(tail, aim, gaussian_map(aim, x, levels[0], levels[1]))
    blind = end_of(tail, aim, x * levels[1].sigma / levels[0].sigma)
    assert (ours - exact).abs().max() < 1e-3 * exact.abs().max()
    assert (blind - exact).abs().max() > 0.03 * exact.abs().max()


def test_one_call_map_is_regular_at_pure_noise():
    process = diffsamp.Process.flow()
    stats, x = statistics((12,)), torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top, low = process.level(float("inf")), process.level(2.0)
    shown = gaussian_denoiser(stats, x, top)
    at = teleport(stats, x, top, low, denoised=shown)
    assert (at - gaussian_map(stats, x, top, low)).abs().max() < 1e-12
    near = process.level(1e6)
    made = teleport(stats, x, near, low, denoised=gaussian_denoiser(stats, x, near))
    assert (made - gaussian_map(stats, x, near, low)).abs().max() < 1e-9


def test_unconditional_gaussian_for_a_guided_pipeline_is_refused_unless_forced():
    tiny = build("sd1")
    stats = statistics((4, 8, 8))
    with exact_network(tiny, stats, stats) as calls:
        diffsamp.use(tiny.pipe, "unipc")
        with pytest.raises(DiffsampError, match="no better than white noise"):
            attach(tiny.pipe, stats, one_call=False)
        with pytest.warns(UserWarning, match="no better than white noise"):
            diffsamp.use(tiny.pipe, teleport=stats, teleport_options={"one_call": False, "force": True})
        made = tiny.run(STEPS, guidance_scale=3.0).double()
        plan = tiny.pipe.scheduler.plan
    # No call above the start; with one Gaussian for both halves guidance does nothing, so the exact end is known.
    assert len(calls) == plan.nfe < STEPS
    top = plan.process.level_at(999)
    moved = gaussian_map(stats, start_noise((4, 8, 8)) * top.sigma, top, plan.first_level)
    assert (made - end_of(plan, stats, moved)).abs().max() < 1e-4


def test_restore_gives_the_pipeline_its_own_start_back_bit_for_bit():
    tiny = build("sd1")
    before = tiny.run(3)
    diffsamp.use(tiny.pipe, "unipc", teleport=statistics((4, 8, 8)))
    teleported = tiny.run(8)
    again = tiny.run(8)
    assert torch.equal(teleported, again) and torch.isfinite(again).all()
    diffsamp.restore(tiny.pipe)
    assert torch.equal(tiny.run(3), before)
    assert not tiny.denoiser._forward_pre_hooks


# What these take beside a prompt may not be noise.
OTHER_STARTS = {"sd_controlnet", "sd_pix2pix", "sd_upscale", "svd", "flux2"}
FROM_NOISE = [name for name, family in FAMILIES.items() if family.task == "text" and name not in OTHER_STARTS]


@pytest.mark.parametrize("name", FROM_NOISE)
def test_every_pipeline_that_starts_from_noise_runs_with_fewer_calls(name, monkeypatch):
    tiny = build(name)
    diffsamp.use(tiny.pipe, "dpmpp-2m")
    try:
        shapes, step = [], type(tiny.pipe.scheduler).step

        def spy(self, output, timestep, sample, *arguments, **options):
            shapes.append(tuple(sample.shape[1:]))
            return step(self, output, timestep, sample, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(type(tiny.pipe.scheduler), "step", spy)
            plain, whole = tiny.counted(6)
        diffsamp.use(tiny.pipe, teleport=statistics(shapes[0], start=0.6))
        ours, calls = tiny.counted(6)
        assert torch.isfinite(ours).all() and ours.shape == plain.shape
        assert calls < whole and not torch.equal(ours, plain)
        assert torch.equal(tiny.run(6), ours)
    finally:
        diffsamp.restore(tiny.pipe)


def test_two_calls_per_step_are_refused_for_a_condition_and_fine_without_one():
    stats = statistics((3, 8, 8), start=3.0)
    tiny = build("ddpm")
    with exact_network(tiny, stats) as calls:
        diffsamp.use(tiny.pipe, "heun", teleport=stats, scheduler_options={"clip_sample": False})
        tiny.run(8)
        assert len(calls) == tiny.pipe.scheduler.plan.nfe
    pipe = build("sd1").pipe
    try:
        diffsamp.use(pipe, "heun", teleport=statistics((4, 8, 8)))
        with pytest.raises(DiffsampError, match="more than once in a step"):
            build("sd1").run(8)
    finally:
        diffsamp.restore(pipe)


def test_grid_with_nothing_above_the_start_runs_as_it_is_and_says_so():
    tiny = build("sd1")
    diffsamp.use(tiny.pipe, "unipc")
    plain = tiny.run(5)
    try:
        diffsamp.use(tiny.pipe, teleport=statistics((4, 8, 8), start=14.0))
        with pytest.warns(UserWarning, match="the run is the plain one"):
            assert torch.equal(tiny.run(5), plain)
    finally:
        diffsamp.restore(tiny.pipe)


def test_half_precision_latents_are_moved_in_float32():
    tiny = build("sd1")
    diffsamp.use(tiny.pipe, "unipc", teleport=statistics((4, 8, 8)))
    try:
        scheduler = tiny.pipe.scheduler
        scheduler.set_timesteps(10)
        x = start_noise((4, 8, 8)).to(torch.float16)
        output = (0.9 * x.double()).to(torch.float16)
        made = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
        top, low = scheduler._grid.levels[:2]
        p, q = scheduler.process.x0_coefficients(top, "epsilon")
        denoised = p * x.float() + q * output.float()
        expected = teleport(scheduler._statistics, x.float(), top, low, denoised=denoised)
        assert made.dtype == torch.float16
        assert (made.float() - expected).abs().max() <= 1e-3 * expected.abs().max()
    finally:
        diffsamp.restore(tiny.pipe)


@pytest.mark.parametrize("name", ["sd_img2img", "sd_inpaint_9", "sd_controlnet", "flux_img2img"])
def test_pipelines_that_do_not_start_from_noise_are_refused(name):
    pipe = build(name).pipe
    try:
        with pytest.raises(DiffsampError, match="does not start from white noise"):
            diffsamp.use(pipe, "unipc", teleport=statistics((4, 8, 8)))
    finally:
        diffsamp.restore(pipe)


def test_statistics_of_other_latents_or_without_a_start_and_stock_schedulers_are_refused():
    pipe = build("sd1").pipe
    with pytest.raises(DiffsampError, match="the scheduler is"):
        diffsamp.use(pipe, teleport=statistics((4, 8, 8)))
    try:
        diffsamp.use(pipe, "unipc")
        with pytest.raises(DiffsampError, match="scaling_factor"):
            attach(pipe, statistics((4, 8, 8), key={"scaling_factor": 0.5}))
        attach(pipe, statistics((4, 8, 8), key={"scaling_factor": pipe.vae.config.scaling_factor}))
        with pytest.raises(DiffsampError, match="name no level"):
            attach(pipe, statistics((4, 8, 8), start=None))
        with pytest.raises(DiffsampError, match="accepted: Statistics"):
            attach(pipe, 3)
        attach(pipe, statistics((4, 4, 4)))
        with pytest.raises(DiffsampError, match="shape"):
            build("sd1").run(8)
    finally:
        diffsamp.restore(pipe)
