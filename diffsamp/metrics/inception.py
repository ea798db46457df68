"""The Inception network of FID (2015-12-05), built from a table with the key layout of the published weights file.

It is not torchvision's network: average pools do not count padding, and the last block pools by maximum. Weights come
from a local file, see `weights.py`. Sources: Szegedy et al. 2015, arXiv:1512.00567; Heusel et al. 2017,
arXiv:1706.08500.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from diffsamp.errors import DiffsampError
from diffsamp.metrics.resize import check_resize, resize

SIZE = 299
LOGITS = 1008
# A step is (name, channels, kernel, stride, padding) or the name of a pool. A branch is a list of steps; a list inside
# a branch holds steps that all read what came before and are joined. Padding "same" keeps the size.
Step = Any
_POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}


def _c(name: str, channels: int, kernel: int | tuple[int, int] = 1, stride: int = 1) -> Step:
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (0, 0) if stride == 2 else (kernel[0] // 2, kernel[1] // 2)
    return name, channels, kernel, stride, padding


def _a(pool: int) -> list[Step]:
    return [
        [_c("branch1x1", 64)],
        [_c("branch5x5_1", 48), _c("branch5x5_2", 64, 5)],
        [_c("branch3x3dbl_1", 64), _c("branch3x3dbl_2", 96, 3), _c("branch3x3dbl_3", 96, 3)],
        ["average", _c("branch_pool", pool)],
    ]


def _b(c: int) -> list[Step]:
    row, column, double = (1, 7), (7, 1), "branch7x7dbl_"
    return [
        [_c("branch1x1", 192)],
        [_c("branch7x7_1", c), _c("branch7x7_2", c, row), _c("branch7x7_3", 192, column)],
        [_c(double + "1", c), _c(double + "2", c, column), _c(double + "3", c, row), _c(double + "4", c, column)]
        + [_c(double + "5", 192, row)],
        ["average", _c("branch_pool", 192)],
    ]


def _e(pool: str) -> list[Step]:
    def fork(name: str) -> list[Step]:
        return [_c(name + "a", 384, (1, 3)), _c(name + "b", 384, (3, 1))]

    return [
        [_c("branch1x1", 320)],
        [_c("branch3x3_1", 384), fork("branch3x3_2")],
        [_c("branch3x3dbl_1", 448), _c("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
        [pool, _c("branch_pool", 192)],
    ]


BLOCKS: dict[str, list[Step]] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": [
        [_c("branch3x3", 384, 3, 2)],
        [_c("branch3x3dbl_1", 64), _c("branch3x3dbl_2", 96, 3), _c("branch3x3dbl_3", 96, 3, 2)],
        ["halve"],
    ],
    "Mixed_6b": _b(128),
    "Mixed_6c": _b(160),
    "Mixed_6d": _b(160),
    "Mixed_6e": _b(192),
    "Mixed_7a": [
        [_c("branch3x3_1", 192), _c("branch3x3_2", 320, 3, 2)],
        [_c("branch7x7x3_1", 192), _c("branch7x7x3_2", 192, (1, 7)), _c("branch7x7x3_3", 192, (7, 1))]
        + [_c("branch7x7x3_4", 192, 3, 2)],
        ["halve"],
    ],
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("maximum"),
}
STEM: list[Step] = [
    ("Conv2d_1a_3x3", 32, (3, 3), 2, (0, 0)),
    ("Conv2d_2a_3x3", 32, (3, 3), 1, (0, 0)),
    ("Conv2d_2b_3x3", 64, (3, 3), 1, (1, 1)),
    "halve",
    ("Conv2d_3b_1x1", 80, (1, 1), 1, (0, 0)),
    ("Conv2d_4a_3x3", 192, (3, 3), 1, (0, 0)),
    "halve",
]


class _Convolution(nn.Module):
    def __init__(self, before: int, step: Step) -> None:
        super().__init__()
        _, channels, kernel, stride, padding = step
        self.conv = nn.Conv2d(before, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Path(nn.Module):
    """Runs branches of a table; its convolutions are its direct children, as the weights file names them."""

    def __init__(self, before: int, branches: list[list[Step]]) -> None:
        super().__init__()
        self.branches = branches
        self.channels = sum(self._declare(before, branch) for branch in branches)

    def _declare(self, channels: int, branch: list[Step]) -> int:
        for step in branch:
            if isinstance(step, list):
                channels = sum(self._declare(channels, [part]) for part in step)
            elif isinstance(step, tuple):
                self.add_module(step[0], _Convolution(channels, step))
                channels = step[1]
        return channels

    def _run(self, x: torch.Tensor, branch: list[Step]) -> torch.Tensor:
        for step in branch:
            if isinstance(step, list):
                x = torch.cat([self._run(x, [part]) for part in step], 1)
            else:
                x = _POOLS[step](x) if isinstance(step, str) else getattr(self, step[0])(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._run(x, branch) for branch in self.branches], 1)


class InceptionFID(_Path):
    """Pictures uint8 [n, 3, h, w] (or one grey channel) to features [n, 2048] and logits without bias [n, 1008]."""

    feature_size = 2048

    def __init__(self, resize: str = "tf1", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(3, [STEM])
        self.resize = check_resize(resize)
        channels = self.channels
        for name, branches in BLOCKS.items():
            block = _Path(channels, branches)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, LOGITS)
        self.to(dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [n, 2048] and unbiased logits [n, 1008], float32."""
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
            raise DiffsampError(
                f"pictures is {pictures.dtype} {tuple(pictures.shape)}; accepted: uint8 [n, 3, h, w] or [n, 1, h, w]"
            )
        x = pictures.expand(-1, 3, -1, -1).to(self.fc.weight.dtype)
        x = (resize(x, SIZE, self.resize) - 128) / 128
        x = self._run(x, STEM)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        features = x.mean((2, 3))
        return features.float(), (features @ self.fc.weight.T).float()
