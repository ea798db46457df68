"""Tiny random-weight pipelines of many diffusers families, built offline and deterministically.

Everything is as small as the classes allow (one layer, two heads, 8×8 latents) and prompts are given as embeddings, so
that no text encoder or tokenizer is needed and a run of a few steps takes tens of milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch

VP_CONFIG = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
    steps_offset=1,
)  # fmt: skip
SIDE = 8
WORDS = 4
WIDTH = 16
POOLED = 8


@dataclass(frozen=True)
class Family:
    """How to build one pipeline family.

    Attributes:
        name: of the family, the key in :data:`FAMILIES`.
        make: returns (pipeline, call arguments).
        kind: ``"vp"``, ``"edm"`` or ``"flow"``.
        task: ``"text"``, ``"img2img"`` or ``"inpaint"``.
        strength: share of the schedule that is run (1 for text to image).
        calls: network calls per evaluation (2 where both guidance branches are called one after the other).
        strength_of_timesteps: whether the pipeline takes ``len(timesteps)`` for the number of steps when it applies
            ``strength`` (flow pipelines that pass sigmas do; a two-evaluation solver then starts later).
    """

    name: str
    make: Callable[[], tuple[Any, dict[str, Any]]]
    kind: str
    task: str = "text"
    strength: float = 1.0
    calls: int = 1
    strength_of_timesteps: bool = False

    def expected_calls(self, steps: int, evaluations: int) -> int:
        """Network calls of a run of a solver with so many evaluations per step (one in the step to the data)."""
        rows = steps * evaluations - (evaluations - 1)
        counted = rows if self.strength_of_timesteps else steps
        return self.calls * (rows - int(counted - counted * self.strength) * evaluations)


@dataclass
class Tiny:
    """A pipeline that was built, with what a test needs to run it."""

    family: Family
    pipe: Any
    call: dict[str, Any]
    stock: Any

    @property
    def denoiser(self) -> torch.nn.Module:
        return self.pipe.unet if getattr(self.pipe, "unet", None) is not None else self.pipe.transformer

    def run(self, steps: int, seed: int = 0, **options: Any) -> torch.Tensor:
        """The final latents (images for pipelines without an autoencoder) of one run."""
        arguments = {**self.call, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
        result = self.pipe(**{**arguments, **options}, return_dict=False)[0]
        return result if isinstance(result, torch.Tensor) else torch.as_tensor(result)

    def counted(self, steps: int, **options: Any) -> tuple[torch.Tensor, int]:
        """The result of a run, and how often the network was called."""
        calls = []
        handle = self.denoiser.register_forward_pre_hook(lambda module, inputs: calls.append(1))
        try:
            return self.run(steps, **options), len(calls)
        finally:
            handle.remove()


FAMILIES: dict[str, Family] = {}


def family(kind: str, task: str = "text", **facts: Any) -> Callable:
    """Register a builder under its function's name."""

    def add(make: Callable[[], tuple[Any, dict[str, Any]]]) -> Callable[[], tuple[Any, dict[str, Any]]]:
        name = make.__name__
        FAMILIES[name] = Family(name, make, kind, task, **facts)
        return make

    return add


@cache
def build(name: str) -> Tiny:
    """The tiny pipeline of a family: built once a session, weights fixed."""
    entry = FAMILIES[name]
    torch.manual_seed(0)
    pipe, call = entry.make()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    tiny = Tiny(entry, pipe, {"output_type": "latent", **call}, pipe.scheduler)
    if getattr(pipe, "transformer", None) is not None:
        # Fresh transformers start near zero output; larger weights make the prediction depend on the input.
        source = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in pipe.transformer.named_parameters():
                scale = 0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
                centre = 1.0 if parameter.ndim == 1 and "norm" in key else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=source) * scale + centre)
    return tiny


