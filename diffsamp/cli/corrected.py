"""What ``diffsamp generate`` does with --corrector, --anneal or a product of classes: one weighted run per seed."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DiffsampError
from ..files import write_whole

_GROUPS_AT_ONCE = 4


def generate_corrected(
    pipe: Any,
    *,
    solver: str,
    steps: int,
    classes: str | None,
    seeds: list[int],
    corrector: str | None,
    anneal: float | None,
    guidance_scale: float | None,
    folder: Path,
    as_json: bool,
    force: bool,
) -> None:
    """Write one picture per seed (all particles with ``choose=all``) and ``corrector.json`` with the weights.

    Args:
        classes: a list of classes (in turn over the seeds), a product like ``3*5``, or None for all in turn.
        corrector: text of :func:`diffsamp.correctors.parse`; left out, 8 particles and ESS 0.5.
        anneal: power of the whole target.
        guidance_scale: scale of every condition. A product takes 1, guidance the model's own, by default.

    Raises:
        DiffsampError: the pipeline has no classes, or options that contradict each other.
    """
    import torch

    from .. import rng
    from ..adapters.particles import class_denoiser
    from ..correctors import Corrector, Recipe, annealed, cfg, composed, parse, slot_seeds
    from ..models import FASHION_CLASSES

    if not hasattr(pipe, "class_id"):
        raise DiffsampError("corrector: the command line has it for the embedded image model; others by diffsamp.use")
    named = parse(corrector if corrector is not None else "fkc:target=cfg")
    base: Corrector = named.corrector if isinstance(named, Recipe) else named
    beta = 1.0 if anneal is None else float(anneal)
    terms = class_terms(classes, seeds, FASHION_CLASSES)
    device, dtype = pipe.unet.device, torch.float32
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    plan, prediction = scheduler.plan, scheduler.prediction
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    written: list[dict[str, Any]] = []
    for labels in dict.fromkeys(terms):
        mine = [seed for seed, term in zip(seeds, terms, strict=True) if term == labels]
        if len(labels) > 1:
            scale = 1.0 if guidance_scale is None else guidance_scale
            target, wanted = composed((scale,) * len(labels), beta), (*labels, None)
        elif base.target is not None and not isinstance(named, Recipe):
            if anneal is not None:
                raise DiffsampError("anneal: the corrector names its target already; write beta= there")
            target = base.target
            wanted = labels if target.conditions == 1 else (*labels, None)
            if target.conditions > 2:
                raise DiffsampError(f"target: {target.name} needs {target.conditions} classes; write --class 3*5")
        elif isinstance(named, Recipe) and corrector is not None:
            opened = named.open.beta if named.open else 1.0
            scale = pipe.config.default_guidance_scale if guidance_scale is None else guidance_scale
            target, wanted = cfg(scale, opened * beta), (*labels, None)
        elif guidance_scale is not None and guidance_scale != 1.0:
            target, wanted = cfg(guidance_scale, beta), (*labels, None)
        else:
            target, wanted = annealed(beta), labels
        made = replace(base, target=target)
        denoise = class_denoiser(pipe, *wanted)
        for at in range(0, len(mine), _GROUPS_AT_ONCE):
            part = mine[at : at + _GROUPS_AT_ONCE]
            slots = slot_seeds(part, len(part), made.particles)
            x = plan.first_level.sigma * rng.normal(slots, shape, device=device, dtype=dtype)
            result = made.run(plan, denoise, x, prediction=prediction, seeds=slots)
            for g, seed in enumerate(part):
                first = g * made.particles
                kept = range(first, first + made.particles) if made.choose == "all" else [int(result.chosen[g])]
                pictures = pipe.postprocess(result.samples[list(kept)], "pil")
                label = "x".join(str(v) for v in labels)
                for index, picture in zip(kept, pictures, strict=True):
                    slot = index - first
                    name = f"{seed:06d}-{label}" + (f"-{slot:02d}" if made.choose == "all" else "") + ".png"
                    _save(picture, folder / name, force)
                    written.append({
                        "file": name, "seed": seed, "classes": list(labels), "slot": slot,
                        "weight": float(result.weights[g, slot]), "log_z": float(result.log_z[g]),
                        "ess": [float(i.ess[g]) for i in result.info], "resampled": int(result.resamplings[g]),
                        "unique_ancestors": int(result.unique_ancestors[g]), "nfe": result.nfe,
                    })  # fmt: skip
    report = {"solver": solver, "steps": steps, "particles": base.particles, "ess": base.ess, "pictures": written}
    write_whole(folder / "corrector.json", json.dumps(report, indent=1).encode(), overwrite=force)
    if as_json:
        print(json.dumps(report))
    else:
        print(f"{len(written)} pictures with weights in {folder}")


def class_terms(text: str | None, seeds: list[int], names: Any) -> list[tuple[int, ...]]:
    """The classes whose product each seed is to draw from: ``3*5`` or ``Dress*Bag``; lists go round in turn."""
    lowered = [name.lower() for name in names]
    if text is None:
        return [(seed % len(names),) for seed in seeds]
    found: list[tuple[int, ...]] = []
    for part in text.split(","):
        term: list[int] = []
        for word in (w.strip().lower() for w in part.split("*")):
            first, dash, last = word.partition("-")
            if dash and first.isdecimal() and last.isdecimal() and "*" not in part:
                found += [(v,) for v in range(int(first), int(last) + 1)]
            elif word.isdecimal() and int(word) < len(names):
                term.append(int(word))
            elif word in lowered:
                term.append(lowered.index(word))
            else:
                raise DiffsampError(f"class: {word!r} is not a class; accepted: 0-{len(names) - 1}, names, or 3*5")
        if len(set(term)) < len(term):
            raise DiffsampError(f"class: {part.strip()!r} names a class twice; write --anneal 2 for a power")
        if term:
            found.append(tuple(term))
    if not found or max(max(term) for term in found) >= len(names):
        raise DiffsampError(f"class: got {text!r}; accepted: 0-{len(names) - 1}, names, or products like 3*5")
    return [found[k % len(found)] for k in range(len(seeds))]


def _save(picture: Any, path: Path, force: bool) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_whole(path, buffer.getvalue(), overwrite=force)
