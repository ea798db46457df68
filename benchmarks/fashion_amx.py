"""The embedded image network on CPUs with AMX, for measurements of many pictures: fashion_amx.cpp, and its weights.

A convolution that is split multiplies hi + lo parts in bfloat16, which is float32 to about 3e-6; others multiply plain
bfloat16. One core of a Sapphire Rapids, pictures a second: 1,030 in float32, 1,600 mixed; compiled by torch 590 mixed.
Needs a C++ compiler and ninja. One network per process.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available, load


def available() -> bool:
    """Whether the CPU has what the code uses, and there are a compiler and ninja to build it."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    tools = is_ninja_available() and shutil.which(get_cxx_compiler()) is not None
    return tools and all(flag in flags for flag in ("amx_bf16", "avx512_bf16", "avx512bw"))


@cache
def extension() -> Any:
    flags = ["-O3", "-ffast-math", "-march=sapphirerapids"]
    return load("fashion_amx", [str(Path(__file__).with_suffix(".cpp"))], extra_cflags=flags)


def packed(weight: torch.Tensor, split: bool) -> tuple[torch.Tensor, list[int], int]:
    """(tiles, where they begin within a position, numbers per position) of a weight (out, taps, in).

    A tile holds 32 products of 16 outputs, in pairs: (outputs / 16, taps · tiles, 16 pairs, 16 outputs, 2).
    """
    out, taps, channels = weight.shape

    def whole(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, -values.shape[-1] % 32))

    hi = weight.bfloat16()
    if split:
        lo = (weight - hi.float()).bfloat16()
        rows = torch.cat([hi, hi, whole(lo)], -1)
        begins, pixel = [*range(0, 2 * channels, 32), *range(0, channels, 32)], 2 * channels
    else:
        rows = whole(hi)
        begins, pixel = list(range(0, channels, 32)), rows.shape[-1]
    tiles = taps * rows.shape[-1] // 32
    pairs = rows.reshape(out // 16, 16, tiles, 16, 2).permute(0, 2, 3, 1, 4).contiguous()
    return pairs.view(torch.int16), begins, pixel


class FashionAMX(torch.nn.Module):
    """``unet(x, time, labels)`` of the embedded model; ``mixed``: only convolutions at full resolution are split."""

    def __init__(self, unet: Any, *, mixed: bool) -> None:
        super().__init__()
        self.unet, self.config = unet, unet.config
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.shifts: list[torch.nn.Module] = []
        self.width = 0
        down, up = ([block.resnets for block in blocks] for blocks in (unet.down_blocks, unet.up_blocks))
        inner = [*down[2], *unet.mid_block.resnets, *up[0]]
        for resnets, full in ((down[0], True), ([*down[1], *inner, *up[1]], False), (up[2], True)):
            for resnet in resnets:
                self._resnet(resnet, full or not mixed)
        attention = unet.mid_block.attentions[0]
        three = (attention.to_q, attention.to_k, attention.to_v)
        others = [
            self._convolution(unet.down_blocks[0].downsamplers[0].conv, True),
            self._convolution(unet.down_blocks[1].downsamplers[0].conv, not mixed),
            self._add(torch.cat([p.weight for p in three])[:, None], torch.cat([p.bias for p in three]), True),
            self._add(attention.to_out[0].weight[:, None], attention.to_out[0].bias, True),
            *(self._convolution(block.upsamplers[0].conv, not mixed) for block in unet.up_blocks[:2]),
        ]
        extension().finish(
            others, unet.conv_in.weight.detach().reshape(16, 9).t(), unet.conv_in.bias.detach(),
            unet.conv_out.weight.detach().reshape(16, 9).t(), float(unet.conv_out.bias),
            unet.conv_norm_out.weight.detach(), unet.conv_norm_out.bias.detach(),
        )  # fmt: skip
        self._check(1e-5 if not mixed else 5e-3)

    def _add(self, weight: torch.Tensor, bias: torch.Tensor, split: bool) -> int:
        tiles, begins, pixel = packed(weight.detach(), split)
        return extension().add_convolution(
            tiles, bias.detach(), weight.shape[0], split, weight.shape[1], pixel, begins
        )

    def _convolution(self, conv: Any, split: bool, bias: torch.Tensor | None = None) -> int:
        weight = conv.weight.flatten(2).transpose(1, 2).contiguous()
        return self._add(weight, conv.bias if bias is None else bias, split)

    def _resnet(self, resnet: Any, split: bool) -> None:
        shortcut = -1
        if resnet.conv_shortcut is not None:
            shortcut = self._convolution(resnet.conv_shortcut, split, resnet.conv_shortcut.bias + resnet.conv2.bias)
        norms = [v.detach() for n in (resnet.norm1, resnet.norm2) for v in (n.weight, n.bias)]
        conv1, conv2 = self._convolution(resnet.conv1, split), self._convolution(resnet.conv2, split)
        extension().add_resnet(*norms, conv1, conv2, shortcut, self.width)
        self.shifts.append(resnet.time_emb_proj)
        self.width += resnet.time_emb_proj.out_features

    def _check(self, tolerance: float) -> None:
        """Against the network that it stands for."""
        generator = torch.Generator().manual_seed(0)
        x, labels = torch.randn(6, 1, 28, 28, generator=generator), torch.arange(6)
        for time in (900.5, 100.25):
            wanted = self.unet(x, torch.tensor(time), labels, return_dict=False)[0]
            error = float((self(x, torch.tensor(time), labels)[0] - wanted).norm() / wanted.norm())
            if not error < tolerance:
                raise SystemExit(f"error: fashion_amx.cpp is off by {error:.1e} of the network's answer")

    @torch.no_grad()
    def forward(self, x: torch.Tensor, time: torch.Tensor, labels: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        unet = self.unet
        # All labels at this time; a picture takes its own row.
        embedding = unet.time_embedding(unet.time_proj(time.reshape(1).float())) + unet.class_embedding.weight
        embedding = torch.nn.functional.silu(embedding)
        shifts = torch.cat([linear(embedding) for linear in self.shifts], 1).contiguous()
        return (extension().run(x, shifts, labels),)