# -- shared parts ------------------------------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(side: int = SIDE, seed: int = 3) -> torch.Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def mask(side: int = SIDE) -> torch.Tensor:
    """Left half is repainted."""
    return (torch.arange(side) < side // 2).float().expand(1, 1, side, side).clone()


def vp(**options: Any) -> Any:
    return diffusers.DDIMScheduler(**{**VP_CONFIG, **options})


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def dynamic() -> Any:
    return flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=4, max_image_seq_len=64)


def vae(channels: int = 4, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), **options,
    )  # fmt: skip


def flux_vae(channels: int = 4) -> Any:
    return vae(channels, shift_factor=0.1, scaling_factor=0.36)


def unet(**options: Any) -> Any:
    options = {"in_channels": 4, "out_channels": 4, **options}
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=SIDE, cross_attention_dim=WIDTH,
        attention_head_dim=8, norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options,
    )  # fmt: skip


def words(prefix: str = "", pooled: bool = False, attention: bool = False) -> dict[str, Any]:
    """Positive and negative prompt embeddings."""
    found = {"prompt_embeds": noise(1, WORDS, WIDTH), "negative_prompt_embeds": noise(1, WORDS, WIDTH, seed=2)}
    if pooled:
        found["pooled_prompt_embeds"] = noise(1, POOLED, seed=4)
        found["negative_pooled_prompt_embeds"] = noise(1, POOLED, seed=5)
    if attention:
        ones = torch.ones(1, WORDS, dtype=torch.long)
        found |= {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
    return found


SIZE = {"height": SIDE, "width": SIDE}
GUIDED = {"guidance_scale": 3.0}


# -- variance-preserving and EDM families ------------------------------------------------------------------------------


def stable_diffusion(kind: str, scheduler: Any = None, model: Any = None, **parts: Any) -> Any:
    return getattr(diffusers, kind)(
        vae=vae(), text_encoder=None, tokenizer=None, unet=model or unet(), scheduler=scheduler or vp(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts,
    )  # fmt: skip


@family("vp")
def sd1() -> tuple[Any, dict[str, Any]]:
    return stable_diffusion("StableDiffusionPipeline"), words() | SIZE | GUIDED


@family("vp")
def sd2_v_prediction() -> tuple[Any, dict[str, Any]]:
    scheduler = vp(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return stable_diffusion("StableDiffusionPipeline", scheduler), words() | SIZE | GUIDED


@family("vp", "img2img", strength=0.5)
def sd_img2img() -> tuple[Any, dict[str, Any]]:
    pipe = stable_diffusion("StableDiffusionImg2ImgPipeline")
    return pipe, words() | GUIDED | {"image": picture(), "strength": 0.5}


@family("vp", "inpaint", strength=0.5)
def sd_inpaint_4() -> tuple[Any, dict[str, Any]]:
    pipe = stable_diffusion("StableDiffusionInpaintPipeline")
    return pipe, words() | SIZE | GUIDED | {"image": picture(), "mask_image": mask(), "strength": 0.5}


@family("vp", "inpaint")
def sd_inpaint_9() -> tuple[Any, dict[str, Any]]:
    pipe = stable_diffusion("StableDiffusionInpaintPipeline", model=unet(in_channels=9))
    return pipe, words() | SIZE | GUIDED | {"image": picture(), "mask_image": mask(), "strength": 1.0}


@family("vp")
def sd_controlnet() -> tuple[Any, dict[str, Any]]:
    control = diffusers.ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=8,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(8,),
    )  # fmt: skip
    pipe = stable_diffusion("StableDiffusionControlNetPipeline", controlnet=control)
    return pipe, words() | SIZE | GUIDED | {"image": picture()}


@family("vp")
def sd_pag() -> tuple[Any, dict[str, Any]]:
    return stable_diffusion("StableDiffusionPAGPipeline", pag_applied_layers="mid"), words() | SIZE | GUIDED


@family("vp")
def sd_pix2pix() -> tuple[Any, dict[str, Any]]:
    pipe = stable_diffusion("StableDiffusionInstructPix2PixPipeline", model=unet(in_channels=8))
    return pipe, words() | GUIDED | {"image": picture()}


@family("vp")
def sd_upscale() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusionUpscalePipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet(in_channels=7, num_class_embeds=1000),
        low_res_scheduler=diffusers.DDPMScheduler(), scheduler=vp(prediction_type="v_prediction"), max_noise_level=350,
    )  # fmt: skip
    return pipe, words() | GUIDED | {"image": picture()}


def sdxl_parts(kind: str, **parts: Any) -> Any:
    model = unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=POOLED + 24
    )
    if kind == "StableDiffusionXLPipeline":
        parts["add_watermarker"] = False
    return getattr(diffusers, kind)(
        vae=vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=model,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading",
            steps_offset=1,
        ), **parts,
    )  # fmt: skip


