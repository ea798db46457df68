"""A diffusers pipeline for class-conditional pixel models with classifier-free guidance.

Guidance runs both halves in one network call, ordered [unconditional, conditional], and combines them as u + w (c - u)
(Ho and Salimans 2022, arXiv:2207.12598, equation 6 with w counted from 1 = no guidance).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from diffsamp.errors import DiffsampError


class ClassConditionalPipeline(DiffusionPipeline):
    """Pictures of named classes from a `UNet2DModel` with class embeddings and any diffusers scheduler.

    `id2label` maps class numbers to names; `null_class` is the number that stands for "no class" in training with label
    dropout. A saved pipeline comes back with `ClassConditionalPipeline.from_pretrained(folder)`.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        id2label: dict | None = None,
        null_class: int = 10,
        default_guidance_scale: float = 2.0,
        default_num_inference_steps: int = 20,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            id2label=id2label,
            null_class=null_class,
            default_guidance_scale=default_guidance_scale,
            default_num_inference_steps=default_num_inference_steps,
        )
        # json turns the numbers into strings when a pipeline is saved.
        self.classes = {int(number): name for number, name in (id2label or {}).items()}
        self._guidance_scale = default_guidance_scale
        self._num_timesteps = 0

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the latest call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the latest call evaluated the network for both halves."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """The number of scheduler steps of the latest call."""
        return self._num_timesteps

    def class_id(self, label: int | str) -> int:
        """The number of a class given by number or by name (case does not matter)."""
        if isinstance(label, str):
            for number, name in self.classes.items():
                if name.casefold() == label.casefold():
                    return number
        elif isinstance(label, int) and (label in self.classes or (not self.classes and 0 <= label < self._null_class)):
            return label
        accepted = ", ".join(f"{number} {name}" for number, name in self.classes.items())
        raise DiffsampError(
            f"class_labels holds {label!r}; accepted: {accepted or f'numbers from 0 to {self._null_class - 1}'}"
        )

    @property
    def _null_class(self) -> int:
        return self.config["null_class"]

    def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        """`eta` and `generator`, each only if the scheduler's `step` takes it."""
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"eta": eta, "generator": generator}
        return {name: value for name, value in offered.items() if name in accepted}

    def prepare_timesteps(
        self, num_inference_steps: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None, device: Any
    ) -> torch.Tensor:
        """Set the scheduler's grid by step count, by timesteps or by sigmas, and return its timesteps."""
        if timesteps is not None and sigmas is not None:
            raise DiffsampError("timesteps and sigmas are both given; accepted: one of them, or neither")
        given = {"timesteps": timesteps, "sigmas": sigmas}
        given = {name: value for name, value in given.items() if value is not None}
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        for name in given:
            if name not in accepted:
                raise DiffsampError(f"{name} is given, but {type(self.scheduler).__name__}.set_timesteps takes none")
        if given:
            self.scheduler.set_timesteps(device=device, **given)
        else:
            if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
                raise DiffsampError(f"num_inference_steps={num_inference_steps!r}; accepted: an integer of at least 1")
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        return self.scheduler.timesteps

    def prepare_latents(
        self, batch_size: int, generator: Any, latents: torch.Tensor | None, device: Any, dtype: torch.dtype
    ) -> torch.Tensor:
        """Starting noise [batch_size, channels, height, width], scaled by the scheduler's `init_noise_sigma`."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise DiffsampError(f"generator is a list of {len(generator)}; accepted: one, or a list of {batch_size}")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise DiffsampError(f"latents has shape {tuple(latents.shape)}; accepted: {shape}")
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Make pictures.

        Args:
            class_labels: a class by number or name, or one per picture; None asks for pictures of no given class (and
                so without guidance).
            guidance_scale: w in u + w (c - u); at most 1 runs the conditional half alone. None: the model's default.
            num_inference_steps: scheduler steps. None: the model's default. Not used with timesteps or sigmas.
            num_images_per_prompt: pictures per entry of class_labels, next to each other.
            generator: one for the whole batch, or a list with one per picture: then a picture does not depend on what
                else is in the batch.
            latents: unit noise [pictures, channels, height, width] to start from instead.
            timesteps, sigmas: the scheduler's grid, for schedulers that take one.
            eta: passed to the scheduler's step where that takes it (DDIM).
            output_type: "pil"; "np" [n, height, width, channels] in [0, 1]; "pt" [n, channels, height, width] in
                [0, 1]; or "latent": the sample as it is, nominally in [-1, 1].
            return_dict: False returns a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": tensor}); the dictionary that it
                returns may hold replaced latents.

        Raises:
            DiffsampError: for an unknown class, a bad shape, a bad count or an unknown output_type.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise DiffsampError(f"output_type={output_type!r}; accepted: 'pil', 'np', 'pt', 'latent'")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise DiffsampError(f"callback_on_step_end_tensor_inputs holds {unknown[0]!r}; accepted: 'latents'")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise DiffsampError(f"num_images_per_prompt={num_images_per_prompt!r}; accepted: an integer of at least 1")
        default_scale, default_steps = (self.config[f"default_{n}"] for n in ("guidance_scale", "num_inference_steps"))
        self._guidance_scale = default_scale if guidance_scale is None else float(guidance_scale)
        count = default_steps if num_inference_steps is None else num_inference_steps

        if class_labels is None:
            self._guidance_scale = 1.0
            wanted = [self._null_class]
        else:
            if isinstance(class_labels, torch.Tensor):
                class_labels = class_labels.flatten().tolist()
            several = [class_labels] if isinstance(class_labels, int | str) else class_labels
            wanted = [self.class_id(label) for label in several]
            if not wanted:
                raise DiffsampError("class_labels is empty; accepted: a class, or a list of at least one")
        device, dtype = self._execution_device, self.unet.dtype
        labels = torch.tensor(wanted, device=device).repeat_interleave(num_images_per_prompt)
        batch_size = len(labels)
        if self.do_classifier_free_guidance:
            labels = torch.cat([torch.full_like(labels, self._null_class), labels])

        steps = self.prepare_timesteps(count, timesteps, sigmas, device)
        self._num_timesteps = len(steps)
        sample = self.prepare_latents(batch_size, generator, latents, device, dtype)
        extra = self.prepare_extra_step_kwargs(generator, eta)
        with self.progress_bar(total=len(steps)) as progress:  # pyright: ignore[reportCallIssue]
            for i, t in enumerate(steps):
                network_input = torch.cat([sample, sample]) if self.do_classifier_free_guidance else sample
                network_input = self.scheduler.scale_model_input(network_input, t).to(dtype)
                # No host copy here: `t` stays where the scheduler keeps it.
                prediction = self.unet(network_input, t.expand(len(network_input)), labels, return_dict=False)[0]
                if self.do_classifier_free_guidance:
                    unconditional, conditional = prediction.chunk(2)
                    prediction = unconditional + self._guidance_scale * (conditional - unconditional)
                sample = self.scheduler.step(prediction, t, sample, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    returned = callback_on_step_end(self, i, t, {"latents": sample})
                    sample = (returned or {}).get("latents", sample)
                progress.update()

        images = self.postprocess(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @staticmethod
    def postprocess(sample: torch.Tensor, output_type: str) -> Any:
        """The sample [n, channels, height, width], nominally in [-1, 1], as the asked kind of picture."""
        if output_type == "latent":
            return sample
        scaled = (sample.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return scaled
        pixels = scaled.permute(0, 2, 3, 1).cpu().numpy()
        return pixels if output_type == "np" else DiffusionPipeline.numpy_to_pil(pixels)


# `import diffsamp` is then all that a saved pipeline needs to be found again.
ClassConditionalPipeline.__module__ = "diffsamp"
