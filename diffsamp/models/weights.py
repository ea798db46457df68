"""Reading the embedded weights: a config (json) beside a safetensors file whose sha256 the config holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from diffsamp.errors import DiffsampError

FOLDER = Path(__file__).parent


def read_config(name: str) -> dict[str, Any]:
    """The config of the embedded model `name` (`<name>.json` in this folder)."""
    path = FOLDER / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DiffsampError(f"embedded model {name!r} is incomplete: {path} is missing; reinstall diffsamp") from None
    except ValueError as error:
        raise DiffsampError(f"embedded model {name!r} has a corrupted config {path}: {error}") from None


def read_bytes(config: dict[str, Any]) -> bytes:
    """The weights file of a config, whole, with its sha256 checked; DiffsampError if it is not what was shipped."""
    path = FOLDER / config["weights"]
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DiffsampError(f"weights file {path} cannot be read ({reason}); reinstall diffsamp") from None
    found = hashlib.sha256(content).hexdigest()
    if found != config["sha256"]:
        raise DiffsampError(
            f"weights file {path} is corrupted: its sha256 is {found[:12]}..., expected {config['sha256'][:12]}...; "
            "reinstall diffsamp"
        )
    return content


def read_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of a config's checked weights file, with the dtypes they were stored in."""
    from safetensors.torch import load

    return load(read_bytes(config))


def fill(build: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """The module that `build()` makes, holding `tensors` as `dtype`, in evaluation mode.

    It is built without storage first, so loading neither fills weights twice nor touches the global random state.
    """
    with torch.device("meta"):
        module = build()
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    # Convolutions on a CPU are about 1.5 times faster in this layout; it changes no shape and no index.
    return module.to(memory_format=torch.channels_last).eval()
