"""Text from a masked language model: prompts, holes to fill, rows of different lengths, blocks, stop tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffsamp.errors import DiffsampError
from diffsamp.masked.denoisers import Denoiser
from diffsamp.masked.randomness import row_seeds
from diffsamp.masked.sampler import MaskedState, sample

PAD = -1  # padding of shorter rows; `MaskedLM(model, pad_id=PAD)` hides it from attention


@dataclass(frozen=True)
class Generated:
    """What `generate` returns.

    tokens: int64 (B, L), `PAD` after a row's end. sequences: per row, the tokens up to its stop token.
    blocks: `info` of each block. calls: network calls in all.
    """

    tokens: Tensor
    sequences: list[list[int]]
    blocks: list[dict[str, Any]]
    calls: int


def generate(
    denoiser: Denoiser,
    prompts: Sequence[Sequence[int]],
    *,
    mask_id: int | None,
    new_tokens: int | Sequence[int],
    block_length: int | None = None,
    stop_ids: Sequence[int] = (),
    max_length: int | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    callback: Callable[[MaskedState], None] | None = None,
    **options: Any,
) -> Generated:
    """Continue prompts of any lengths.

    Args:
        denoiser: sees int64 (A, L) with `PAD` after the end of shorter rows.
        prompts: token ids of each row, possibly none.
        new_tokens: how many to add, one number or one per row.
        block_length: None decodes all at once; otherwise blocks from left to right, each one a fresh sampler that
            starts at time 1, later blocks masked and earlier ones frozen.
        stop_ids: a row that reveals one of them in a block is over: what follows it is dropped.
        max_length: longest row that the model takes.
        options: `sampler`, `order`, `temperature`, `top_k`, `top_p`, `precision` of `sample`.

    Raises:
        DiffsampError: no mask id, a prompt that holds it, or one that is too long for the model.
    """
    if mask_id is None:
        raise DiffsampError("mask_id is missing: the tokenizer names no mask token, so pass its id")
    if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
        raise DiffsampError("prompts must be lists of token ids, one for each row; encode text with its tokenizer")
    if not isinstance(new_tokens, (int, Iterable)):
        raise DiffsampError(f"new_tokens={new_tokens!r} must be one count of at least 0, or one for each prompt")
    more = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else list(new_tokens)
    if len(more) != len(prompts) or any(n < 0 for n in more):
        raise DiffsampError(f"new_tokens={new_tokens} must be one count of at least 0, or one for each prompt")
    if block_length is not None and block_length < 1:
        raise DiffsampError(f"block_length={block_length} must be at least 1")
    for i, prompt in enumerate(prompts):
        if mask_id in prompt:
            raise DiffsampError(f"prompt {i} holds the mask token {mask_id}; use `sample` to fill holes")
        if max_length is not None and len(prompt) + more[i] > max_length:
            raise DiffsampError(
                f"prompt {i}: {len(prompt)} tokens and {more[i]} new ones exceed the model's {max_length}"
            )
    length = max((len(p) + n for p, n in zip(prompts, more, strict=True)), default=0)
    x = torch.full((len(prompts), length), PAD, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        x[i, : len(prompt)] = torch.tensor(list(prompt), dtype=torch.int64)
        x[i, len(prompt) : len(prompt) + more[i]] = mask_id
    x = x.to(device)
    starts = [len(p) for p in prompts]
    keys = torch.from_numpy(row_seeds(len(prompts), seeds, generator))
    span = block_length or max(more, default=0)
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    blocks: list[dict[str, Any]] = []
    for number in range(-(-max(more, default=0) // span) if span else 0):
        x = _block(
            denoiser,
            x,
            keys + number * 0x5851F42D4C957F2D,
            starts,
            number,
            span,
            mask_id,
            finished,
            blocks,
            callback,
            options,
        )
        for i, start in enumerate(starts):
            row = x[i, start : start + (number + 1) * span].tolist()
            if not finished[i] and any(token in stop_ids for token in row):
                at = start + next(j for j, token in enumerate(row) if token in stop_ids)
                x[i, at + 1 :] = PAD
                finished[i] = True
    return Generated(x, [[t for t in row if t != PAD] for row in x.tolist()], blocks, sum(b["calls"] for b in blocks))


def _block(
    denoiser: Denoiser,
    x: Tensor,
    keys: Tensor,
    starts: list[int],
    number: int,
    span: int,
    mask_id: int,
    finished: Tensor,
    blocks: list[dict[str, Any]],
    callback: Callable[[MaskedState], None] | None,
    options: dict[str, Any],
) -> Tensor:
    """Fill one block of every row; masks of later blocks carry a stand-in, so the sampler sees this block's only."""
    later = -2
    place = torch.arange(x.shape[1], device=x.device)
    ends = torch.tensor([s + (number + 1) * span for s in starts], device=x.device)[:, None]
    hidden = (x == mask_id) & (place >= ends)

    def seen(ids: Tensor, t: Tensor, positions: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        from diffsamp.masked.denoisers import call

        index = torch.arange(ids.shape[0], device=ids.device) if rows is None else rows
        return call(denoiser, ids.masked_fill(ids == later, mask_id), t, positions, index)

    filled, facts = sample(
        seen, x.masked_fill(hidden, later), mask_id=mask_id, seeds=keys, callback=callback, **options
    )
    blocks.append(facts)
    return filled.masked_fill(filled == later, mask_id)
