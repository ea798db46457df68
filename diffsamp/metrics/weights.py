"""Finding and reading the weights of the FID Inception from local files; nothing is downloaded, nothing unpickled."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from diffsamp.errors import DiffsampError

FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
HASH_PREFIX = "6726825d"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILES[0]}"


def sha256_of(path: Path) -> str:
    """The sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def places() -> list[Path]:
    """Where the file is looked for, in order."""
    found = []
    if folder := os.environ.get("DIFFSAMP_WEIGHTS"):
        found += [Path(folder)] if Path(folder).is_file() else [Path(folder) / name for name in FILES]
    home = os.environ.get("TORCH_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch"
    )
    return found + [Path(home) / "hub" / "checkpoints" / name for name in FILES]


def find(path: str | Path | None = None) -> tuple[Path, str]:
    """The weights file and its sha256.

    A file that is named by the caller may hold other weights (its figures are then not called FID); one that is found
    in a cache must carry the published hash. Raises DiffsampError when there is none, with where to get and put it.
    """
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise DiffsampError(f"feature_weights: no file {path}; accepted: the Inception weights file {FILES[0]}")
        return path, sha256_of(path)
    for place in places():
        if place.is_file():
            digest = sha256_of(place)
            if not digest.startswith(HASH_PREFIX):
                raise DiffsampError(
                    f"feature_weights: {place} has sha256 {digest[:8]}..., expected {HASH_PREFIX}...; fetch it again "
                    f"from {URL}"
                )
            return place, digest
    raise DiffsampError(
        f"feature_weights: the Inception weights were not found; fetch {URL} and put it at {places()[-2]}, or pass "
        f"--feature-weights PATH"
    )


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth (read with weights_only=True) or .safetensors file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise DiffsampError(f"feature_weights: {path} cannot be read safely as a weights file ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise DiffsampError(f"feature_weights: {path} holds no plain dictionary of tensors")
    return state


def load_into(module: torch.nn.Module, path: Path) -> None:
    """Fill a module; raises DiffsampError that names the first keys that do not fit."""
    state, own = read_state(path), module.state_dict()
    # Older files lack the batch counters, which evaluation does not use.
    state = {**{k: v for k, v in own.items() if k.endswith("num_batches_tracked")}, **state}
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or wrong:
        parts = {"missing": missing, "unknown": extra, "of another shape": wrong}
        told = "; ".join(f"{len(v)} keys {what}, first {v[0]}" for what, v in parts.items() if v)
        raise DiffsampError(f"feature_weights: {path} does not fit {type(module).__name__}: {told}")
    module.load_state_dict(state)
