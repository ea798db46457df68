"""Ready-made rewards: callables from pictures (batch, channels, height, width), nominally in [-1, 1], to (batch,)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import DiffsampError
from ..pixels import eight_bit


def brightness(x: torch.Tensor) -> torch.Tensor:
    """Mean of all values of each picture."""
    return x.flatten(1).mean(1)


def colour(values: Sequence[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Minus the squared distance of a picture's mean colour to ``values``, one in [-1, 1] per channel."""
    wanted = [float(v) for v in values]

    def reward(x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or x.shape[1] != len(wanted):
            raise DiffsampError(f"colour: got {len(wanted)} values for pictures of shape {tuple(x.shape)}")
        return -(x.mean((2, 3)) - torch.tensor(wanted, dtype=x.dtype, device=x.device)).square().sum(1)

    return reward


def class_log_probability(classifier: Callable[[torch.Tensor], torch.Tensor], label: int | Sequence[int]) -> Callable:
    """log p(label | picture) of a classifier that gives logits; ``label``: one, or one per sample of the batch."""

    def reward(x: torch.Tensor) -> torch.Tensor:
        logs = torch.log_softmax(classifier(x.to(torch.float32)), 1)
        wanted = torch.as_tensor(label, device=logs.device).expand(len(logs))
        return logs.gather(1, wanted[:, None])[:, 0]

    return reward


def decoded(reward: Callable[[torch.Tensor], torch.Tensor], vae: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A reward of pictures as a reward of the latents of ``vae`` (a diffusers autoencoder), scaled as pipelines do."""

    def on_latents(x: torch.Tensor) -> torch.Tensor:
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        value = x.to(vae.dtype) / vae.config.scaling_factor + shift
        return reward(vae.decode(value, return_dict=False)[0])

    return on_latents


def lpips_to(
    picture: torch.Tensor, net: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = "alex"
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Minus the LPIPS distance to ``picture`` (1, 3 or 1, height, width) in [-1, 1].

    Args:
        net: ``alex``, ``vgg`` or ``squeeze``, by torchmetrics with the backbone's weights in torch's hub folder
            (nothing is downloaded); or a callable that gives the distance of two pictures (1, 3, height, width).

    Raises:
        DiffsampError: torchmetrics or the weights are missing, or a picture of another size.
    """
    metric = net if callable(net) else _lpips(net)

    def reward(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] != picture.shape[-2:]:
            raise DiffsampError(
                f"picture: is {tuple(picture.shape[-2:])} and the samples {tuple(x.shape[-2:])}; sizes must be equal"
            )
        wanted = _three(picture.reshape(1, *picture.shape[-3:]).to(x))
        found = []
        for one in _three(x).clamp(-1, 1):
            found.append(metric(one[None], wanted).reshape(()))
            if hasattr(metric, "reset"):
                metric.reset()  # torchmetrics keeps every score it has given
        return -torch.stack(found)

    return reward


def _lpips(net: str) -> Any:
    names = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
    if net not in names:
        raise DiffsampError(f"net: got {net!r}; accepted: {', '.join(names)}, or a callable")
    try:
        import torchvision
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except ImportError as error:
        raise DiffsampError(f"lpips_to: needs torchmetrics and torchvision: {error}") from None
    name = getattr(torchvision.models, names[net]).DEFAULT.url.rpartition("/")[2]
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if not os.path.exists(path):
        raise DiffsampError(f"net: the weights of {net!r} are missing; put {name} at {path}, or give a callable")
    return LearnedPerceptualImagePatchSimilarity(net_type=net)  # type: ignore[arg-type]


def clip_score(prompt: str, model: str | Callable[[], tuple[Any, Any]]) -> Callable[[torch.Tensor], torch.Tensor]:
    """CLIP score (up to 100) of pictures for a prompt by torchmetrics. It has no gradient: steering only.

    Args:
        model: local folder of a CLIP model with its processor (nothing is downloaded), or a callable that gives
            (model, processor).

    Raises:
        DiffsampError: torchmetrics or transformers is missing, or the folder does not hold such a model.
    """
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise DiffsampError(f"clip_score: needs torchmetrics and transformers: {error}") from None
    pair: Any
    if callable(model):
        pair = model()
    elif not os.path.isfile(os.path.join(model, "config.json")):
        raise DiffsampError(f"model: the weights of CLIP are missing: {model!r} is no folder with a config.json")
    else:
        try:
            pair = (
                CLIPModel.from_pretrained(model, local_files_only=True, use_safetensors=True),
                CLIPProcessor.from_pretrained(model, local_files_only=True),
            )
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise DiffsampError(f"model: {model!r} does not hold a CLIP model with its processor: {reason}") from None
    metric = CLIPScore(model_name_or_path=lambda: (_TensorFeatures(pair[0]), pair[1]))

    def reward(x: torch.Tensor) -> torch.Tensor:
        pixels = eight_bit(_three(x))
        scores = []
        for one in pixels:
            scores.append(metric(one, prompt).detach())
            metric.reset()
        return torch.stack(scores)

    return reward


class _TensorFeatures(torch.nn.Module):
    """A CLIP model whose features are tensors: transformers 5 gives objects, which torchmetrics cannot take."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *inputs: Any, **options: Any) -> torch.Tensor:
        return self._tensor(self.model.get_image_features(*inputs, **options))

    def get_text_features(self, *inputs: Any, **options: Any) -> torch.Tensor:
        return self._tensor(self.model.get_text_features(*inputs, **options))

    @staticmethod
    def _tensor(found: Any) -> torch.Tensor:
        return found if isinstance(found, torch.Tensor) else found.pooler_output


def _three(x: torch.Tensor) -> torch.Tensor:
    """Grey pictures as three equal channels."""
    return x if x.shape[1] == 3 else x.expand(-1, 3, -1, -1)