@family("vp")
def sdxl() -> tuple[Any, dict[str, Any]]:
    return sdxl_parts("StableDiffusionXLPipeline"), words(pooled=True) | SIZE | GUIDED


@family("vp", "img2img", strength=0.5)
def sdxl_img2img() -> tuple[Any, dict[str, Any]]:
    pipe = sdxl_parts("StableDiffusionXLImg2ImgPipeline", add_watermarker=False)
    return pipe, words(pooled=True) | GUIDED | {"image": picture(), "strength": 0.5}


@family("vp", "inpaint", strength=0.5)
def sdxl_inpaint() -> tuple[Any, dict[str, Any]]:
    pipe = sdxl_parts("StableDiffusionXLInpaintPipeline", add_watermarker=False)
    return pipe, words(pooled=True) | SIZE | GUIDED | {"image": picture(), "mask_image": mask(), "strength": 0.5}


def pixart(kind: str, extra: bool) -> Any:
    model = diffusers.PixArtTransformer2DModel(
        sample_size=SIDE, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, cross_attention_dim=WIDTH, caption_channels=WIDTH, use_additional_conditions=extra,
        norm_type="ada_norm_single",
    )  # fmt: skip
    return getattr(diffusers, kind)(tokenizer=None, text_encoder=None, vae=vae(), transformer=model, scheduler=vp())


def pixart_call() -> dict[str, Any]:
    return words(attention=True) | SIZE | GUIDED | {"negative_prompt": None, "use_resolution_binning": False}


@family("vp")
def pixart_alpha() -> tuple[Any, dict[str, Any]]:
    return pixart("PixArtAlphaPipeline", False), pixart_call()


@family("vp")
def pixart_sigma() -> tuple[Any, dict[str, Any]]:
    return pixart("PixArtSigmaPipeline", False), pixart_call()


