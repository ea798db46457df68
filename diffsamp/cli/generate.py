"""``diffsamp generate``: pictures (or text) from the embedded model, a local folder or a hub id."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DiffsampError
from ..files import output_folder

_DTYPES = ("float32", "float16", "bfloat16")


def generate(
    model: Annotated[str, typer.Option(help="Embedded name, local folder or hub id.")] = "fashion",
    prompt: Annotated[str | None, typer.Option(help="Text prompt (text models: how the text begins).")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the picture should not be.")] = None,
    classes: Annotated[str | None, typer.Option("--class", help="Classes: 3, Bag, 0-4,7 or a product 3*5.")] = None,
    solver: Annotated[str | None, typer.Option(help="Registry name, with options or composed.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the grid.")] = None,
    grid: Annotated[str | None, typer.Option(help="Name of the grid (see diffsamp plan).")] = None,
    uncalibrated: Annotated[bool, typer.Option("--uncalibrated", help="Ratio 1 where no artifact fits.")] = False,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance.")] = None,
    guidance: Annotated[str | None, typer.Option(help="Guidance method, e.g. apg:7.5,eta=0,norm=15.")] = None,
    corrector: Annotated[str | None, typer.Option(help="e.g. fkc:target=cfg,particles=8,ess=0.5.")] = None,
    anneal: Annotated[float | None, typer.Option(help="Sample p^beta by a corrector.")] = None,
    teleport: Annotated[str | None, typer.Option(help="Gaussian statistics (.safetensors).")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds: 0-63,100.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures (particles) at a time; halved when memory runs out.")] = 20,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH or one number.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best there is by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; outputs/<model>-0001 and so on by default.")] = None,
    repeat: Annotated[Path | None, typer.Option("--from", help="A picture to repeat.")] = None,
    infill: Annotated[str | None, typer.Option(help="Text model: text with gaps written as [mask].")] = None,
    order: Annotated[str | None, typer.Option(help="Text model: order of revelation.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds files.")] = False,
) -> None:
    """Generate pictures. With no arguments: a labelled grid from the embedded model."""
    from .. import models
    from ..files import check_folder, next_folder
    from ..rng import parse_seeds

    if model == "kjv":
        from .text import generate_text

        generate_text(
            prompt=prompt, infill=infill, steps=steps, order=order, seeds=seeds, as_json=as_json, dry_run=dry_run
        )
        return
    for name, value in (("infill", infill), ("order", order)):
        if value is not None:
            raise DiffsampError(f"{name}: is an option of text models; {model!r} makes pictures")
    if repeat is not None:
        given = {
            "model": model != "fashion", "prompt": prompt, "negative-prompt": negative_prompt, "class": classes,
            "solver": solver, "steps": steps, "grid": grid, "guidance-scale": guidance_scale, "guidance": guidance,
            "corrector": corrector, "anneal": anneal, "teleport": teleport, "seeds": seeds, "size": size,
            "device": device, "dtype": dtype != "float32",
        }  # fmt: skip
        for name, value in given.items():
            if value not in (None, False):
                raise DiffsampError(f"{name}: --from repeats a picture as it was; take one of the two")
        _repeat(repeat, out, as_json=as_json, dry_run=dry_run, force=force)
        return
    embedded = model in models.names()
    chosen = parse_seeds(seeds) if seeds is not None else list(range(20 if embedded else 1))
    steps = steps if steps is not None else (10 if embedded else 20)
    if steps < 1:
        raise DiffsampError(f"steps: got {steps}; must be 1 or above")
    if batch_size < 1:
        raise DiffsampError(f"batch-size: got {batch_size}; must be 1 or above")
    if dtype not in _DTYPES:
        raise DiffsampError(f"dtype: got {dtype!r}; accepted: {', '.join(_DTYPES)}")
    if guidance_scale is not None and not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise DiffsampError(f"guidance-scale: got {guidance_scale}; must be a finite number of 0 or above")
    shape = _size(size)
    device = _device(device)
    if embedded:
        for name, value in (("prompt", prompt), ("negative-prompt", negative_prompt)):
            if value is not None:
                raise DiffsampError(f"{name}: {model!r} knows no words; it takes --class")
        if shape is not None:
            raise DiffsampError(f"size: {model!r} makes pictures of one size")
    special = corrector is not None or anneal is not None or (classes is not None and "*" in classes)
    for name, value in (("guidance", guidance), ("teleport", teleport)):
        if special and value is not None:
            raise DiffsampError(f"{name}: does not go with a corrector; got {value!r}, leave it out")
    solver_name = solver if solver is not None else ("sde-dpmpp-2m" if special else "unipc")
    from ..registry import solver as make_solver

    artifact, scale = None, guidance_scale
    if make_solver(solver_name).info.transform:
        from ..calibrate.resolve import resolve_with

        if scale is None and embedded:
            scale = models.config(model)["guidance_scale"]
        found, artifact = resolve_with(
            solver_name, model=Path(model).name, nfe=steps, uncalibrated=uncalibrated, guidance_scale=scale,
            sha256=models.fingerprint(model) if embedded else None,
        )  # fmt: skip
        solver_name = found.name
        if artifact is not None and artifact.method != "all" and grid is None:
            grid = artifact.grid.split("/")[0]  # values belong to the noise levels that they were found on
    if grid is not None:
        from ..grids import grids

        if grid not in grids():
            raise DiffsampError(f"grid: {grid!r} is not known; accepted: {', '.join(grids())}")
    labels: list[int | None] = [None] * len(chosen)
    if embedded:
        labels = _classes(classes, chosen, models.FASHION_CLASSES)
    if not embedded and classes is not None:
        raise DiffsampError("class: the embedded model has classes; others take --prompt")
    folder = out if out is not None else next_folder(Path("outputs"), Path(model).name or "model")
    check_folder(folder, force=force)
    job = _Job(
        model, solver_name, steps, grid, guidance_scale, guidance, teleport, prompt, negative_prompt, shape, dtype,
        device,
    )  # fmt: skip
    if dry_run and not embedded:
        # Loading may take minutes and gigabytes.
        if not Path(model).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            raise DiffsampError(
                f"model: {model!r} is not embedded ({', '.join(models.names())}), a folder or a hub id (owner/name)"
            )
    else:
        pipe = job.load()
        if embedded:
            pipe.scheduler.set_timesteps(steps)  # a grid that cannot be made is refused before anything is written
            if artifact is not None and artifact.method != "all" and scale is not None:
                artifact.check(pipe.scheduler.plan, artifact.setting(steps, scale))
    if dry_run:
        print(json.dumps({"model": model, "solver": solver_name, "steps": steps, "seeds": chosen, "out": str(folder)}))
        return
    with _folder(folder, force=force):
        if special:
            from .corrected import generate_corrected

            generate_corrected(
                job, pipe, classes=classes, seeds=chosen, corrector=corrector, anneal=anneal, folder=folder,
                batch_size=batch_size, as_json=as_json, force=force,
            )  # fmt: skip
        else:
            _run(job, pipe, chosen, labels, folder, batch_size, as_json=as_json, force=force)


@contextlib.contextmanager
def _folder(path: Path, *, force: bool) -> Iterator[None]:
    """``path`` made as a folder for results; gone again where an error comes before the first of them."""
    new = [p for p in (path, *path.parents) if not p.exists()]
    output_folder(path, force=force)
    try:
        yield
    except BaseException:
        for made in new:
            with contextlib.suppress(OSError):  # it holds files
                made.rmdir()
        raise


class _Job:
    """What every batch shares: the pipeline and its settings."""

    def __init__(
        self, model: str, solver: str, steps: int, grid: str | None, guidance_scale: float | None, guidance: str | None,
        teleport: str | None, prompt: str | None, negative_prompt: str | None, size: list[int] | None, dtype: str,
        device: str,
    ) -> None:  # fmt: skip
        self.model, self.solver, self.steps, self.grid, self.size = model, solver, steps, grid, size
        self.guidance_scale, self.guidance, self.teleport = guidance_scale, guidance, teleport
        self.prompt, self.negative_prompt, self.dtype, self.device = prompt, negative_prompt, dtype, device
        self.fingerprint = ""

    def load(self) -> Any:
        import torch

        from .. import models
        from ..adapters.use import use

        kind = getattr(torch, self.dtype)
        if self.model in models.names():
            pipe = models.load(self.model, dtype=kind, device=self.device)
            self.fingerprint = models.fingerprint(self.model)
        else:
            pipe = _load_pipeline(self.model, kind).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        use(
            pipe, self.solver, grid=self.grid, guidance=self.guidance, guidance_scale=self.guidance_scale,
            teleport=self.teleport,
        )  # fmt: skip
        return pipe

    def arguments(self, pipe: Any, labels: list[int | None], generators: list[Any]) -> dict[str, Any]:
        import inspect

        accepted = inspect.signature(pipe.__call__).parameters
        made: dict[str, Any] = {"num_inference_steps": self.steps, "generator": generators}
        if "class_labels" in accepted and None not in labels:
            made["class_labels"] = labels
        elif "class_labels" in accepted:
            made["num_images_per_prompt"] = len(labels)
        elif "prompt" in accepted:
            if self.prompt is None:
                raise DiffsampError(f"prompt: is needed by {type(pipe).__name__}")
            made["prompt"] = [self.prompt] * len(labels)
            if self.negative_prompt is not None:
                made["negative_prompt"] = [self.negative_prompt] * len(labels)
        elif "batch_size" in accepted:
            made["batch_size"] = len(labels)
        if self.guidance_scale is not None:
            made["guidance_scale"] = self.guidance_scale
        if self.size is not None:
            if "height" not in accepted:
                raise DiffsampError(f"size: {type(pipe).__name__} makes pictures of one size")
            made["height"], made["width"] = self.size
        return {key: value for key, value in made.items() if key in accepted}

    def recipe(self, seed: int, batch: list[list[Any]]) -> Any:
        import torch

        from ..recipe import Recipe, versions

        return Recipe(
            model=self.model, solver=self.solver, steps=self.steps, seed=seed, batch=batch, grid=self.grid,
            guidance_scale=self.guidance_scale, guidance=self.guidance, teleport=self.teleport, prompt=self.prompt,
            negative_prompt=self.negative_prompt, size=self.size, dtype=self.dtype, device=self.device,
            threads=torch.get_num_threads(), fingerprint=self.fingerprint, versions=versions(),
        )  # fmt: skip


class _Watch:
    """Finds samples that stop being finite, at the step where it happens; the others go on."""

    def __init__(self, progress: Any = None) -> None:
        self.bad: dict[int, str] = {}
        self.progress = progress

    def __call__(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        import torch

        latents = values.get("latents")
        if latents is not None:
            fine = torch.isfinite(latents.flatten(1)).all(1).tolist()
            for sample, ok in enumerate(fine):
                if not ok and sample not in self.bad:
                    sigma = float(pipe.scheduler.sigmas[min(index, len(pipe.scheduler.sigmas) - 1)])
                    self.bad[sample] = f"step {index}, sigma {sigma:.4g}"
        if self.progress is not None:
            self.progress()
        return {}


def _batch(job: _Job, pipe: Any, batch: list[list[Any]], tick: Any = None) -> tuple[list[Any], dict[int, str]]:
    """Pictures of one batch of (seed, class), and what went wrong with which."""
    import inspect

    import torch

    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed, _ in batch]
    arguments = job.arguments(pipe, [label for _, label in batch], generators)
    watch = _Watch(tick)
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        arguments["callback_on_step_end"] = watch
    with torch.no_grad():
        images = pipe(**arguments).images
    return images, watch.bad


def _run(
    job: _Job, pipe: Any, seeds: list[int], labels: list[int | None], folder: Path, batch_size: int, *, as_json: bool,
    force: bool,
) -> None:  # fmt: skip
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..files import write_whole
    from ..models import FASHION_CLASSES
    from ..recipe import labelled_grid, png_bytes

    console = Console(stderr=True)
    pairs = [[seed, label] for seed, label in zip(seeds, labels, strict=True)]
    pictures, captions, files, bad = [], [], [], {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=as_json, transient=False) as progress:
        # Solvers with two evaluations a step call back once per network call.
        task = progress.add_task(f"{job.model} · {job.solver}", total=len(pairs))
        at = 0
        while at < len(pairs):
            batch = pairs[at : at + batch_size]
            done = [0]

            def tick(at: int = at, batch: list[Any] = batch, done: list[int] = done) -> None:
                done[0] += 1
                progress.update(task, completed=at + len(batch) * min(done[0] / job.steps, 1.0))

            try:
                images, broken = _batch(job, pipe, batch, tick)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise DiffsampError(
                        f"batch-size: one picture does not fit into the memory of {job.device}; try --size or --dtype"
                    ) from None
                batch_size = len(batch) // 2
                console.print(f"memory ran out; going on with --batch-size {batch_size}")
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            for k, (image, (seed, label)) in enumerate(zip(images, batch, strict=True)):
                if k in broken:
                    bad[seed] = broken[k]
                    continue
                path = folder / f"seed-{seed:06d}.png"
                write_whole(path, png_bytes(image, job.recipe(seed, batch)), overwrite=force)
                files.append(str(path))
                pictures.append(image)
                captions.append(f"{seed}" if label is None else f"{FASHION_CLASSES[label]} {seed}")
            at += len(batch)
            progress.update(task, completed=at)
    sheet = None
    if pictures:
        width = 10 if len(pictures) >= 10 else len(pictures)
        sheet = folder / "grid.png"
        data = labelled_grid(pictures, captions, width, max(1, 84 // pictures[0].width))
        write_whole(sheet, data, overwrite=force)
    command = "diffsamp generate " + " ".join(_quoted(a) for a in _arguments(job, seeds, labels))
    if as_json:
        facts = {"grid": None if sheet is None else str(sheet), "files": files, "not_finite": bad, "command": command}
        print(json.dumps(facts))
    else:
        out = Console()
        if sheet is not None:
            out.print(f"{len(files)} pictures and {sheet} are in {folder}", highlight=False, soft_wrap=True)
            out.print(f"again: {command}", highlight=False, soft_wrap=True)
            out.print(f"one of them: diffsamp generate --from {files[0]}", highlight=False, soft_wrap=True)
    if bad:
        for seed, where in bad.items():
            print(f"error: the prediction for seed {seed} is not finite at {where}", file=sys.stderr)
        raise typer.Exit(3)


def _out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left. Only CUDA's has a class of its own."""
    import torch

    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def _repeat(path: Path, out: Path | None, *, as_json: bool, dry_run: bool, force: bool) -> None:
    import torch

    from ..files import check_folder, next_folder, write_whole
    from ..recipe import Recipe, png_bytes, versions

    recipe = Recipe.from_png(path)
    folder = out if out is not None else next_folder(Path("outputs"), "again")
    check_folder(folder, force=force)
    if dry_run:
        print(json.dumps({**json.loads(recipe.to_json()), "out": str(folder)}))
        return
    job = _Job(
        recipe.model, recipe.solver, recipe.steps, recipe.grid, recipe.guidance_scale, recipe.guidance, recipe.teleport,
        recipe.prompt, recipe.negative_prompt, recipe.size, recipe.dtype, _device(recipe.device),
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        pipe = job.load()
        if recipe.classes is None:
            images, bad = _batch(job, pipe, recipe.batch)
            index = [seed for seed, _ in recipe.batch].index(recipe.seed)
            image, wrong = images[index], bad.get(index)
        else:
            from .corrected import repeated

            image, wrong = repeated(pipe, recipe), None
    finally:
        torch.set_num_threads(threads)
    if recipe.versions != versions() or (job.fingerprint and job.fingerprint != recipe.fingerprint):
        print("note: this stack differs from the one in the recipe; the last bits may differ", file=sys.stderr)
    if wrong is not None:
        raise DiffsampError(f"from: the prediction for seed {recipe.seed} is not finite at {wrong}")
    target = folder / path.name
    with _folder(folder, force=force):
        write_whole(target, png_bytes(image, recipe), overwrite=force)
    print(json.dumps({"files": [str(target)]}) if as_json else f"repeated: {target}")


def _load_pipeline(model: str, dtype: Any) -> Any:
    from diffusers import DiffusionPipeline

    from .calibrate import pipeline_class

    try:
        # Newer releases renamed torch_dtype; setting it afterwards means the same in all of them.
        kind = pipeline_class(Path(model)) if (Path(model) / "model_index.json").is_file() else DiffusionPipeline
        return kind.from_pretrained(model).to(dtype)
    except (OSError, ValueError) as error:
        from ..models import names

        reason = str(error).strip().splitlines()[0]
        raise DiffsampError(
            f"model: {model!r} is not embedded ({', '.join(names())}) and did not load: {reason}"
        ) from None


def _classes(text: str | None, seeds: list[int], names: Any) -> list[int | None]:
    """One class per seed: the listed ones in turn, all of them by default."""
    if text is None:
        return [seed % len(names) for seed in seeds]
    if "*" in text:
        return [None] * len(seeds)
    lowered = [name.lower() for name in names]
    found: list[int] = []
    for part in text.split(","):
        part = part.strip()
        span = re.fullmatch(r"(\d+)-(\d+)", part)
        if span:
            found += range(int(span.group(1)), int(span.group(2)) + 1)
        elif part.isdecimal():
            found.append(int(part))
        elif part.lower() in lowered:
            found.append(lowered.index(part.lower()))
        else:
            raise DiffsampError(f"class: {part!r} is not a class; accepted: 0-{len(names) - 1} or {', '.join(names)}")
    if not found or max(found) >= len(names):
        raise DiffsampError(f"class: got {text!r}; accepted: 0-{len(names) - 1} or {', '.join(names)}")
    return [found[k % len(found)] for k in range(len(seeds))]


def _size(text: str | None) -> list[int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found or int(found.group(1)) < 1:
        raise DiffsampError(f"size: got {text!r}; write HEIGHTxWIDTH, as in 512x768")
    height = int(found.group(1))
    width = int(found.group(2) or height)
    if width < 1:
        raise DiffsampError(f"size: got {text!r}; write HEIGHTxWIDTH, as in 512x768")
    return [height, width]


def _device(name: str | None) -> str:
    """A device that is there, by name; the best one by default.

    Raises:
        DiffsampError: it is no device of torch, or this machine has none such.
    """
    import torch

    if name is not None:
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise DiffsampError(f"device: {name!r} cannot be used here: {reason}") from None
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _arguments(job: _Job, seeds: list[int], labels: list[int | None]) -> list[str]:
    made = ["--model", job.model, "--solver", job.solver, "--steps", str(job.steps), "--seeds", _ranges(seeds)]
    for flag, value in (
        ("--grid", job.grid), ("--guidance-scale", job.guidance_scale), ("--guidance", job.guidance),
        ("--teleport", job.teleport), ("--prompt", job.prompt), ("--negative-prompt", job.negative_prompt),
    ):  # fmt: skip
        if value is not None:
            made += [flag, str(value)]
    if job.size is not None:
        made += ["--size", f"{job.size[0]}x{job.size[1]}"]
    if any(label is not None and label != seed % 10 for seed, label in zip(seeds, labels, strict=True)):
        made += ["--class", ",".join(str(label) for label in labels)]
    if job.dtype != "float32":
        made += ["--dtype", job.dtype]
    return made


def _ranges(seeds: list[int]) -> str:
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
