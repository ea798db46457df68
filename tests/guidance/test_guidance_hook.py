"""Guidance attached to classic pipelines: it equals their CFG, equals a loop by hand, and leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from guided_pipelines import BUILDERS, TWO_CALLS, VP_CONFIG, build, noise, run, sd, sd_img2img
from hand_loop import hand_loop

from diffsamp.adapters.guidance_hook import attach, attached, detach
from diffsamp.errors import DiffsampError
from diffsamp.guidance import APG, CFG, AutoGuidance

SCHEDULERS = [
    DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler,
]  # fmt: skip
APG_OPTIONS = dict(eta=0.2, norm=3.0, momentum=-0.5)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def scale_of(call):
    return call.get("guidance_scale", call.get("true_cfg_scale"))


def sd_with(scheduler):
    torch.manual_seed(0)
    pipe, call = sd(scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


# -- it is the pipeline's CFG, and APG is a loop by hand --------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_cfg_as_a_hook_reproduces_the_pipeline_and_detaching_restores_it_to_the_bit(name):
    pipe, call = build(name)
    plain = run(pipe, call)
    attach(pipe, CFG(scale_of(call)))
    assert relative(run(pipe, call), plain) <= 1e-5
    attach(pipe, "apg", scale_of(call), **APG_OPTIONS)
    assert relative(run(pipe, call), plain) > 1e-3
    detach(pipe)
    assert torch.equal(run(pipe, call), plain)
    assert attached(pipe) is None
    model = getattr(pipe, "unet", None) or pipe.transformer
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("name", BUILDERS)
def test_apg_in_a_pipeline_equals_a_loop_by_hand(name):
    pipe, call = build(name)
    expected = hand_loop(pipe, call, scale=scale_of(call), **APG_OPTIONS, two_calls=name in TWO_CALLS)
    attach(pipe, "apg", scale_of(call), **APG_OPTIONS)
    assert relative(run(pipe, call), expected) <= 1e-6


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_schedulers_cfg_equals_the_pipeline_and_apg_a_loop_by_hand(scheduler):
    pipe, call = sd_with(scheduler(**VP_CONFIG))
    if scheduler is HeunDiscreteScheduler:
        # Eight evaluations of a random network amplify the rounding of fp32; the mathematics is compared in float64.
        pipe.to(dtype=torch.float64)
        call = {key: value.double() if torch.is_tensor(value) else value for key, value in call.items()}
    plain = run(pipe, call)
    expected = hand_loop(pipe, call, scale=5.0, **APG_OPTIONS, two_calls=False)
    attach(pipe, "apg", eta=1.0, momentum=0.0)  # CFG by way of x0 and back
    assert relative(run(pipe, call), plain) <= 1e-5
    hook = attach(pipe, "apg", **APG_OPTIONS)
    assert relative(run(pipe, call), expected) <= 1e-6
    assert hook.state.step == 4  # once per step, also where a step takes two evaluations
    detach(pipe)
    assert torch.equal(run(pipe, call), plain)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_prediction_types_of_a_scheduler(prediction):
    pipe, call = sd_with(EulerDiscreteScheduler(**VP_CONFIG, prediction_type=prediction))
    plain = run(pipe, call)
    attach(pipe, "apg", eta=1.0, momentum=0.0)
    assert relative(run(pipe, call), plain) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cfg_sum_on_two_equal_halves_is_the_guided_prediction_to_the_bit(dtype):
    g = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for scale in (1.5, 7.5, 12.3):
        assert torch.equal(g + scale * (g - g), g)


def test_scheduler_with_sigmas_between_the_steps():
    pipe, call = sd_with(KDPM2DiscreteScheduler(**VP_CONFIG))
    plain = run(pipe, call)
    hook = attach(pipe, "apg", eta=1.0, momentum=0.0)
    assert relative(run(pipe, call), plain) <= 1e-5
    assert hook.state.step == 4


def test_karras_sigmas_are_read_from_the_scheduler_not_from_the_rounded_timestep():
    pipe, call = sd_with(DPMSolverMultistepScheduler(**VP_CONFIG, use_karras_sigmas=True))
    levels = []

    class Spy(APG):
        def __call__(self, state, c, u, x, level):
            levels.append(level.noise_to_signal)
            return super().__call__(state, c, u, x, level)

    attach(pipe, Spy(5.0))
    run(pipe, call)
    assert levels == pytest.approx(pipe.scheduler.sigmas[:4].tolist(), rel=1e-6)


def test_inpainting_unet_guides_the_latents_and_not_the_mask():
    from diffusers import StableDiffusionInpaintPipeline

    torch.manual_seed(0)
    pipe, call = sd(None, StableDiffusionInpaintPipeline, in_channels=9)
    pipe.set_progress_bar_config(disable=True)
    call |= dict(image=noise(2, 3, 8, 8), mask_image=(noise(2, 1, 8, 8) > 0).float(), strength=1.0)
    plain = run(pipe, call)
    attach(pipe, "apg", eta=1.0, momentum=0.0)
    assert relative(run(pipe, call), plain) <= 1e-5


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_memory_starts_afresh_at_every_run(name):
    pipe, call = build(name)
    attach(pipe, "apg", scale_of(call), momentum=-0.75)
    first = run(pipe, call)
    assert torch.equal(run(pipe, call), first)
    attach(pipe, "apg", scale_of(call), momentum=0.0)
    assert relative(run(pipe, call), first) > 1e-3


def stop_at(step):
    def callback(pipe, i, t, values):
        if i == step:
            raise KeyboardInterrupt
        return values

    return callback


def test_aborted_run_does_not_leak_into_a_later_one_at_lower_strength():
    torch.manual_seed(0)
    pipe, call = sd_img2img(EulerDiscreteScheduler(**VP_CONFIG))
    pipe.set_progress_bar_config(disable=True)
    attach(pipe, "apg:5", momentum=-0.75)
    fresh = run(pipe, call, steps=6, strength=0.5)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, call, steps=6, strength=0.9, callback_on_step_end=stop_at(1))
    assert torch.equal(run(pipe, call, steps=6, strength=0.5), fresh)
    plain = APG(5.0, eta=1.0, momentum=0.0)
    detach(pipe)
    expected = run(pipe, call, steps=6, strength=0.5)
    attach(pipe, plain)
    assert relative(run(pipe, call, steps=6, strength=0.5), expected) <= 1e-5


def test_aborted_two_call_run_does_not_leak():
    pipe, call = build("flux")
    attach(pipe, "apg:4", momentum=-0.75)
    fresh = run(pipe, call)
    original, count = pipe.transformer.forward, iter(range(100))

    def failing(*args, **kwargs):
        if next(count) == 3:  # the unconditional call of the second step
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    pipe.transformer.forward = failing
    with pytest.raises(KeyboardInterrupt):
        run(pipe, call)
    pipe.transformer.forward = original
    assert torch.equal(run(pipe, call), fresh)


def test_another_size_or_batch_after_a_run_works():
    pipe, call = build("sd")
    attach(pipe, "apg:5", momentum=-0.75)
    small = run(pipe, call)
    assert run(pipe, call | dict(height=16, width=16)).shape[-1] == 16
    one = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in call.items()}
    assert run(pipe, one).shape[0] == 1
    assert torch.equal(run(pipe, call), small)


def test_same_schedule_tensor_run_twice_by_hand_starts_afresh():
    """A caller's own loop that does not call set_timesteps again."""
    pipe, call = sd_with(EulerDiscreteScheduler(**VP_CONFIG))
    hook = attach(pipe, "apg:5", momentum=-0.75)
    embeds = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    pipe.scheduler.set_timesteps(4)
    outputs = []
    for _ in range(2):
        pipe.scheduler._step_index = None
        latents = noise(2, 4, 8, 8, seed=7) * pipe.scheduler.init_noise_sigma
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
            with torch.no_grad():
                guided = pipe.unet(x, t, encoder_hidden_states=embeds, return_dict=False)[0].chunk(2)[0]
            latents = pipe.scheduler.step(guided, t, latents).prev_sample
        outputs.append(latents)
    assert torch.equal(*outputs) and hook.state.step == 4