@family("vp")
def dit() -> tuple[Any, dict[str, Any]]:
    model = diffusers.DiTTransformer2DModel(
        sample_size=SIDE, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return diffusers.DiTPipeline(model, vae(), vp()), {"class_labels": [3], "guidance_scale": 3.0, "output_type": "np"}


@family("vp")
def hunyuan_dit() -> tuple[Any, dict[str, Any]]:
    model = diffusers.HunyuanDiT2DModel(
        sample_size=SIDE, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, hidden_size=16,
        in_channels=4, cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=POOLED,
        text_len=WORDS, text_len_t5=WORDS, use_style_cond_and_image_meta_size=False, activation_fn="gelu-approximate",
    )  # fmt: skip
    pipe = diffusers.HunyuanDiTPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, transformer=model, scheduler=vp(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    call = words(attention=True)
    for key in list(call):
        call[f"{key}_2"] = call[key].clone()
    return pipe, call | GUIDED | {"height": 16, "width": 16, "use_resolution_binning": False}


@family("vp")
def cogvideox() -> tuple[Any, dict[str, Any]]:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=WIDTH, num_layers=1, sample_width=4, sample_height=4, sample_frames=5, patch_size=2,
        max_text_seq_length=WORDS, temporal_compression_ratio=4,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0,
    )  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(None, None, autoencoder, model, scheduler)
    return pipe, words() | GUIDED | {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": WORDS}


@family("vp")
def allegro() -> tuple[Any, dict[str, Any]]:
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=48, sample_width=4, sample_height=4, sample_frames=2, caption_channels=WIDTH,
        interpolation_scale_h=1.0, interpolation_scale_w=1.0, interpolation_scale_t=1.0,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLAllegro(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    pipe = diffusers.AllegroPipeline(None, None, autoencoder, model, vp())
    size = {"height": 32, "width": 32, "num_frames": 8, "negative_prompt": None, "clean_caption": False}
    return pipe, words(attention=True) | GUIDED | size


@family("vp")
def latte() -> tuple[Any, dict[str, Any]]:
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=WIDTH, attention_bias=True, sample_size=SIDE, patch_size=2, num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, activation_fn="gelu-approximate",
        caption_channels=WIDTH, video_length=1,
    )  # fmt: skip
    pipe = diffusers.LattePipeline(None, None, vae(), model, vp())
    return pipe, words() | SIZE | GUIDED | {"negative_prompt": None, "video_length": 1, "clean_caption": False}


@family("edm")
def svd() -> tuple[Any, dict[str, Any]]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    # The spatio-temporal blocks normalise groups of 32 channels: these widths are the least they take.
    model = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=SIDE, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=WIDTH,
        num_attention_heads=(1, 2), addition_time_embed_dim=4, projection_class_embeddings_input_dim=12,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_frames=2,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", interpolation_type="linear",
        prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002, steps_offset=1, timestep_spacing="leading",
        timestep_type="continuous", use_karras_sigmas=True,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=16, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2,
                         image_size=SIDE, intermediate_size=16, patch_size=4)
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32,), latent_channels=4, sample_size=SIDE)
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=autoencoder, image_encoder=encoder, unet=model, scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(crop_size=SIDE, size=SIDE),
    )  # fmt: skip
    call = {"image": picture(), "num_frames": 2, "min_guidance_scale": 1.0, "max_guidance_scale": 2.5}
    return pipe, call | SIZE


