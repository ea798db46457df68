"""``diffsamp calibrate``: ratios, constants, grids and statistics for the user's own model.

The results are safetensors artifacts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DiffsampError

app = typer.Typer(help="Calibrate solvers on a model.", no_args_is_help=True, pretty_exceptions_enable=False)

_Model = Annotated[str, typer.Option(help="Embedded name, or a local folder of a class-conditional pipeline.")]
_Nfe = Annotated[str, typer.Option(help="Network calls, with commas.")]
_Scale = Annotated[str, typer.Option(help="Guidance scales, with commas.")]
_Out = Annotated[Path | None, typer.Option(help="The artifact; continued where it exists.")]
_Grid = Annotated[str, typer.Option(help="Name of the grid.")]
_Points = Annotated[int, typer.Option(help="Start noises to calibrate on.")]
_HeldOut = Annotated[int, typer.Option(help="Start noises to check on, never searched.")]
_Steps = Annotated[int, typer.Option(help="Network calls of the fine run.")]
_Plot = Annotated[Path | None, typer.Option(help="Write a plot of the errors before and after.")]


@app.command()
def dc(
    model: _Model = "fashion",
    solver: Annotated[str, typer.Option(help="Base: a deterministic multistep solver.")] = "unipc",
    nfe: _Nfe = "5,6,8,10",
    guidance_scale: _Scale = "1,3,7.5",
    out: _Out = None,
    grid: _Grid = "linspace",
    k: Annotated[int, typer.Option(help="Degree of the interpolation, 1 to 3.")] = 2,
    points: _Points = 10,
    held_out: _HeldOut = 20,
    reference_steps: _Steps = 200,
    plot: _Plot = None,
) -> None:
    """DC-Solver: one ratio per step."""
    from ..calibrate import calibrate_dc

    _run(calibrate_dc, "dc", model, solver, nfe, guidance_scale, out, plot, grid=grid, k=k, points=points,
         held_out=held_out, reference_steps=reference_steps)  # fmt: skip


@app.command()
def dualfast(
    model: _Model = "fashion",
    solver: Annotated[str, typer.Option(help="Base: a deterministic multistep solver.")] = "dpmpp-2m",
    nfe: _Nfe = "5,6,8,10",
    guidance_scale: _Scale = "1,3,7.5",
    out: _Out = None,
    grid: _Grid = "linspace",
    tau: Annotated[str, typer.Option(help="first, previous, or how many steps back.")] = "first",
    points: _Points = 10,
    held_out: _HeldOut = 20,
    reference_steps: _Steps = 200,
    plot: _Plot = None,
) -> None:
    """DualFast: one mixing constant per step (the law is this project's)."""
    from ..calibrate import calibrate_dualfast

    _run(calibrate_dualfast, "dualfast", model, solver, nfe, guidance_scale, out, plot, grid=grid, points=points,
         tau=int(tau) if tau.isdecimal() else tau, held_out=held_out, reference_steps=reference_steps)  # fmt: skip


@app.command()
def grid(
    model: _Model = "fashion",
    solver: Annotated[str, typer.Option(help="The solver that will use the grid.")] = "unipc",
    nfe: _Nfe = "5,6,8,10",
    guidance_scale: _Scale = "1,3,7.5",
    out: _Out = None,
    start: Annotated[str, typer.Option(help="Name of the grid to start from.")] = "linspace",
    rounds: Annotated[int, typer.Option(help="Rounds of the Gauss-Newton search, at most.")] = 5,
    points: _Points = 32,
    held_out: _HeldOut = 20,
    reference_steps: _Steps = 200,
    plot: _Plot = None,
) -> None:
    """Noise levels for a given number of calls."""
    from ..calibrate import calibrate_grid

    _run(calibrate_grid, "grid", model, solver, nfe, guidance_scale, out, plot, grid=start, rounds=rounds,
         points=points, held_out=held_out, reference_steps=reference_steps)  # fmt: skip


@app.command("all")
def all_(
    model: _Model = "fashion",
    solver: Annotated[str, typer.Option(help="Base: a deterministic multistep solver.")] = "unipc",
    nfe: _Nfe = "5,6,8,10",
    guidance_scale: _Scale = "1,3,7.5",
    out: _Out = None,
    grid: _Grid = "linspace",
    points: _Points = 48,
    held_out: _HeldOut = 20,
    reference_steps: _Steps = 200,
    plot: _Plot = None,
) -> None:
    """Levels, ratios and constants, then all numbers of the table together."""
    from ..calibrate import calibrate_all

    _run(calibrate_all, "all", model, solver, nfe, guidance_scale, out, plot, grid=grid, points=points,
         held_out=held_out, reference_steps=reference_steps)  # fmt: skip


@app.command()
def gaussian(
    model: _Model = "fashion",
    samples: Annotated[int, typer.Option(help="Samples of the model to make, where no data are given.")] = 2000,
    data: Annotated[
        Path | None, typer.Option(help="A .npz file: x (n, ...) in the model's range, labels (n,).")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Directions kept; all by default.")] = 96,
    steps: Annotated[int, typer.Option(help="Network calls per sample of the model.")] = 20,
    out: _Out = None,
) -> None:
    """Gaussian statistics for teleportation, from data or from the model's own samples."""
    import numpy as np
    import torch

    from .. import teleport

    path = out or Path(f"{Path(model).name}-gaussian.safetensors")
    if data is not None:
        try:
            with np.load(data, allow_pickle=False) as file:
                x, labels = torch.from_numpy(file["x"]), torch.from_numpy(file["labels"]) if "labels" in file else None
        except (OSError, ValueError, KeyError) as error:
            raise DiffsampError(f"data: {data} cannot be read ({error}); needs an .npz file with x") from None
        parts = x.split(1000) if labels is None else zip(x.split(1000), labels.split(1000), strict=True)
        key = {"data": data.name}
    else:
        parts, key = _samples(_model(model), samples, steps), {"samples_of": Path(model).name}
    stats = teleport.gather(parts, rank=rank, key=key)
    stats.save(path)
    print(
        f"{path}: statistics of {stats.count} samples, {stats.eigenvalues.numel()} directions, std {stats.std:.4f}"
    )


def _samples(model: Any, count: int, steps: int):
    from .. import engine
    from ..grids import grid as by_name
    from ..registry import solver

    plan = solver("unipc")(model.process, by_name("linspace", model.process, steps))
    show = _Progress(f"{count} samples")
    for first in range(0, count, 100):
        noise, labels = model.points(range(first, min(first + 100, count)))
        x = noise * plan.first_level.sigma
        yield engine.sample(plan, model.guided(labels, 1.0), x, prediction=model.prediction), labels
        show("samples", min(first + 100, count), count)


def _model(name: str):
    from .. import calibrate, models
    from ..calibrate.model import from_pipeline

    if name in models.names():
        return calibrate.embedded(name)
    if not Path(name).is_dir():
        raise DiffsampError(f"model: {name!r} is neither embedded ({', '.join(models.names())}) nor a local folder")
    from diffusers import DiffusionPipeline

    return from_pipeline(DiffusionPipeline.from_pretrained(name, local_files_only=True), Path(name).name)


def _numbers(text: str, name: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise DiffsampError(f"{name}: cannot read {text!r}; write numbers with commas, such as 5,6,8") from None


class _Progress:
    """One line on stderr with the remaining time."""

    def __init__(self, title: str) -> None:
        self.title, self.began = title, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        left = (time.monotonic() - self.began) / done * (total - done)
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"{self.title}: {what}, {done}/{total}, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)


def _run(
    run: Callable[..., Any], method: str, model: str, solver: str, nfe: str, guidance_scale: str, out: Path | None,
    plot: Path | None, **options: Any,
) -> None:  # fmt: skip
    from rich.console import Console
    from rich.table import Table

    from ..calibrate.artifact import filename

    found = _model(model)
    path = out or Path(filename(found.name, method, solver))
    artifact = run(
        found, solver=solver, nfe=_numbers(nfe, "nfe", int), guidance_scale=_numbers(guidance_scale, "guidance-scale",
        float),
        out=path, progress=_Progress(f"{method} on {solver}"), **options,
    )  # fmt: skip
    table = Table(title=f"{method} on {solver}, {found.name}: error of the final state on held-out seeds")
    for heading in ("calls", "guidance", "before", "after", "gain", "search calls", "kept"):
        table.add_column(heading, justify="right")
    for setting in artifact.settings.values():
        before, after = setting.held_out_before, setting.held_out_after
        table.add_row(
            str(setting.nfe), f"{setting.guidance_scale:g}", f"{before:.5f}", f"{after:.5f}", f"{before / after:.2f}x",
            str(setting.calls), setting.kept,
        )  # fmt: skip
    Console().print(table)
    print(path)
    if plot is not None:
        _plot(artifact, plot)


def _plot(artifact: Any, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise DiffsampError("plot: needs matplotlib; install diffsamp[report]") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for scale in sorted({s.guidance_scale for s in artifact.settings.values()}):
        chosen = sorted((s for s in artifact.settings.values() if s.guidance_scale == scale), key=lambda s: s.nfe)
        (line,) = axis.plot(
            [s.nfe for s in chosen], [s.held_out_before for s in chosen], "--", label=f"before, {scale:g}"
        )
        axis.plot(
            [s.nfe for s in chosen],
            [s.held_out_after for s in chosen],
            "-o",
            color=line.get_color(),
            label=f"after, {scale:g}",
        )
    axis.set(
        xlabel="network calls", ylabel="held-out error", yscale="log", title=f"{artifact.method}({artifact.solver})"
    )
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
