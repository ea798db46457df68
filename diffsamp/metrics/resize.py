"""How pictures are brought to the network's size: a named choice, since it moves FID by more than most methods do.

tf1: TensorFlow 1's bilinear without half-pixel centres (torch-fidelity's figures). antialias: torch's bilinear with
antialiasing (torchmetrics 1.9's default). pil-bicubic: Pillow's bicubic in float (clean-fid's figures).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from diffsamp.errors import DiffsampError

RESIZES = ("tf1", "antialias", "pil-bicubic")


def check_resize(name: str) -> str:
    """The name, or DiffsampError."""
    if name not in RESIZES:
        raise DiffsampError(f"resize={name!r}; accepted: {', '.join(RESIZES)}")
    return name


def _axis(found: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    length = found.shape[dim]
    place = torch.arange(size, dtype=torch.float32, device=found.device) * (length / size)
    low = place.floor().long().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    share = (place - low).to(found.dtype)
    share = share[:, None] if dim == 2 else share
    a, b = found.index_select(dim, low), found.index_select(dim, high)
    return a + (b - a) * share


def _pil(found: torch.Tensor, size: int) -> torch.Tensor:
    from PIL import Image

    planes = found.to(torch.float32).cpu().numpy().reshape(-1, *found.shape[2:])
    out = [np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in planes]
    scaled = torch.from_numpy(np.stack(out)).reshape(*found.shape[:2], size, size).clamp(0, 255)
    return scaled.to(found.device, found.dtype)


def resize(pictures: torch.Tensor, size: int, how: str) -> torch.Tensor:
    """Pictures [n, c, h, w], floating point in 0..255, as [n, c, size, size]."""
    check_resize(how)
    if how == "tf1":
        return _axis(_axis(pictures, size, 2), size, 3)
    if how == "antialias":
        return F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return _pil(pictures, size)
