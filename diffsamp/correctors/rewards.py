"""Ready-made rewards: callables from pictures (batch, channels, height, width), nominally in [-1, 1], to (batch,)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import DiffsampError


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
    """A reward of pictures as a reward of the latents of ``vae``."""

    def on_latents(x: torch.Tensor) -> torch.Tensor:
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        value = x.to(vae.dtype) / vae.config.scaling_factor + shift
        return reward(vae.decode(value, return_dict=False)[0])

    return on_latents


def lpips_to(picture: torch.Tensor, net: str = "alex") -> Callable[[torch.Tensor], torch.Tensor]:
    """Minus the LPIPS distance to ``picture`` (1, 3, height, width); needs torchmetrics and its backbone's weights."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type=net)  # type: ignore[arg-type]
    except Exception as error:
        raise DiffsampError(f"lpips_to: torchmetrics or the weights of {net!r} are missing: {error}") from None

    def reward(x: torch.Tensor) -> torch.Tensor:
        colour3 = (x if x.shape[1] == 3 else x.expand(-1, 3, -1, -1)).clamp(-1, 1)
        wanted = picture.to(colour3).expand(1, 3, -1, -1)
        return -torch.stack([metric(one[None], wanted) for one in colour3]).flatten()

    return reward


def clip_score(prompt: str, model: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """CLIP score (0 to 100) of pictures for a prompt by torchmetrics; ``model``: a local folder with the weights."""
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore

        metric = CLIPScore(model_name_or_path=model)  # type: ignore[arg-type]
    except Exception as error:
        raise DiffsampError(f"clip_score: torchmetrics or the weights {model!r} are missing: {error}") from None

    def reward(x: torch.Tensor) -> torch.Tensor:
        colour3 = x if x.shape[1] == 3 else x.expand(-1, 3, -1, -1)
        pixels = ((colour3 / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        scores = []
        for one in pixels:
            scores.append(metric(one, prompt).detach())
            metric.reset()
        return torch.stack(scores)

    return reward
