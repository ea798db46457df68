"""The embedded models by name: `load("fashion")` is a diffusers pipeline, `load("fashion-cnn")` a classifier."""

from __future__ import annotations

from typing import Any

import torch

from diffsamp.errors import DiffsampError
from diffsamp.models.weights import fill, read_config, read_tensors

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
MODELS = ("fashion", "fashion-cnn", "kjv")


def names() -> tuple[str, ...]:
    """The names that `load` accepts."""
    return MODELS


def config(name: str) -> dict[str, Any]:
    """What is known of an embedded model: weights file and sha256, architecture, training facts, figures."""
    if name not in MODELS:
        raise DiffsampError(f"model={name!r} is not an embedded model; accepted: {', '.join(MODELS)}")
    return read_config(name)


def fingerprint(name: str) -> str:
    """The sha256 of an embedded model's weights file, in hexadecimal; artifacts made with it should record it."""
    return config(name)["sha256"]


def load(name: str = "fashion", *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """An embedded model, ready to use, from files inside the package.

    "fashion" gives a `diffsamp.ClassConditionalPipeline` (a diffusers `DiffusionPipeline`; its default scheduler is the
    entry "scheduler" of `fashion.json`), "fashion-cnn" a `FashionClassifier`, "kjv" a `diffsamp.masked.TextModel`.
    Raises `DiffsampError` for an unknown
    name or a weights file that is not the one that was shipped.
    """
    facts = config(name)
    if name == "kjv":
        from diffsamp.masked import load_text_model

        return load_text_model(name, device=device)
    build = _pipeline if facts["kind"] == "pipeline" else _classifier
    return build(facts, dtype).to(device)


def classifier(*, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """The embedded Fashion-MNIST classifier: `load("fashion-cnn")`."""
    return load("fashion-cnn", dtype=dtype, device=device)


def reference() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Features of the real pictures (`fashion-reference.safetensors`) and the facts about them; keys: see README.md."""
    facts = read_config("fashion-reference")
    return read_tensors(facts), facts


def _classifier(facts: dict[str, Any], dtype: torch.dtype) -> Any:
    from diffsamp.models.fashion_cnn import FashionClassifier

    return fill(FashionClassifier, read_tensors(facts), dtype)


def _pipeline(facts: dict[str, Any], dtype: torch.dtype) -> Any:
    import diffusers
    from diffusers.models.unets.unet_2d import UNet2DModel

    from diffsamp.models.pipeline import ClassConditionalPipeline

    unet = fill(lambda: UNet2DModel(**facts["unet"]), read_tensors(facts), dtype)
    options = dict(facts["scheduler"])
    scheduler = getattr(diffusers, options.pop("_class_name"))(**options)
    return ClassConditionalPipeline(
        unet,
        scheduler,
        id2label=dict(enumerate(facts["classes"])),
        null_class=facts["null_class"],
        default_guidance_scale=facts["guidance_scale"],
        default_num_inference_steps=facts["num_inference_steps"],
    )