def pixel_unet() -> Any:
    return diffusers.UNet2DModel(
        sample_size=SIDE, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, in_channels=3,
        out_channels=3, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@family("vp")
def ddpm() -> tuple[Any, dict[str, Any]]:
    return diffusers.DDPMPipeline(pixel_unet(), diffusers.DDPMScheduler()), {"output_type": "np"}


@family("vp")
def ddim() -> tuple[Any, dict[str, Any]]:
    return diffusers.DDIMPipeline(pixel_unet(), diffusers.DDIMScheduler()), {"output_type": "np"}


# -- flow families -----------------------------------------------------------------------------------------------------


def sd3_parts(kind: str, channels: int = 4) -> Any:
    model = diffusers.SD3Transformer2DModel(
        sample_size=SIDE, patch_size=1, in_channels=channels, out_channels=channels, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=WIDTH, pooled_projection_dim=POOLED,
        pos_embed_max_size=16,
    )  # fmt: skip
    return getattr(diffusers, kind)(
        transformer=model, scheduler=flow(shift=3.0), vae=flux_vae(channels), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


@family("flow")
def sd3() -> tuple[Any, dict[str, Any]]:
    return sd3_parts("StableDiffusion3Pipeline"), words(pooled=True) | SIZE | GUIDED


@family("flow", "img2img", strength=0.5)
def sd3_img2img() -> tuple[Any, dict[str, Any]]:
    pipe = sd3_parts("StableDiffusion3Img2ImgPipeline")
    return pipe, words(pooled=True) | SIZE | GUIDED | {"image": picture(), "strength": 0.5}


@family("flow", "inpaint", strength=0.5)
def sd3_inpaint() -> tuple[Any, dict[str, Any]]:
    pipe = sd3_parts("StableDiffusion3InpaintPipeline", 16)  # the pipeline insists on 16 or 33
    return pipe, words(pooled=True) | SIZE | GUIDED | {"image": picture(), "mask_image": mask(), "strength": 0.5}


def flux_parts(kind: str, scheduler: Any) -> Any:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return getattr(diffusers, kind)(scheduler, flux_vae(), None, None, None, None, model)


def flux_call(negative: bool = False) -> dict[str, Any]:
    call = words(pooled=True)
    return (call if negative else {k: v for k, v in call.items() if not k.startswith("negative")}) | SIZE


@family("flow")
def flux_dev() -> tuple[Any, dict[str, Any]]:
    return flux_parts("FluxPipeline", dynamic()), flux_call()


@family("flow")
def flux_schnell() -> tuple[Any, dict[str, Any]]:
    return flux_parts("FluxPipeline", flow(shift=1.0)), flux_call()


@family("flow", calls=2)
def flux_true_cfg() -> tuple[Any, dict[str, Any]]:
    return flux_parts("FluxPipeline", dynamic()), flux_call(True) | {"true_cfg_scale": 3.0}


@family("flow", "img2img", strength=0.5, strength_of_timesteps=True)
def flux_img2img() -> tuple[Any, dict[str, Any]]:
    pipe = flux_parts("FluxImg2ImgPipeline", dynamic())
    return pipe, flux_call() | {"image": picture(), "strength": 0.5}


@family("flow", "inpaint", strength=0.5, strength_of_timesteps=True)
def flux_inpaint() -> tuple[Any, dict[str, Any]]:
    pipe = flux_parts("FluxInpaintPipeline", dynamic())
    return pipe, flux_call() | {"image": picture(), "mask_image": mask(), "strength": 0.5}


@family("flow")
def flux2() -> tuple[Any, dict[str, Any]]:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=SIDE,
    )  # fmt: skip
    pipe = diffusers.Flux2Pipeline(dynamic(), autoencoder, None, None, model)
    return pipe, {"prompt_embeds": noise(1, WORDS, WIDTH)} | SIZE


@family("flow", calls=2)
def chroma() -> tuple[Any, dict[str, Any]]:
    model = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    pipe = diffusers.ChromaPipeline(dynamic(), flux_vae(), None, None, model)
    masks = {key: torch.ones(1, WORDS) for key in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    return pipe, words() | masks | SIZE | GUIDED


def qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip


def qwen_parts(kind: str) -> Any:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return getattr(diffusers, kind)(dynamic(), qwen_vae(), None, None, model)


def qwen_call() -> dict[str, Any]:
    ones = torch.ones(1, WORDS, dtype=torch.long)
    masks = {"prompt_embeds_mask": ones, "negative_prompt_embeds_mask": ones}
    return words() | masks | {"height": 16, "width": 16, "true_cfg_scale": 3.0}


@family("flow", calls=2)
def qwen_image() -> tuple[Any, dict[str, Any]]:
    return qwen_parts("QwenImagePipeline"), qwen_call()


@family("flow", "img2img", strength=0.5, calls=2, strength_of_timesteps=True)
def qwen_img2img() -> tuple[Any, dict[str, Any]]:
    return qwen_parts("QwenImageImg2ImgPipeline"), qwen_call() | {"image": picture(16), "strength": 0.5}


@family("flow", "inpaint", strength=0.5, calls=2, strength_of_timesteps=True)
def qwen_inpaint() -> tuple[Any, dict[str, Any]]:
    call = qwen_call() | {"image": picture(16), "mask_image": mask(16), "strength": 0.5}
    return qwen_parts("QwenImageInpaintPipeline"), call


def z_image_parts(kind: str) -> Any:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 8], axes_lens=[64, 32, 32],
    )  # fmt: skip
    return getattr(diffusers, kind)(flow(shift=3.0), flux_vae(), None, None, model)


def z_image_call() -> dict[str, Any]:
    embeddings = {"prompt_embeds": [noise(WORDS, WIDTH)], "negative_prompt_embeds": [noise(WORDS, WIDTH, seed=2)]}
    return embeddings | SIZE | GUIDED


@family("flow")
def z_image() -> tuple[Any, dict[str, Any]]:
    return z_image_parts("ZImagePipeline"), z_image_call()


