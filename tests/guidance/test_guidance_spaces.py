"""Guidance acts on x0 whatever the network predicts: one field, four ways of writing it, the same samples."""

from __future__ import annotations

import pytest
import torch
from digits_toy import levels, mixture

from diffsamp.adapters.current_level import Here
from diffsamp.adapters.x0_space import guided_prediction
from diffsamp.guidance import APG, CFGZeroStar, RescaledCFG, rescale
from diffsamp.guidance.space import SPACES, from_x0, to_x0
from diffsamp.process import Level, Process

VP, FLOW = Process.vp_continuous(), Process.flow()


def sample(guidance, prediction, batch=40):
    """DDIM through ``guided_prediction``; flows visit the same noise-to-signal ratios on x/(alpha + sigma)."""
    process = FLOW if prediction == "flow_prediction" else VP
    noise = torch.randn(batch, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels, state, steps = torch.arange(batch) % 10, guidance.init(batch), levels()
    x = noise
    for here, after in zip(steps[:-1], steps[1:], strict=True):
        ours = process.level(here.noise_to_signal) if process is FLOW else here
        p, q = process.x0_coefficients(ours, prediction)
        scale = ours.alpha / here.alpha
        cond, uncond = mixture().predict(x, here, labels)
        raw = [(x0 - p * scale * x) / q for x0 in (cond, uncond)]
        place = Here(ours, p, q, here.index, False)
        guided, state = guided_prediction(guidance, state, *raw, scale * x, place)
        x0 = p * scale * x + q * guided
        x = after.alpha * x0 + after.sigma * (x - here.alpha * x0) / here.sigma
    return x


@pytest.mark.parametrize("prediction", ["v_prediction", "flow_prediction", "sample"])
def test_apg_samples_do_not_depend_on_what_the_network_predicts(prediction):
    method = APG(7.5, eta=0.0, norm=2.5, momentum=-0.5)
    expected = sample(method, "epsilon")
    assert (sample(method, prediction) - expected).norm() <= 1e-5 * expected.norm()


def test_where_x0_is_not_determined_or_sigma_is_tiny_plain_cfg_is_used():
    c, u, x = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    method = APG(5.0, norm=0.1)
    for place in (
        Here(Level(999.0, 0.0, 1.0), None, None, 0, False),
        Here(Level(0.0, 1.0, 1e-6), 1.0, -1e-6, 0, False),
    ):
        out, state = guided_prediction(method, method.init(), c, u, x, place)
        assert torch.equal(out, u + 5.0 * (c - u)) and state.step == 1


@pytest.mark.parametrize(
    "level", [Level(0, 0.6, 0.8), Level(0, 0.3, 0.7), Level(0, 1.0, 5.0)], ids=["vp", "flow", "ve"]
)
@pytest.mark.parametrize("space", SPACES)
def test_the_way_to_a_space_and_back_is_the_identity(level, space):
    x0, x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(to_x0(from_x0(x0, x, level, space), x, level, space), x0, rtol=1e-12, atol=1e-12)


def test_spaces_are_epsilon_v_and_velocity_as_defined():
    x0, epsilon = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vp, flow = Level(0, 0.6, 0.8), Level(0, 0.3, 0.7)
    x = 0.6 * x0 + 0.8 * epsilon
    assert torch.allclose(from_x0(x0, x, vp, "epsilon"), epsilon)
    assert torch.allclose(from_x0(x0, x, vp, "v"), 0.6 * epsilon - 0.8 * x0)
    assert torch.allclose(from_x0(x0, 0.3 * x0 + 0.7 * epsilon, flow, "v"), epsilon - x0)


@pytest.mark.parametrize("space", SPACES)
def test_full_rescale_gives_the_conditional_standard_deviation_in_the_named_space(space):
    c, u, x = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    level = Level(0, 0.6, 0.8)
    method = RescaledCFG(7.5, rescale=1.0, space=space)
    out, _ = method(method.init(), c, u, x, level)
    wanted = from_x0(c, x, level, space).flatten(1).std(1)
    assert torch.allclose(from_x0(out, x, level, space).flatten(1).std(1), wanted)
    plain = RescaledCFG(7.5, rescale=0.0, space=space)
    assert torch.allclose(plain(plain.init(), c, u, x, level)[0], u + 7.5 * (c - u))


def test_rescale_equals_diffusers():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    guided, c = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(rescale(3 * guided, c, 0.7), rescale_noise_cfg(3 * guided, c, 0.7), rtol=1e-12)
    assert torch.isfinite(rescale(torch.zeros_like(c), c, 0.7)).all()


def test_zero_star_equals_diffusers_on_velocities_and_starts_at_rest():
    from diffusers import ClassifierFreeZeroStarGuidance

    v_cond, v_uncond, x = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    level = Level(0, 0.3, 0.7)
    theirs = ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=1)
    method = CFGZeroStar(4.0, zero_steps=1)
    state = method.init(2)
    for step in range(2):
        theirs.set_state(step, 10, torch.tensor(700))
        expected = theirs.forward(v_cond, v_uncond).pred
        x0, state = method(state, x - 0.7 * v_cond, x - 0.7 * v_uncond, x, level)
        assert torch.allclose((x - x0) / 0.7, expected, rtol=1e-5, atol=1e-5)
        assert (expected == 0).all() if step == 0 else (expected != 0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_guided_step_equals_sampling_with_guidance(prediction):
    """The step used one at a time, against the engine's loop."""
    import diffsamp
    from diffsamp import engine
    from diffsamp.guidance.step import guided_step

    process = Process.vp()
    grid = diffsamp.grid("logsnr", process, 6, sigma_min=0.05, sigma_max=20.0)
    plan = diffsamp.solver("unipc", order=2)(process, grid)
    start = torch.randn(20, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels, method = torch.arange(20) % 10, APG(5.0, norm=2.5, momentum=-0.5)

    def denoiser(x, level):
        p, q = process.x0_coefficients(level, prediction)
        return tuple((x0 - p * x) / q for x0 in mixture().predict(x, level, labels))

    expected = diffsamp.sample(plan, denoiser, start, prediction=prediction, guidance=method)
    state, memory = engine.init(plan, start), method.init(20, plan.nfe)
    for row in plan.rows:
        cond, uncond = denoiser(state.input, row.level)
        state, memory = guided_step(plan, state, method, memory, cond, uncond, prediction=prediction)
    assert (state.input - expected).norm() <= 1e-12 * expected.norm()
    assert memory.step == 6 and (state.input - start).norm() > 1.0
    text = diffsamp.sample(plan, denoiser, start, prediction=prediction, guidance="apg:5,norm=2.5,momentum=-0.5")
    assert torch.equal(text, expected)
