"""``diffsamp calibrate gaussian``: mean and covariance for teleportation, and the level where runs can start.

The samples are streamed: from a folder of pictures, from a .npz file, or from the model itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DiffsampError

BATCH = 500
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def gaussian(
    model: Annotated[str, typer.Option(help="Embedded name, or a local class-conditional pipeline.")] = "fashion",
    samples: Annotated[int, typer.Option(help="Samples of the model to make, where no data are given.")] = 2000,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of pictures (sub-folders 0, 1, ... are classes), or a .npz file: x (n, ...) in the model's "
            "range, labels (n,)."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Directions kept; 96 or all, where there are fewer.")] = None,
    steps: Annotated[int, typer.Option(help="Network calls per sample of the model.")] = 20,
    start: Annotated[
        str, typer.Option(help="sigma/alpha where runs start: a number, auto (measured with the model), or none.")
    ] = "auto",
    levels: Annotated[int, typer.Option(help="Levels of the whole run that an automatic start is measured on.")] = 12,
    means: Annotated[
        str,
        typer.Option(
            help="Whose means: data, or network (as it shows them at the top); auto: network where a model is used."
        ),
    ] = "auto",
    guidance_scale: Annotated[str, typer.Option(help="Scales that an automatic start must serve, with commas.")] = (
        "1,3,7.5"
    ),
    key: Annotated[
        list[str] | None, typer.Option(help="What the statistics depend on, as name=value: scaling_factor=0.18215.")
    ] = None,
    seed: Annotated[int, typer.Option(help="First seed of the model's samples; also of the decomposition.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Gaussian statistics for teleportation, from data or from the model's own samples."""
    from dataclasses import replace

    from .. import teleport
    from .calibrate import find_model, numbers

    path = out or Path(f"{Path(model).name}-gaussian.safetensors")
    if path.exists() and not force:
        raise DiffsampError(f"out: {path} exists; choose another place or use --force")
    level, scales = _start(start), numbers(guidance_scale, "guidance-scale", float)
    if rank is not None and rank < 1:
        raise DiffsampError(f"rank: got {rank}; accepted: 1 and above")
    facts = _facts(key)
    if means not in ("auto", "data", "network"):
        raise DiffsampError(f"means: got {means!r}; accepted: auto, data, network")
    if levels < 3:
        raise DiffsampError(f"levels: got {levels}; accepted: 3 and above")
    # Arrays with a given start need no model.
    wanted = data is None or level == "auto" or data.is_dir() or means == "network"
    found: Any = find_model(model) if wanted else None
    if data is None:
        if samples < 2 or steps < 1:
            raise DiffsampError(f"samples, steps: got {samples}, {steps}; accepted: 2 and 1 or above")
        parts = _samples(found, samples, steps, seed)
        facts = {"samples_of": found.name, "sha256": found.sha256, "shape": list(found.shape)} | facts
    elif data.is_dir():
        parts = _pictures(data, found.shape)
        facts = {"data": data.name, "range": [-1, 1], "shape": list(found.shape)} | facts
    else:
        parts = _arrays(data, None if found is None else found.shape)
        facts = {"data": data.name} | facts
    stats = teleport.gather(_watched(parts), rank=rank, key=facts, seed=seed)
    if rank is None and stats.eigenvalues.numel() > 96:
        stats = stats.truncated(96)
    # A folder's pictures may be of other classes than the model's; it is asked only where it takes part anyway.
    if found is not None and (means == "network" or (means == "auto" and (data is None or level == "auto"))):
        stats = teleport.network_means(stats, found)
    if level == "auto":
        choices = teleport.lowest_starts(
            stats, found, scales, levels=levels, tell=lambda line: print(line, file=sys.stderr)
        )
        starts = {f"{scale:g}": choice.level.noise_to_signal for scale, choice in choices.items()}
        # One number for every use: the strictest.
        level = max(starts.values()) if starts else None
        stats = replace(stats, key=stats.key | {"start_by_guidance_scale": starts})
    stats = replace(stats, start=level)
    stats.save(path)
    where = "no start" if level is None else f"runs start at sigma/alpha {level:.3g}"
    print(
        f"{path}: statistics of {stats.count} samples, {stats.eigenvalues.numel()} directions, std {stats.std:.4f}, "
        f"{where}"
    )


