"""The embedded classifier of Fashion-MNIST pictures: it judges samples and is the feature extractor `fashion-cnn`.

Five 3x3 convolutions with ReLU, a global average pool, one linear layer. Batch normalisation was used in training and
folded into the convolutions afterwards, so a picture's features depend on that picture alone.
"""

from __future__ import annotations

import torch
from torch import nn

CHANNELS = (16, 32, 64, 64, 128)
STRIDES = (1, 2, 1, 2, 1)


class FashionClassifier(nn.Module):
    """Pictures [n, 1, 28, 28] or [n, 28, 28] to logits [n, 10]; `features` gives what the last layer sees, [n, 128].

    Pictures are uint8 in 0..255, or floating point in [-1, 1] (what the network of the image model produces); a white
    garment on a black ground, as in the data set. The module ships in evaluation mode and has no random parts.
    """

    feature_size = 128

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers, before = [], 1
        for channels, stride in zip(CHANNELS, STRIDES, strict=True):
            layers.append(nn.Conv2d(before, channels, 3, stride=stride, padding=1))
            before = channels
        self.convolutions = nn.ModuleList(layers)
        self.head = nn.Linear(before, classes)

    def normalise(self, pictures: torch.Tensor) -> torch.Tensor:
        """The pictures as the weights' dtype in [-1, 1], shape [n, 1, 28, 28]; ValueError for any other shape."""
        shape = tuple(pictures.shape)
        if pictures.ndim == 3:
            pictures = pictures[:, None]
        if pictures.ndim != 4 or pictures.shape[1:] != (1, 28, 28):
            raise ValueError(f"pictures has shape {shape}; accepted: [n, 1, 28, 28] or [n, 28, 28]")
        dtype = self.head.weight.dtype
        if pictures.dtype == torch.uint8:
            return pictures.to(dtype) / 127.5 - 1.0
        if not pictures.is_floating_point():
            raise TypeError(f"pictures has dtype {pictures.dtype}; accepted: uint8 in 0..255 or floating in [-1, 1]")
        return pictures.to(dtype)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features [n, 128], all >= 0 (mean over positions of ReLU outputs)."""
        x = self.normalise(pictures)
        for convolution in self.convolutions:
            x = torch.relu(convolution(x))
        return x.mean((2, 3))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Logits [n, 10] in the order of `diffsamp.models.FASHION_CLASSES`."""
        return self.head(self.features(pictures))
