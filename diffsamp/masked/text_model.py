"""A small bidirectional transformer for absorbing (masked) diffusion over tokens.

The network is time-free: the optimal denoiser of an absorbing process depends on the partly masked sequence alone
(Zheng et al. 2024, arXiv:2409.02908, proposition 3.2). Pre-norm blocks, rotary positions, RMS-normalised queries and
keys, tied embeddings, and the SUBS convention: the column of the mask token is minus infinity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsamp.errors import DiffsampError


@dataclass(frozen=True)
class TextModelConfig:
    """Shape of a `MaskedTransformer`. `vocab_size` counts the mask token."""

    vocab_size: int = 1025
    mask_id: int = 1024
    max_length: int = 128
    width: int = 192
    layers: int = 4
    heads: int = 4
    dropout: float = 0.1
    rope_base: float = 1000.0


def _rotary(length: int, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    frequency = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class _Block(nn.Module):
    def __init__(self, config: TextModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.dropout = config.dropout
        self.attention_norm = nn.RMSNorm(width)
        self.query_norm = nn.RMSNorm(width // config.heads)
        self.key_norm = nn.RMSNorm(width // config.heads)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = (part.squeeze(2).transpose(1, 2) for part in qkv.split(1, dim=2))
        q, k = _rotate(self.query_norm(q), cos, sin), _rotate(self.key_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        y = self.attention_out(y.transpose(1, 2).reshape(batch, length, width))
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))
        return x + F.dropout(y, self.dropout, self.training)


class MaskedTransformer(nn.Module):
    """Predicts the clean token at every position of a partly masked sequence.

    `model(input_ids)` with int64 ids of shape (B, L) gives logits (B, L, vocab_size); `model(input_ids,
    positions=index)` with an int64 index (B, K) gives (B, K, vocab_size): only these rows go through the head.
    `attention_mask` (B, L), True where a position exists, serves sequences of different lengths in one batch.
    """

    def __init__(self, config: TextModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.final_norm = nn.RMSNorm(config.width)
        cos, sin = _rotary(config.max_length, config.width // config.heads, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("_out.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))
            elif parameter.ndim == 2 and "embedding" not in name:
                nn.init.normal_(parameter, std=0.02)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Final hidden states (B, L, width), before the head."""
        length = input_ids.shape[-1]
        if length > self.config.max_length:
            raise DiffsampError(f"input_ids has {length} tokens a row, the model takes at most {self.config.max_length}")
        # Unit-RMS embeddings: the tied head wants small rows, the blocks want inputs of order one.
        x = F.rms_norm(self.embedding(input_ids), (self.config.width,))
        x = F.dropout(x, self.config.dropout, self.training)
        attend = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        cos, sin = self.cos[:length], self.sin[:length]
        for block in self.blocks:
            x = block(x, cos, sin, attend)
        return self.final_norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states of any leading shape; the mask token's column is minus infinity."""
        logits = F.linear(hidden, self.embedding.weight)
        logits[..., self.config.mask_id] = -math.inf
        return logits

    def forward(self, input_ids: Tensor, positions: Tensor | None = None,
                attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.hidden(input_ids, attention_mask)
        if positions is not None:
            hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.head(hidden)
