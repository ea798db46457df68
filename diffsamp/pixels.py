"""Samples as pictures of 8 bits."""

from __future__ import annotations

import torch


def eight_bit(x: torch.Tensor) -> torch.Tensor:
    """uint8 pictures of samples in [-1, 1], of any shape."""
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
