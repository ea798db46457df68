"""What ``diffsamp generate`` does with --corrector, --anneal or a product of classes: one weighted run per seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DiffsampError
from ..files import write_whole


def generate_corrected(
    job: Any,
    pipe: Any,
    *,
    classes: str | None,
    seeds: list[int],
    corrector: str | None,
    anneal: float | None,
    folder: Path,
    batch_size: int,
    as_json: bool,
    force: bool,
) -> None:
    """Write one picture per seed (all particles with ``choose=all``) and ``corrector.json`` with the weights.

    Every picture carries its recipe, so that ``diffsamp generate --from`` repeats the groups it was made with.

    Args:
        job: what the run shares: the steps, the guidance scale and the first part of the recipe.
        classes: a list of classes (in turn over the seeds), a product like ``3*5``, or None for all in turn.
        corrector: text of :func:`diffsamp.correctors.parse`; left out, 8 particles and ESS 0.5.
        anneal: power of the whole target.
        batch_size: particles at a time, one group at least.

    Raises:
        DiffsampError: the pipeline has no classes, or options that contradict each other.
    """
    from ..models import FASHION_CLASSES
    from ..recipe import png_bytes

    if not hasattr(pipe, "class_id"):
        raise DiffsampError("corrector: the command line has it for the embedded image model; others by diffsamp.use")
    terms = class_terms(classes, seeds, FASHION_CLASSES)
    written: list[dict[str, Any]] = []
    for labels in dict.fromkeys(terms):
        made, wanted = _corrector(pipe, labels, corrector, anneal, job.guidance_scale)
        mine = [seed for seed, term in zip(seeds, terms, strict=True) if term == labels]
        groups = max(1, batch_size // made.particles)
        for part in (mine[at : at + groups] for at in range(0, len(mine), groups)):
            result = _run(pipe, made, wanted, part, job.steps)
            for g, seed in enumerate(part):
                first = g * made.particles
                kept = range(first, first + made.particles) if made.choose == "all" else [int(result.chosen[g])]
                pictures = pipe.postprocess(result.samples[list(kept)], "pil")
                for index, picture in zip(kept, pictures, strict=True):
                    slot = index - first
                    name = f"{seed:06d}-{'x'.join(str(v) for v in labels)}"
                    name += (f"-{slot:02d}" if made.choose == "all" else "") + ".png"
                    recipe = replace(
                        job.recipe(seed, [[s, None] for s in part]), corrector=corrector, anneal=anneal,
                        classes=list(labels), slot=slot,
                    )  # fmt: skip
                    write_whole(folder / name, png_bytes(picture, recipe), overwrite=force)
                    written.append({
                        "file": name, "seed": seed, "classes": list(labels), "slot": slot,
                        "weight": float(result.weights[g, slot]), "log_z": float(result.log_z[g]),
                        "ess": [float(i.ess[g]) for i in result.info], "resampled": int(result.resamplings[g]),
                        "unique_ancestors": int(result.unique_ancestors[g]), "nfe": result.nfe,
                    })  # fmt: skip
    report = {"solver": job.solver, "steps": job.steps, "particles": made.particles, "ess": made.ess,
              "pictures": written}  # fmt: skip
    write_whole(folder / "corrector.json", json.dumps(report, indent=1).encode(), overwrite=force)
    if as_json:
        print(json.dumps(report))
    else:
        print(f"{len(written)} pictures with weights in {folder}")
        print(f"one of them: diffsamp generate --from {folder / written[0]['file']}")


def repeated(pipe: Any, recipe: Any) -> Any:
    """The picture of a recipe with ``classes``: its groups are run again, and its particle is taken."""
    seeds = [seed for seed, _ in recipe.batch]
    made, wanted = _corrector(pipe, tuple(recipe.classes), recipe.corrector, recipe.anneal, recipe.guidance_scale)
    result = _run(pipe, made, wanted, seeds, recipe.steps)
    at = seeds.index(recipe.seed) * made.particles + recipe.slot
    return pipe.postprocess(result.samples[[at]], "pil")[0]


def _corrector(
    pipe: Any, labels: tuple[int, ...], text: str | None, anneal: float | None, guidance_scale: float | None
) -> tuple[Any, tuple[int | None, ...]]:
    """(corrector, classes of the predictions that its target needs). A product of classes takes the guidance scale 1
    for each, guidance the model's own, by default."""
    from ..correctors import Corrector, Recipe, annealed, cfg, composed, parse

    named = parse(text if text is not None else "fkc:target=cfg")
    base: Corrector = named.corrector if isinstance(named, Recipe) else named
    beta = 1.0 if anneal is None else float(anneal)
    wanted: tuple[int | None, ...] = (*labels, None)
    if len(labels) > 1:
        target = composed((1.0 if guidance_scale is None else guidance_scale,) * len(labels), beta)
    elif base.target is not None and not isinstance(named, Recipe):
        if anneal is not None:
            raise DiffsampError("anneal: the corrector names its target already; write beta= there")
        target = base.target
        wanted = labels if target.conditions == 1 else wanted
        if target.conditions > 2:
            raise DiffsampError(f"target: {target.name} needs {target.conditions} classes; write --class 3*5")
    elif isinstance(named, Recipe) and text is not None:
        opened = named.open.beta if named.open else 1.0
        scale = pipe.config.default_guidance_scale if guidance_scale is None else guidance_scale
        target = cfg(scale, opened * beta)
    elif guidance_scale is not None and guidance_scale != 1.0:
        target = cfg(guidance_scale, beta)
    else:
        target, wanted = annealed(beta), labels
    return replace(base, target=target), wanted


def _run(pipe: Any, corrector: Any, wanted: tuple[int | None, ...], seeds: list[int], steps: int) -> Any:
    """One group per seed."""
    import torch

    from .. import rng
    from ..adapters.particles import class_denoiser
    from ..correctors import slot_seeds

    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    slots = slot_seeds(seeds, len(seeds), corrector.particles)
    x = scheduler.plan.first_level.sigma * rng.normal(slots, shape, device=pipe.unet.device, dtype=torch.float32)
    denoise = class_denoiser(pipe, *wanted)
    return corrector.run(
        scheduler.plan, denoise, x, prediction=scheduler.prediction, seeds=slots, check_finite=True
    )


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