# -- the world around -------------------------------------------------------------------------------------------------


def test_pipelines_own_scale_is_read_at_every_call():
    pipe, call = build("sd")
    plain = run(pipe, call, guidance_scale=3.0)
    attach(pipe, "cfg")
    assert torch.equal(run(pipe, call, guidance_scale=3.0), plain)
    attach(pipe, "cfg:3")
    assert torch.equal(run(pipe, call, guidance_scale=9.0), plain)


def test_survives_attention_slicing_and_module_offload_hooks():
    pipe, call = build("sd")
    attach(pipe, "apg:5", norm=2.0)
    expected = run(pipe, call)
    pipe.enable_attention_slicing(1)
    assert relative(run(pipe, call), expected) <= 1e-5
    original = pipe.unet.forward  # what an offload hook does: it wraps forward

    def moved(*args, **kwargs):
        return original(*args, **kwargs)

    pipe.unet.forward = moved
    assert relative(run(pipe, call), expected) <= 1e-5


def test_survives_torch_compile():
    pipe, call = build("sd")
    attach(pipe, "apg:5", norm=2.0)
    expected = run(pipe, call, steps=2)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert relative(run(pipe, call, steps=2), expected) <= 1e-5
    attach(pipe, "apg:5", norm=2.0)  # on the compiled module itself
    assert relative(run(pipe, call, steps=2), expected) <= 1e-5
    detach(pipe)
    assert relative(run(pipe, call, steps=2), expected) > 1e-3
    torch._dynamo.reset()


