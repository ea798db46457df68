"""Guider classes in diffusers' own modular denoising loop, and the k-diffusion and ComfyUI forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import ClassifierFreeGuidance, DDIMScheduler, EulerDiscreteScheduler
from diffusers.modular_pipelines import BlockState
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLLoopDenoiser
from guided_pipelines import VP_CONFIG, build, noise, run

import diffsamp
from diffsamp.adapters.guidance_hook import attach
from diffsamp.adapters.guiders import APGGuidance, MethodGuidance
from diffsamp.adapters.kdiffusion_guidance import DenoisedGuidance, GuidedDenoiser, comfy_cfg_function
from diffsamp.errors import DiffsampError
from diffsamp.guidance import APG, CFG, apg
from diffsamp.process import Level


class Components:
    """What the denoising block of modular SDXL needs of its pipeline."""

    def __init__(self, unet, scheduler, guider):
        self.unet, self.scheduler, self.guider = unet, scheduler, guider


def modular(pipe, call, guider, steps=4):
    """The SDXL loop of diffusers' modular pipelines, from the same start as ``run(pipe, call)``."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    if hasattr(guider, "bind"):
        guider.bind(pipe)
    ids = torch.tensor([[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]]).repeat(2, 1)
    state = BlockState(
        prompt_embeds=call["prompt_embeds"], negative_prompt_embeds=call["negative_prompt_embeds"],
        pooled_prompt_embeds=call["pooled_prompt_embeds"],
        negative_pooled_prompt_embeds=call["negative_pooled_prompt_embeds"], add_time_ids=ids,
        negative_add_time_ids=ids, ip_adapter_embeds=None, negative_ip_adapter_embeds=None, timestep_cond=None,
        cross_attention_kwargs=None, num_inference_steps=steps,
    )  # fmt: skip
    block, components = StableDiffusionXLLoopDenoiser(), Components(pipe.unet, scheduler, guider)
    # The block reads the two embeddings that SDXL calls added conditions under these names.
    for i, t in enumerate(scheduler.timesteps):
        state.scaled_latents = scheduler.scale_model_input(latents, t)
        block(components, state, i, t)
        latents = scheduler.step(state.noise_pred, t, latents, return_dict=False)[0]
    return latents


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_guider_with_plain_settings_equals_diffusers_cfg_guider(scheduler):
    pipe, call = build("sdxl")
    pipe.scheduler = scheduler(**VP_CONFIG)
    expected = modular(pipe, call, ClassifierFreeGuidance(5.0))
    assert relative(modular(pipe, call, APGGuidance(guidance_scale=5.0, eta=1.0, momentum=0.0)), expected) <= 1e-5
    assert torch.equal(modular(pipe, call, MethodGuidance(guidance="cfg:5")), expected)


def test_guider_equals_the_hook_on_the_classic_pipeline_run_after_run():
    pipe, call = build("sdxl")
    guider = APGGuidance(guidance_scale=5.0, norm=3.0, momentum=-0.5)
    first = modular(pipe, call, guider)
    assert torch.equal(modular(pipe, call, guider), first)
    assert not pipe.unet._forward_pre_hooks
    attach(pipe, "apg:5", norm=3.0, momentum=-0.5)
    assert relative(run(pipe, call), first) <= 1e-5


def test_guider_makes_one_call_where_it_does_not_act():
    pipe, call = build("sdxl")
    counted = []
    handle = pipe.unet.register_forward_hook(lambda *_: counted.append(1))
    modular(pipe, call, APGGuidance(guidance_scale=5.0, start=0.25, stop=0.75))
    assert len(counted) == 4 + 2
    conditional = modular(pipe, call, ClassifierFreeGuidance(1.0))
    assert torch.equal(modular(pipe, call, APGGuidance(guidance_scale=1.0)), conditional)
    assert torch.equal(modular(pipe, call, APGGuidance(guidance_scale=5.0, enabled=False)), conditional)
    handle.remove()


def test_guider_configuration_is_saved_and_found_again(tmp_path):
    for guider in (APGGuidance(guidance_scale=4.0, norm=2.5), MethodGuidance(guidance="cfg-rescale:5,rescale=0.5")):
        guider.save_pretrained(tmp_path / type(guider).__name__)
        again = type(guider).from_pretrained(tmp_path / type(guider).__name__)
        assert again.guidance == guider.guidance
        assert type(guider).__module__ == "diffsamp" and getattr(diffsamp, type(guider).__name__) is type(guider)
        assert guider.new().guidance == guider.guidance
        assert "guidance" in repr(guider)


