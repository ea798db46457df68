"""Tiny random classic pipelines that take embeddings, one per way of doing classifier-free guidance."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)

VP_CONFIG = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
BATCH = 2


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**VP_CONFIG, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip


def unet(**options: Any) -> UNet2DConditionModel:
    options = {"in_channels": 4, "out_channels": 4, **options}
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, cross_attention_dim=16, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options,
    )  # fmt: skip


def sd(scheduler: Any = None, kind: type = StableDiffusionPipeline, **options: Any) -> tuple[Any, dict[str, Any]]:
    pipe = kind(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet(**options), scheduler=scheduler or ddim(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    call = dict(prompt_embeds=noise(BATCH, 4, 16), negative_prompt_embeds=noise(BATCH, 4, 16, seed=2))
    return pipe, call | dict(height=8, width=8, guidance_scale=5.0)


def sd_img2img(scheduler: Any = None) -> tuple[Any, dict[str, Any]]:
    pipe, call = sd(scheduler, StableDiffusionImg2ImgPipeline)
    del call["height"], call["width"]
    return pipe, call | dict(image=noise(BATCH, 4, 8, 8, seed=3), strength=0.5)


def sdxl() -> tuple[Any, dict[str, Any]]:
    model = unet(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32)
    pipe = StableDiffusionXLPipeline(
        vae=vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=model,
        scheduler=ddim(), add_watermarker=False,
    )  # fmt: skip
    call = dict(
        prompt_embeds=noise(BATCH, 4, 16), negative_prompt_embeds=noise(BATCH, 4, 16, seed=2),
        pooled_prompt_embeds=noise(BATCH, 8, seed=4), negative_pooled_prompt_embeds=noise(BATCH, 8, seed=5),
    )  # fmt: skip
    return pipe, call | dict(height=8, width=8, guidance_scale=5.0)


def sd3() -> tuple[Any, dict[str, Any]]:
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=16,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    call = dict(
        prompt_embeds=noise(BATCH, 4, 16), negative_prompt_embeds=noise(BATCH, 4, 16, seed=2),
        pooled_prompt_embeds=noise(BATCH, 8, seed=4), negative_pooled_prompt_embeds=noise(BATCH, 8, seed=5),
    )  # fmt: skip
    return pipe, call | dict(height=8, width=8, guidance_scale=5.0)


def pixart() -> tuple[Any, dict[str, Any]]:
    model = PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
        norm_type="ada_norm_single",
    )  # fmt: skip
    pipe = PixArtSigmaPipeline(tokenizer=None, text_encoder=None, vae=vae(), transformer=model, scheduler=ddim())
    mask = torch.ones(BATCH, 4)
    call = dict(
        prompt=None, negative_prompt=None, prompt_embeds=noise(BATCH, 4, 16), prompt_attention_mask=mask,
        negative_prompt_embeds=noise(BATCH, 4, 16, seed=2), negative_prompt_attention_mask=mask,
    )  # fmt: skip
    return pipe, call | dict(height=8, width=8, guidance_scale=5.0, use_resolution_binning=False)


def flux() -> tuple[Any, dict[str, Any]]:
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae(), None, None, None, None, model)
    call = dict(
        prompt_embeds=noise(BATCH, 4, 16), negative_prompt_embeds=noise(BATCH, 4, 16, seed=2),
        pooled_prompt_embeds=noise(BATCH, 8, seed=4), negative_pooled_prompt_embeds=noise(BATCH, 8, seed=5),
    )  # fmt: skip
    return pipe, call | dict(height=16, width=16, true_cfg_scale=4.0)


def wan() -> tuple[Any, dict[str, Any]]:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=16, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    autoencoder = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                   temperal_downsample=[False, True, True], latents_mean=[0.0] * 4,
                                   latents_std=[1.0] * 4)  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=autoencoder, scheduler=scheduler, transformer=model)
    call = dict(prompt_embeds=noise(BATCH, 4, 16), negative_prompt_embeds=noise(BATCH, 4, 16, seed=2))
    return pipe, call | dict(height=32, width=32, num_frames=5, guidance_scale=5.0)


def qwen_image() -> tuple[Any, dict[str, Any]]:
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    autoencoder = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                         temperal_downsample=[False, True, True], latents_mean=[0.0] * 4,
                                         latents_std=[1.0] * 4)  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = QwenImagePipeline(scheduler, autoencoder, None, None, model)
    mask = torch.ones(BATCH, 4, dtype=torch.long)
    call = dict(
        prompt_embeds=noise(BATCH, 4, 16), prompt_embeds_mask=mask,
        negative_prompt_embeds=noise(BATCH, 4, 16, seed=2), negative_prompt_embeds_mask=mask,
    )  # fmt: skip
    return pipe, call | dict(height=32, width=32, true_cfg_scale=4.0)


BUILDERS = dict(sd=sd, sdxl=sdxl, sd3=sd3, pixart=pixart, flux=flux, wan=wan, qwen_image=qwen_image)
TWO_CALLS = ("flux", "wan", "qwen_image")


def build(name: str, *args: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline with fixed random weights, and the arguments to call it with."""
    torch.manual_seed(0)
    pipe, call = BUILDERS[name](*args)
    pipe.set_progress_bar_config(disable=True)
    # Fresh transformers start near zero output; larger weights make the condition count.
    model = getattr(pipe, "transformer", None)
    if model is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.2 * noise(*parameter.shape, seed=parameter.numel()))
    return pipe, call


def run(pipe: Any, call: dict[str, Any], steps: int = 4, seed: int = 0, **options: Any) -> torch.Tensor:
    """Latents of one run."""
    generator = torch.Generator().manual_seed(seed)
    arguments = {**call, "num_inference_steps": steps, "generator": generator, "output_type": "latent", **options}
    return pipe(**arguments, return_dict=False)[0]
