"""Feature extractors by name, each with a fingerprint of its weights.

fashion-cnn            the embedded classifier (128 features, logits of 10 classes): no download
inception-fid          the Inception of FID, from a local weights file
torchvision:NAME       a torchvision network, weights from --feature-weights
timm:NAME              a timm network, weights from --feature-weights
hf:FOLDER              a transformers vision model in a local folder (DINOv2, CLIP)
MODULE:ATTRIBUTE       your own: a callable from uint8 [n, c, h, w] to features [n, d], or a class or function that
makes one
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffsamp.errors import DiffsampError
from diffsamp.metrics import weights
from diffsamp.metrics.resize import check_resize, resize

NAMES = ("fashion-cnn", "inception-fid", "torchvision:NAME", "timm:NAME", "hf:FOLDER", "MODULE:ATTRIBUTE")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Extractor:
    """A named network from pictures to features.

    Calling it with uint8 pictures [n, c, h, w] gives {"features": float32 [n, d]} and, where the network classifies,
    {"logits": float32 [n, classes]}.
    """

    name: str
    fingerprint: str
    resize: str
    run: Callable[[torch.Tensor], dict[str, torch.Tensor]] = field(repr=False, compare=False)

    @property
    def distance_name(self) -> str:
        """FID only for the FID Inception with its published weights; FD[name] for everything else."""
        return "FID" if self.name == "inception-fid" else f"FD[{self.name}]"

    def __call__(self, pictures: np.ndarray | torch.Tensor) -> dict[str, np.ndarray]:
        found = torch.as_tensor(pictures)
        if found.dtype != torch.uint8 or found.ndim != 4:
            raise DiffsampError(f"pictures is {found.dtype} {tuple(found.shape)}; accepted: uint8 [n, c, h, w]")
        with torch.inference_mode():
            out = self.run(found)
        return {key: value.float().cpu().numpy() for key, value in out.items()}


def extractor(
    name: str = "fashion-cnn",
    *,
    resize: str = "tf1",
    feature_weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Extractor:
    """An extractor by name; see this module's head. Raises DiffsampError for an unknown name or missing weights."""
    check_resize(resize)
    if name == "fashion-cnn":
        return _fashion(device)
    if name == "inception-fid":
        return _inception(resize, feature_weights, device)
    kind, colon, rest = name.partition(":")
    if not colon or not rest:
        raise DiffsampError(f"extractor={name!r}; accepted: {', '.join(NAMES)}")
    if kind in ("torchvision", "timm"):
        return _zoo(kind, rest, resize, feature_weights, device)
    if kind == "hf":
        return _hugging_face(rest, device)
    return _custom(kind, rest, name)


def _fashion(device: Any) -> Extractor:
    from diffsamp import models

    network = models.classifier(device=device)

    def run(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        features = network.features(pictures.to(device))
        return {"features": features, "logits": network.head(features)}

    return Extractor("fashion-cnn", models.fingerprint("fashion-cnn"), "none", run)


def _inception(how: str, path: Any, device: Any) -> Extractor:
    from diffsamp.metrics.inception import InceptionFID

    file, digest = weights.find(path)
    network = InceptionFID(how)
    weights.load_into(network, file)
    network.to(device)
    name = "inception-fid" if digest.startswith(weights.HASH_PREFIX) else f"inception-{digest[:8]}"

    def run(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        features, logits = network(pictures.to(device))
        return {"features": features, "logits": logits}

    return Extractor(name, digest, how, run)


def _zoo(kind: str, name: str, how: str, path: Any, device: Any) -> Extractor:
    try:
        library = importlib.import_module("torchvision.models" if kind == "torchvision" else "timm")
    except ImportError:
        raise DiffsampError(f"extractor={kind}:{name} needs the package {kind}; install it with pip") from None
    if path is None or not Path(path).is_file():
        raise DiffsampError(f"feature_weights={path!r}; extractor={kind}:{name} needs a local file of its weights")
    try:
        network = library.get_model(name, weights=None) if kind == "torchvision" else library.create_model(name)
    except Exception as error:
        raise DiffsampError(f"extractor={kind}:{name} is not a network of {kind} ({str(error)[:100]})") from None
    weights.load_into(network, Path(path))
    head = network.get_classifier() if kind == "timm" else list(network.modules())[-1]
    seen: list[torch.Tensor] = []
    # The features are what the last linear layer is given: that holds for every classifier of both libraries.
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.to(device).eval()

    def run(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.clear()
        logits = network(_imagenet(pictures.to(device), 224, how))
        return {"features": seen.pop().flatten(1), "logits": logits}

    return Extractor(f"{kind}:{name}", weights.sha256_of(Path(path)), how, run)


def _imagenet(pictures: torch.Tensor, size: int, how: str) -> torch.Tensor:
    x = resize(pictures.float().expand(-1, 3, -1, -1), size, how) / 255
    shape = (1, 3, 1, 1)
    return (x - x.new_tensor(IMAGENET_MEAN).view(shape)) / x.new_tensor(IMAGENET_STD).view(shape)


def _hugging_face(folder: str, device: Any) -> Extractor:
    path = Path(folder)
    file = path / "model.safetensors"
    if not file.is_file():
        raise DiffsampError(f"extractor=hf:{folder}: no file model.safetensors there; accepted: a local model folder")
    from transformers import AutoImageProcessor, AutoModel

    network = AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
    network = getattr(network, "vision_model", network).to(device).eval()
    processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)

    def run(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = processor(images=list(pictures.expand(-1, 3, -1, -1)), return_tensors="pt").to(device)
        return {"features": network(pixel_values=inputs["pixel_values"]).pooler_output}

    return Extractor(f"hf:{path.name}", weights.sha256_of(file), "processor", run)


def _custom(module: str, attribute: str, name: str) -> Extractor:
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DiffsampError(f"extractor={name!r} cannot be imported ({error}); accepted: {', '.join(NAMES)}") from None
    made = found() if isinstance(found, type) else found
    if not callable(made):
        raise DiffsampError(f"extractor={name!r} is not callable; accepted: uint8 [n, c, h, w] to features [n, d]")
    if isinstance(made, torch.nn.Module):
        digest = hashlib.sha256()
        for key, value in sorted(made.state_dict().items()):
            digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        fingerprint = digest.hexdigest()
    else:
        fingerprint = getattr(made, "fingerprint", "unknown")

    def run(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        out = made(pictures)
        out = out if isinstance(out, dict) else {"features": out}
        return {key: torch.as_tensor(value) for key, value in out.items()}

    return Extractor(name, fingerprint, "own", run)
