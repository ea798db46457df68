"""A small bidirectional transformer for absorbing (masked) diffusion over tokens.

The network is time-free: the optimal denoiser of an absorbing process depends on the partly masked sequence alone
(Zheng et al. 2024, arXiv:2409.02908, proposition 3.2). Pre-norm blocks, rotary positions, RMS-normalised queries and
keys, tied embeddings, and the SUBS convention: the column of the mask token is minus infinity.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsamp.errors import DiffsampError

TEXT_MODELS = ("kjv",)
_LINE = 16  # float32 numbers in a cache line


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


def _rows(x: Tensor, positions: Tensor) -> Tensor:
    """(B, K, W) of (B, L, W) at positions (B, K)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


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

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        batch, length, width = x.shape
        normed = self.attention_norm(x)
        if positions is None:
            qkv = self.query_key_value(normed).view(batch, length, 3, self.heads, width // self.heads)
            q, k, v = (part.squeeze(2).transpose(1, 2) for part in qkv.split(1, dim=2))
            q = _rotate(self.query_norm(q), cos, sin)
        else:
            # Keys and values of all, the rest at the positions that are asked for.
            weight = self.query_key_value.weight
            x, asked = _rows(x, positions), _rows(normed, positions)
            q = F.linear(asked, weight[:width]).view(batch, -1, self.heads, width // self.heads).transpose(1, 2)
            kv = F.linear(normed, weight[width:]).view(batch, length, 2, self.heads, width // self.heads)
            k, v = (part.squeeze(2).transpose(1, 2) for part in kv.split(1, dim=2))
            q = _rotate(self.query_norm(q), cos[positions][:, None], sin[positions][:, None])
        k = _rotate(self.key_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        y = self.attention_out(y.transpose(1, 2).reshape(batch, -1, width))
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))
        return x + F.dropout(y, self.dropout, self.training)


class MaskedTransformer(nn.Module):
    """Predicts the clean token at every position of a partly masked sequence.

    `model(input_ids)` with int64 ids of shape (B, L) gives logits (B, L, vocab_size); `model(input_ids,
    positions=index)` with an int64 index (B, K) gives (B, K, vocab_size): only these rows go through the head.
    `attention_mask` (B, L), True where a position exists, serves sequences of different lengths in one batch.
    """

    cos: Tensor
    sin: Tensor

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

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Final hidden states (B, L, width), or (B, K, width) at int64 `positions` (B, K), before the head."""
        length = input_ids.shape[-1]
        if length > self.config.max_length:
            raise DiffsampError(
                f"input_ids has {length} tokens a row, the model takes at most {self.config.max_length}"
            )
        # Unit-RMS embeddings: the tied head wants small rows, the blocks want inputs of order one.
        x = F.rms_norm(self.embedding(input_ids), (self.config.width,))
        x = F.dropout(x, self.config.dropout, self.training)
        attend = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        cos, sin = self.cos[:length], self.sin[:length]
        for block in self.blocks[:-1]:
            x = block(x, cos, sin, attend)
        x = self.blocks[-1](x, cos, sin, attend, positions)
        return self.final_norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states of any leading shape; the mask token's column is minus infinity."""
        weight, width = self.embedding.weight, self.config.vocab_size
        if not torch.is_grad_enabled() and width % _LINE:
            # Rows that begin on a cache line are written half again as fast.
            logits = hidden.new_empty(*hidden.shape[:-1], width + -width % _LINE)[..., :width]
            torch.matmul(hidden, weight.t(), out=logits)
        else:
            logits = F.linear(hidden, weight)
        logits[..., self.config.mask_id] = -math.inf
        return logits

    def forward(
        self, input_ids: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        return self.head(self.hidden(input_ids, attention_mask, positions))


class TextModel:
    """The embedded text model: network, tokenizer and the calls that make text of them.

    A denoiser itself: `model(x, t, positions=None)` with `-1` as padding. Weights, tokenizer and card are in
    `diffsamp/models/`.
    """

    def __init__(self, network: MaskedTransformer, tokenizer: Any, facts: dict[str, Any] | None = None) -> None:
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.facts = facts or {}
        self.mask_id = network.config.mask_id
        self.max_length = network.config.max_length
        self.vocab_size = network.config.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.embedding.weight.device

    def to(self, device: str | torch.device) -> TextModel:
        """Move the weights."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        pad = x < 0
        attend = ~pad if bool(pad.any()) else None
        return self.network(x.clamp_min(0), positions=positions, attention_mask=attend)

    def encode(self, text: str) -> list[int]:
        """Token ids; the text may not name the mask token."""
        if "[MASK]" in text:
            raise DiffsampError("prompt holds the mask token [MASK]; write holes as [mask] in an infill text")
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int], hole: str = "_") -> str:
        """Text of token ids, with `hole` for each masked position."""
        parts, run = [], []
        for i in ids:
            if i == self.mask_id:
                parts += [self.tokenizer.decode(run), hole]
                run = []
            elif i >= 0:
                run.append(i)
        return "".join([*parts, self.tokenizer.decode(run)])

    def prompt(self, text: str = "", length: int | None = None) -> Tensor:
        """Int64 (1, L): a prompt followed by masks, L = `length` or all that the model takes."""
        ids = self.encode(text)
        length = self.max_length if length is None else length
        if not 1 <= length <= self.max_length:
            raise DiffsampError(f"length={length} must be between 1 and the model's {self.max_length} tokens")
        if len(ids) > length:
            raise DiffsampError(
                f"prompt has {len(ids)} tokens; it must fit into {length} (the model takes {self.max_length})"
            )
        return torch.tensor([ids + [self.mask_id] * (length - len(ids))], dtype=torch.int64)

    def holes(self, text: str, default: int = 8) -> Tensor:
        """Int64 (1, L): text with holes, `[mask]` or `___` of `default` tokens, `[mask:N]` or `___N` of N."""
        ids: list[int] = []
        for part in re.split(r"(___\d*|\[mask(?::\d+)?\])", text):
            if re.fullmatch(r"___\d*|\[mask(?::\d+)?\]", part):
                size = re.search(r"\d+", part)
                ids += [self.mask_id] * (int(size[0]) if size else default)
            else:
                ids += self.encode(part)
        if self.mask_id not in ids:
            raise DiffsampError(f"infill={text!r:.60} has no hole; write [mask] for {default} tokens, or [mask:N]")
        if len(ids) > self.max_length:
            raise DiffsampError(f"infill has {len(ids)} tokens; the model takes at most {self.max_length}")
        return torch.tensor([ids], dtype=torch.int64)


def load_text_model(name: str = "kjv", *, device: str | torch.device = "cpu", folder: Path | None = None) -> TextModel:
    """The embedded text model by name, read from files inside the package; float32 on `device`.

    Raises:
        DiffsampError: no such model, or a file that is missing or not the one that was shipped.
    """
    from safetensors.torch import load
    from tokenizers import Tokenizer

    folder = folder or Path(__file__).parents[1] / "models"
    if name not in TEXT_MODELS:
        raise DiffsampError(f"model={name!r} is not an embedded text model; accepted: {', '.join(TEXT_MODELS)}")
    try:
        facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        content = (folder / f"{name}.safetensors").read_bytes()
        tokenizer = Tokenizer.from_str((folder / f"{name}.tokenizer.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise DiffsampError(f"text model {name!r}: {error.filename} cannot be read; reinstall diffsamp") from None
    found = hashlib.sha256(content).hexdigest()
    if found != facts["sha256"]:
        raise DiffsampError(
            f"text model {name!r}: the weights have sha256 {found[:12]}, expected {facts['sha256'][:12]}"
        )
    network = MaskedTransformer(TextModelConfig(**facts["network"]))
    network.load_state_dict({key: value.float() for key, value in load(content).items()})
    return TextModel(network, tokenizer, facts).to(device)
