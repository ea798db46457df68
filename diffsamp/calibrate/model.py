"""What a calibration needs of a model: its process, its guided denoiser, its start noise and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import rng
from ..errors import DiffsampError
from ..pixels import eight_bit
from ..process import Level, Process
from .reference import Denoiser

# Calibration seeds start here, held-out ones below it: benchmarks use small seeds and never see these.
CALIBRATION_SEED = 1_000_000
HELD_OUT_SEED = 2_000_000
# Pictures of which only a distance is taken.
PICTURE_SEED = 3_000_000
# Noises at which the network is asked for its means.
MEAN_SEED = 4_000_000


@dataclass(frozen=True)
class Model:
    """A class-conditional model under calibration.

    Attributes:
        name, sha256: of the weights.
        process: its noise process.
        prediction: type of its output.
        shape: of one sample.
        classes: number of classes; labels of the points go round them.
        guided: ``(labels, guidance scale) -> denoiser``; differentiable where its input asks for it (method adamw).
        pictures: final states → uint8 pictures [n, c, h, w], for a search that looks at pictures; None: it has none.
    """

    name: str
    sha256: str
    process: Process
    prediction: str
    shape: tuple[int, ...]
    classes: int
    guided: Callable[[torch.Tensor, float], Denoiser]
    pictures: Callable[[torch.Tensor], torch.Tensor] | None = None

    def points(self, seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(unit noise, labels) of the given seeds; the label of a seed is seed modulo classes."""
        noise = rng.normal(seeds, self.shape)
        return noise, torch.tensor([seed % self.classes for seed in seeds])


def fingerprint(module: torch.nn.Module) -> str:
    """sha256 of a module's weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def from_pipeline(pipeline: Any, name: str = "model") -> Model:
    """The model of a class-conditional pipeline with ``unet(x, t, class_labels)`` and a null class.

    Raises:
        DiffsampError: a pipeline of another kind.
    """
    unet, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    null = getattr(getattr(pipeline, "config", None), "null_class", None)
    if unet is None or scheduler is None or null is None:
        raise DiffsampError(
            f"model: {type(pipeline).__name__} is not a class-conditional pipeline (unet, scheduler, null_class); "
            "for others give diffsamp.calibrate.Model with your own denoiser"
        )
    config = dict(scheduler.config)
    bars = getattr(scheduler, "alphas_cumprod", None)
    if bars is None:
        raise DiffsampError(f"model: the scheduler {type(scheduler).__name__} has no table of alphas")
    process = process_of(config)
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size

    def guided(labels: torch.Tensor, scale: float) -> Denoiser:
        both = torch.cat([torch.full_like(labels, null), labels])

        def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
            # Activations are kept only for a caller that differentiates with respect to x.
            with torch.set_grad_enabled(x.requires_grad):
                moved = x.to(device=unet.device, dtype=unet.dtype)
                # A tensor, as pipelines pass it: some networks cut a Python number down to an integer.
                time = torch.full((), level.t, dtype=torch.float32, device=unet.device)
                if scale <= 1.0:
                    return unet(moved, time, labels, return_dict=False)[0].to(x.dtype)
                output = unet(torch.cat([moved, moved]), time, both, return_dict=False)[0].to(x.dtype)
                unconditional, conditional = output.chunk(2)
                return unconditional + scale * (conditional - unconditional)

        return denoise

    return Model(
        name, fingerprint(unet), process, config.get("prediction_type", "epsilon"),
        (unet.config.in_channels, height, width), int(null), guided,
        eight_bit if unet.config.in_channels in (1, 3) else None,
    )  # fmt: skip


def process_of(config: dict[str, Any]) -> Process:
    """The VP process of a diffusers scheduler's config."""
    return Process.vp(
        config.get("beta_schedule", "linear"), config.get("beta_start", 0.0001), config.get("beta_end", 0.02),
        config.get("num_train_timesteps", 1000), trained_betas=config.get("trained_betas"),
        rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )  # fmt: skip


def embedded(name: str = "fashion") -> Model:
    """The embedded model of this name."""
    from ..models import fingerprint as of_file
    from ..models import load

    return replace(from_pipeline(load(name), name), sha256=of_file(name))