def _start(text: str) -> float | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise DiffsampError(f"start: got {text!r}; accepted: a number above 0, auto, none")
    return value


def _facts(given: list[str] | None) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise DiffsampError(f"key: got {text!r}; write name=value, such as scaling_factor=0.18215")
        try:
            facts[name] = float(value)
        except ValueError:
            facts[name] = value
    return facts


def _watched(parts: Iterator[Any]) -> Iterator[Any]:
    """The batches, with a line per batch on stderr."""
    count = 0
    for part in parts:
        count += len(part[0] if isinstance(part, tuple) else part)
        print(f"statistics: {count} samples", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
        yield part


def _samples(model: Any, count: int, steps: int, seed: int) -> Iterator[Any]:
    from .. import engine
    from ..grids import grid as by_name
    from ..registry import solver

    plan = solver("unipc")(model.process, by_name("linspace", model.process, steps))
    for first in range(seed, seed + count, 100):
        noise, labels = model.points(range(first, min(first + 100, seed + count)))
        x = noise * plan.first_level.sigma
        made = engine.sample(plan, model.guided(labels, 1.0), x, prediction=model.prediction, check_finite=True)
        yield made, labels


def _pictures(folder: Path, shape: tuple[int, ...]) -> Iterator[Any]:
    """Batches of a folder's pictures in [-1, 1], (n, *shape), with the numbers of their sub-folders as labels."""
    import numpy as np
    import torch
    from PIL import Image

    channels, height, width = shape
    if channels not in (1, 3):
        raise DiffsampError(f"data: the model has {channels} channels, a picture 1 or 3; give a .npz file of latents")
    classes = sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdecimal()), key=lambda p: int(p.name))
    places = [(p, int(p.name)) for p in classes] or [(folder, None)]
    # A picture named grid is the contact sheet that `diffsamp generate` adds.
    files = [
        (file, label) for place, label in places for file in sorted(place.iterdir())
        if file.suffix.lower() in PICTURES and file.stem != "grid"
    ]  # fmt: skip
    if not files:
        raise DiffsampError(f"data: {folder} holds no pictures ({', '.join(PICTURES)})")

    def read(file: Path) -> Any:
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except OSError as error:
            raise DiffsampError(f"data: {file} cannot be read ({error})") from None
        if pixels.shape[:2] != (height, width):
            raise DiffsampError(
                f"data: {file} is {pixels.shape[1]}x{pixels.shape[0]}, the model makes {width}x{height} pictures"
            )
        return torch.from_numpy(pixels.copy()).float().reshape(height, width, channels).permute(2, 0, 1) / 127.5 - 1

    for first in range(0, len(files), BATCH):
        part = files[first : first + BATCH]
        x = torch.stack([read(file) for file, _ in part])
        yield (x, torch.tensor([label for _, label in part])) if classes else x


def _arrays(path: Path, shape: tuple[int, ...] | None) -> Iterator[Any]:
    import zipfile

    import numpy as np
    import torch

    try:
        with np.load(path, allow_pickle=False) as file:
            x = torch.from_numpy(file["x"])
            labels = torch.from_numpy(file["labels"]) if "labels" in file else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DiffsampError(f"data: {path} cannot be read ({error}); needs a folder, or an .npz file with x") from None
    if not x.is_floating_point():
        raise DiffsampError(f"data: x of {path} has dtype {x.dtype}; needs floating-point values in the model's range")
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise DiffsampError(f"data: x of {path} has samples of shape {tuple(x.shape[1:])}, the model's are {shape}")
    if labels is not None and len(labels) != len(x):
        raise DiffsampError(f"data: {path} has {len(labels)} labels for {len(x)} samples")
    yield from x.split(BATCH) if labels is None else zip(x.split(BATCH), labels.split(BATCH), strict=True)