@family("flow", "img2img", strength=0.5, strength_of_timesteps=True)
def z_image_img2img() -> tuple[Any, dict[str, Any]]:
    return z_image_parts("ZImageImg2ImgPipeline"), z_image_call() | {"image": picture(), "strength": 0.5}


def wan_parts(kind: str) -> Any:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=WIDTH, freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return getattr(diffusers, kind)(
        tokenizer=None, text_encoder=None, vae=autoencoder, scheduler=scheduler, transformer=model
    )


@family("flow", calls=2)
def wan() -> tuple[Any, dict[str, Any]]:
    return wan_parts("WanPipeline"), words() | GUIDED | {"height": 32, "width": 32, "num_frames": 5}


@family("flow", "img2img", strength=0.5, calls=2)
def wan_v2v() -> tuple[Any, dict[str, Any]]:
    video = torch.rand(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    pipe = wan_parts("WanVideoToVideoPipeline")
    return pipe, words() | GUIDED | {"height": 32, "width": 32, "video": video, "strength": 0.5}


@family("flow")
def sana() -> tuple[Any, dict[str, Any]]:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
        sample_size=SIDE, patch_size=1,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        upsample_block_type="interpolate", downsample_block_type="stride_conv", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.SanaPipeline(None, None, autoencoder, model, scheduler)
    size = {"height": 32, "width": 32, "negative_prompt": None, "use_resolution_binning": False}
    return pipe, words(attention=True) | GUIDED | size


@family("flow")
def ltx() -> tuple[Any, dict[str, Any]]:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=WIDTH,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1, patch_size_t=1,
    )  # fmt: skip
    scheduler = flow(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=16, max_image_seq_len=64,
        shift_terminal=0.1,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(scheduler, autoencoder, None, None, model)
    return pipe, words(attention=True) | GUIDED | {"height": 32, "width": 32, "num_frames": 9}


@family("flow", calls=2)
def lumina2() -> tuple[Any, dict[str, Any]]:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=8, num_layers=1, num_refiner_layers=1,
        num_attention_heads=1, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128),
        cap_feat_dim=WIDTH,
    )  # fmt: skip
    pipe = diffusers.Lumina2Pipeline(model, dynamic(), flux_vae(), None, None)
    return pipe, words(attention=True) | GUIDED | {"height": 16, "width": 16}


@family("flow")
def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, text_embed_dim=WIDTH, pooled_projection_dim=POOLED, rope_axes_dim=(2, 4, 2),
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    pipe = diffusers.HunyuanVideoPipeline(None, None, model, autoencoder, flow(shift=7.0), None, None)
    call = {k: v for k, v in words(pooled=True, attention=True).items() if not k.startswith("negative")}
    return pipe, call | {"height": 16, "width": 16, "num_frames": 5}


@family("flow", calls=2)
def cogview4() -> tuple[Any, dict[str, Any]]:
    model = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4, sample_size=SIDE, rope_axes_dim=(8, 8),
    )  # fmt: skip
    scheduler = flow(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
    )
    pipe = diffusers.CogView4Pipeline(None, None, vae(), model, scheduler)
    return pipe, words() | GUIDED | {"height": 16, "width": 16}


@family("flow")
def aura_flow() -> tuple[Any, dict[str, Any]]:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=SIDE, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16,
        pos_embed_max_size=64,
    )  # fmt: skip
    pipe = diffusers.AuraFlowPipeline(None, None, vae(), model, flow(shift=1.73))
    return pipe, words(attention=True) | SIZE | GUIDED


@family("flow")
def mochi() -> tuple[Any, dict[str, Any]]:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=WIDTH, time_embed_dim=4, max_sequence_length=WORDS,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    pipe = diffusers.MochiPipeline(flow(invert_sigmas=True), autoencoder, None, None, model)
    ones = torch.ones(1, WORDS, dtype=torch.bool)
    masks = {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
    return pipe, words() | masks | GUIDED | {"height": 16, "width": 16, "num_frames": 7}
