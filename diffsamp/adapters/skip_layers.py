"""A transformer with some of its blocks left out, for the weak pass of autoguidance.

diffusers' own layer-skip hook returns (hidden, encoder) for every block, whatever order the block itself returns them
in, and so breaks models whose blocks return the encoder states first (SD3, Flux). This one keeps the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import DiffsampError

_STACKS = ("transformer_blocks", "blocks", "temporal_transformer_blocks", "layers")


@contextmanager
def skipping(model: torch.nn.Module, layers: tuple[int, ...]) -> Iterator[None]:
    """Within the context, the blocks ``layers`` of a diffusers transformer hand their input on unchanged."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    model = getattr(model, "_orig_mod", model)
    stacks = (getattr(model, name, None) for name in _STACKS)
    stack = next((found for found in stacks if isinstance(found, torch.nn.ModuleList)), ())
    if not stack or max(layers) >= len(stack):
        raise DiffsampError(
            f"skip_layers: got {layers}; {type(model).__name__} has {len(stack)} transformer blocks to skip. Accepted: "
            "indices below that, or a weak model, as in AutoGuidance(2.0, weak=model)"
        )
    before: list[tuple[torch.nn.Module, Any]] = []
    try:
        for index in layers:
            block = stack[index]
            try:
                metadata = TransformerBlockRegistry.get(type(block))
            except ValueError:
                raise DiffsampError(f"skip_layers: blocks of type {type(block).__name__} are not known") from None
            before.append((block, block.__dict__.get("forward")))
            block.forward = _identity(metadata)
        yield
    finally:
        for block, forward in reversed(before):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _identity(metadata: Any):
    order = metadata.return_hidden_states_index, metadata.return_encoder_hidden_states_index

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = metadata._get_parameter_from_args_kwargs("hidden_states", args, kwargs)
        if order[1] is None:
            return hidden
        encoder = metadata._get_parameter_from_args_kwargs("encoder_hidden_states", args, kwargs)
        return (hidden, encoder) if order[0] < order[1] else (encoder, hidden)

    return forward