def test_attaching_twice_replaces_and_dict_outputs_are_guided_too():
    pipe, call = build("sd")
    attach(pipe, "apg:5")
    attach(pipe, "cfg:5")
    assert len(pipe.unet._forward_hooks) == 1
    x = torch.cat([noise(2, 4, 8, 8)] * 2)
    pipe.scheduler.set_timesteps(4)
    pipe._guidance_scale = 5.0
    embeds = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    t = pipe.scheduler.timesteps[0]
    with torch.no_grad():
        output = pipe.unet(x, t, encoder_hidden_states=embeds)
    assert torch.equal(*output.sample.chunk(2)) and output[0] is output.sample


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_autoguidance_by_skipped_layers_equals_a_weak_copy_and_a_strong_copy_is_no_guidance(name):
    pipe, call = build(name)
    strong = copy.deepcopy(pipe.transformer)
    attach(pipe, "cfg:1")
    conditional = run(pipe, call)
    attach(pipe, AutoGuidance(3.0, weak=strong))
    assert relative(run(pipe, call), conditional) <= 1e-6
    attach(pipe, "autoguidance:3,skip_layers=0")
    skipped = run(pipe, call)
    assert relative(skipped, conditional) > 1e-3
    del strong.transformer_blocks[0]
    attach(pipe, AutoGuidance(3.0, weak=strong))
    assert relative(run(pipe, call), skipped) <= 1e-5


@pytest.mark.parametrize(
    "text", ["cfg-zero", "fdg:5,low_scale=2", "interval:5,sigma_min=0.5,sigma_max=5", "apg:5,stop=0.5"]
)
def test_every_two_prediction_method_runs_in_a_pipeline(text):
    pipe, call = build("sd3")
    plain = run(pipe, call)
    attach(pipe, text)
    latents = run(pipe, call)
    assert torch.isfinite(latents).all() and relative(latents, plain) > 1e-4


def test_rescale_inside_equals_the_pipelines_own():
    pipe, call = build("sd")
    expected = run(pipe, call, guidance_rescale=0.7)
    attach(pipe, "cfg-rescale:5,rescale=0.7,space=epsilon")
    assert relative(run(pipe, call), expected) <= 1e-5


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(message, call):
    with pytest.raises(DiffsampError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_rescale_set_on_the_pipeline_as_well_is_refused_not_lost():
    pipe, call = build("sd")
    attach(pipe, "apg:5")
    refused("guidance_rescale: the pipeline was called with 0.7", lambda: run(pipe, call, guidance_rescale=0.7))


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_batched_pipeline_without_its_unconditional_half_is_refused(name):
    pipe, call = build(name)
    attach(pipe, "apg:5")
    refused("no unconditional prediction", lambda: run(pipe, call, guidance_scale=1.0))


def test_two_call_pipeline_without_its_unconditional_call_is_refused():
    pipe, call = build("flux")
    attach(pipe, "apg:5")
    refused("no unconditional prediction", lambda: run(pipe, call, true_cfg_scale=1.0))


@pytest.mark.parametrize("name", ["flux", "qwen_image", "pixart"])
def test_a_scale_that_the_pipeline_does_not_keep_must_be_given(name):
    pipe, _ = build(name)
    refused("does not keep its", lambda: attach(pipe, "apg"))


def test_unconditional_and_three_branch_pipelines_are_refused():
    unconditional = DDIMPipeline(
        UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
                    up_block_types=("UpBlock2D",)),
        DDIMScheduler(),
    )  # fmt: skip
    refused("makes no pair of conditional and unconditional", lambda: attach(unconditional, "apg:5"))
    pix2pix, _ = sd(None, StableDiffusionInstructPix2PixPipeline, in_channels=8)
    refused("not recognised", lambda: attach(pix2pix, "apg:5"))
    torch.manual_seed(0)
    parts, _ = build("sd")
    pag = StableDiffusionPAGPipeline(
        **{key: value for key, value in parts.components.items() if key != "image_encoder"},
        requires_safety_checker=False, pag_applied_layers="mid",
    )  # fmt: skip
    refused("not recognised", lambda: attach(pag, "apg:5"))


def test_guidance_distilled_models_are_refused():
    told, _ = sd(None, time_cond_proj_dim=8)
    refused("guidance-distilled", lambda: attach(told, "apg:5"))
    from diffusers import FluxControlPipeline, FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=32, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip
    pipe = FluxControlPipeline(FlowMatchEulerDiscreteScheduler(), build("flux")[0].vae, None, None, None, None, model)
    refused("guidance-distilled", lambda: attach(pipe, "apg:5"))


def test_methods_that_a_pipeline_cannot_carry_are_refused():
    pipe, call = build("sd")
    refused("takes 3 predictions", lambda: attach(pipe, "perp-neg:5"))
    refused("weak, skip_layers", lambda: attach(pipe, "autoguidance:2"))
    attach(pipe, "autoguidance:2,skip_layers=0")
    refused("has 0 transformer blocks", lambda: run(pipe, call))
    sd3, call = build("sd3")
    attach(sd3, "apg:5")
    layers = dict(skip_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    refused("skip_guidance_layers", lambda: run(sd3, call, **layers))


def test_a_failed_attach_leaves_the_earlier_guidance_in_place():
    pipe, _ = build("sd")
    hook = attach(pipe, "cfg:5")
    with pytest.raises(DiffsampError):
        attach(pipe, "perp-neg:5")
    assert attached(pipe) is hook
