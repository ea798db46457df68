"""Pictures of a cell from a diffusers pipeline: seeds in, uint8 pictures with features and labels out.

Every seed has its own generator and every chunk the same number of rows, so a picture depends on its seed alone: not
on the process, the order or what else is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.run.matrix import Cell, stock_options


def load_model(model: str, device: str = "cpu") -> tuple[Any, str]:
    """A pipeline and its weights' fingerprint: an embedded model by name, or a local folder of diffusers' layout."""
    from diffsamp import models

    if model in models.names():
        pipe = models.load(model, device=device)
        if not hasattr(pipe, "scheduler"):
            raise DiffsampError(f"model={model!r} makes no pictures; accepted: fashion, or a folder")
        print_fingerprint = models.fingerprint(model)
    else:
        folder = Path(model)
        if not (folder / "model_index.json").is_file():
            raise DiffsampError(f"model={model!r} is no embedded model and no folder with a model_index.json")
        import hashlib

        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device)
        digest = hashlib.sha256()
        for file in sorted(folder.rglob("*.safetensors")):
            digest.update(file.relative_to(folder).as_posix().encode() + hashlib.sha256(file.read_bytes()).digest())
        print_fingerprint = digest.hexdigest()
    pipe.set_progress_bar_config(disable=True)
    return pipe, print_fingerprint


def set_solver(pipe: Any, name: str, config: dict[str, Any], grid: str | None = None) -> None:
    """Give the pipeline a solver of the registry or a stock scheduler, made from the model's own scheduler config."""
    import diffusers

    if name.startswith("diffusers:"):
        found, options = stock_options(name)
        try:
            pipe.scheduler = getattr(diffusers, found).from_config(config, **options)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise DiffsampError(f"solver={name!r} does not accept this model ({str(error)[:150]})") from None
        return
    from diffsamp.adapters.use import use

    pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    use(pipe, name, grid=grid or None)


def guidance_of(pipe: Any, scale: float | None) -> float:
    """The guidance scale that a call with `scale` uses: the pipeline's own where it is None, 1 where it has none."""
    if scale is not None:
        return float(scale)
    own = getattr(pipe, "config", {}).get("default_guidance_scale")
    if own is None:
        default = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
        own = default.default if default is not None and isinstance(default.default, int | float) else 1.0
    return float(own)


def steps_for(scheduler: Any, nfe: int) -> int:
    """The most steps whose network calls do not exceed `nfe` (a two-stage method makes about two calls a step)."""
    for steps in range(nfe, 0, -1):
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, IndexError, ZeroDivisionError):
            continue  # a few schedulers have a smallest or largest step count
        if len(scheduler.timesteps) <= nfe:
            return steps
    raise DiffsampError(f"nfe={nfe} is too few network calls for {type(scheduler).__name__}")


class PipelineGenerator:
    """The `generate` of a cell: seeds [n] to images, features, labels and logits where there are any.

    The first `keep` seeds keep their picture ("images" uint8 [n, c, h, w]) and their sample ("samples" float32), for
    picture grids and trajectory errors; other rows of these two are dropped to keep the chunks small. `width` is the
    reference's number of features: another extractor's is refused with the first chunk and not after the last.
    """

    def __init__(
        self, pipe: Any, cell: Cell, extractor: Any, *, steps: int, first_seed: int, keep: int, chunk: int,
        prompts: Sequence[str] = (), keep_all: bool = False, threads: int | None = None,
        width: int | None = None,
    ) -> None:  # fmt: skip
        self.pipe, self.cell, self.extractor, self.steps = pipe, cell, extractor, steps
        self.first_seed, self.keep, self.chunk, self.keep_all = first_seed, keep, chunk, keep_all
        self.prompts, self.threads, self.width = list(prompts), threads, width
        self.calls, self.device = 0, str(pipe.device)
        network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        if network is not None:
            network.register_forward_pre_hook(self._count)
        self._accepted = inspect.signature(pipe.__call__).parameters
        self._classes = len(getattr(pipe, "classes", {}) or {})

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def arguments(self, seeds: np.ndarray) -> dict[str, Any]:
        """What the pipeline is called with for these seeds."""
        import torch

        made: dict[str, Any] = {
            "generator": [torch.Generator().manual_seed(int(seed)) for seed in seeds],
            "num_inference_steps": self.steps,
        }
        if self.cell.guidance_scale is not None and "guidance_scale" in self._accepted:
            made["guidance_scale"] = self.cell.guidance_scale
        if "class_labels" in self._accepted:
            made["class_labels"] = self.labels(seeds).tolist()
        elif "prompt" in self._accepted:
            if not self.prompts:
                raise DiffsampError("prompts is empty; this model needs --prompts FILE with one prompt a line")
            made["prompt"] = [self.prompts[int(seed) % len(self.prompts)] for seed in seeds]
        else:
            made["batch_size"] = len(seeds)
        return made

    def labels(self, seeds: np.ndarray) -> np.ndarray:
        """The class of each seed: all classes in turn."""
        return np.asarray(seeds, np.int64) % max(self._classes, 1)

    def __call__(self, seeds: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        # A worker that got this object from another process has its own default, and pictures depend on it.
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        with torch.inference_mode():
            latent = isinstance(self._classes, int) and self._classes > 0
            out = self.pipe(**self.arguments(seeds), output_type="latent" if latent else "pt").images
        scaled = (out.float() / 2 + 0.5) if latent else out.float()
        pictures = (torch.nan_to_num(scaled).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        found: dict[str, np.ndarray] = dict(self.extractor(pictures))
        if self.width not in (None, found["features"].shape[1]):
            raise DiffsampError(
                f"reference has {self.width} features per picture and extractor={self.extractor.name} gives "
                f"{found['features'].shape[1]}; both must come from one extractor"
            )
        found["finite"] = torch.isfinite(out).flatten(1).all(1).cpu().numpy().astype(np.uint8)
        if self._classes:
            found["labels"] = self.labels(seeds)
        # Chunks are kept whole or not: the choice depends on the first seed alone, so padding never changes it.
        if self.keep_all or int(seeds[0]) - self.first_seed < self.keep:
            found["images"] = pictures.numpy()
            found["samples"] = out.float().cpu().numpy()
        return found