def test_use_on_a_modular_pipeline_replaces_its_guider_and_restore_brings_it_back():
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    import diffsamp

    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(scheduler=EulerDiscreteScheduler(**VP_CONFIG))
    before = pipe.guider
    assert isinstance(before, ClassifierFreeGuidance)
    diffsamp.use(pipe, guidance="apg:5,norm=2.5")
    assert isinstance(pipe.guider, MethodGuidance) and pipe.guider.guidance == APG(5.0, norm=2.5)
    pipe.guider.set_state(0, 4, torch.tensor(999))  # it knows the pipeline's scheduler
    diffsamp.restore(pipe)
    assert pipe.guider is before


def test_guider_refuses_what_it_cannot_do():
    with pytest.raises(DiffsampError, match="call guider.bind"):
        APGGuidance(guidance_scale=5.0).set_state(0, 4, torch.tensor(999))
    with pytest.raises(DiffsampError, match="owner"):
        APGGuidance(guidance_scale=5.0).bind(3)
    with pytest.raises(DiffsampError, match="has no scale"):
        MethodGuidance(guidance="apg")
    for text in ("perp-neg:5", "autoguidance:2,skip_layers=1"):
        with pytest.raises(DiffsampError, match="needs more than"):
            MethodGuidance(guidance=text)
    with pytest.raises(DiffsampError, match="guidance_scale"):
        APGGuidance(guidance_scale=0.5)


# -- k-diffusion and ComfyUI ------------------------------------------------------------------------------------------


def denoised(step):
    return noise(2, 4, 8, 8, seed=10 + step), noise(2, 4, 8, 8, seed=20 + step), noise(2, 4, 8, 8, seed=30)


def test_denoised_form_equals_the_function_and_restarts_where_sigma_rises():
    combine, buffer = DenoisedGuidance("apg:5,norm=3,momentum=-0.5"), None
    first = []
    for step, sigma in enumerate((10.0, 3.0, 1.0)):
        c, u, x = denoised(step)
        expected, buffer = apg(c, u, 5.0, norm=3.0, momentum=-0.5, buffer=buffer)
        first.append(combine(c, u, x, torch.full((2,), sigma)))
        assert torch.equal(first[-1], expected)
    assert torch.equal(combine(*denoised(0), 10.0), first[0])
    combine.reset()
    assert torch.equal(combine(*denoised(0), 0.5), first[0])
    small = tuple(tensor[:1] for tensor in denoised(1))
    assert combine(*small, 0.4).shape[0] == 1  # another batch: no stale memory, no error


def test_guided_denoiser_speaks_k_diffusion():
    def model(x, sigma, cond):
        return x / (1 + sigma[:, None, None, None] ** 2) + cond

    guided = GuidedDenoiser(model, CFG(3.0), cond=dict(cond=1.0), uncond=dict(cond=0.5))
    x, sigma = noise(2, 4, 8, 8), torch.full((2,), 2.0)
    assert torch.allclose(guided(x, sigma), x / 5 + 0.5 + 3 * 0.5)
    guided.reset()


def test_comfy_function_returns_x_minus_x0_and_restarts_at_the_first_sigma():
    function = comfy_cfg_function("apg", momentum=-0.5)
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.0])

    def step(i, sigma, schedule):
        c, u, x = denoised(i)
        options = {"transformer_options": {"sample_sigmas": schedule}}
        args = dict(cond_denoised=c, uncond_denoised=u, input=x, sigma=sigma[None], cond_scale=5.0)
        return x - function({**args, "model_options": options})

    method = APG(5.0, momentum=-0.5)
    expected, state = method(method.init(), *denoised(0), Level(0, 1.0, 10.0))
    assert torch.allclose(step(0, sigmas[0], sigmas), expected, atol=1e-5)
    step(1, sigmas[1], sigmas)
    # Given up here; the next run begins lower, which sigma alone would take for a continuation.
    assert torch.allclose(step(0, sigmas[2], sigmas[2:]), expected, atol=1e-5)
