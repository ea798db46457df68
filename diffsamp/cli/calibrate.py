"""``diffsamp calibrate``: ratios, constants, grids and statistics for the user's own model.

The results are safetensors artifacts. Every search has the same options, said once in ``_OPTIONS``; what is not given
is left to the search's own default.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DiffsampError
from .gaussian import gaussian

app = typer.Typer(help="Calibrate solvers on a model.", no_args_is_help=True, pretty_exceptions_enable=False)
app.command("gaussian")(gaussian)

_OPTIONS: dict[str, tuple[Any, str, Any]] = {
    "model": (str, "Embedded name, or a local folder of a class-conditional pipeline.", "fashion"),
    "solver": (str | None, "Base: a deterministic multistep solver.", None),
    "nfe": (str, "Network calls, with commas.", "5,6,8,10"),
    "guidance_scale": (str, "Guidance scales, with commas.", "1,3,7.5"),
    "out": (Path | None, "The artifact; continued where it exists.", None),
    "grid": (str | None, "Name of the grid (to start from).", None),
    "final": (str | None, "Where the grid ends: zero or sigma_min.", None),
    "points": (int | None, "Start noises to calibrate on.", None),
    "held_out": (int | None, "Start noises to check on, never searched.", None),
    "reference_steps": (int | None, "Network calls of the fine run.", None),
    "k": (int | None, "Degree of the interpolation, 1 to 3.", None),
    "tau": (str | None, "first, previous, or how many steps back.", None),
    "evaluations": (int | None, "Network calls per searched value, at most.", None),
    "method": (str | None, "search, or adamw: the published recipe.", None),
    "iterations": (int | None, "Iterations of adamw per ratio (40 in the paper).", None),
    "rounds": (int | None, "Rounds of Gauss-Newton, at most.", None),
    "extractor": (str | None, "Refine for the Fréchet distance of these features, such as fashion-cnn.", None),
    "reference": (str | None, "Real pictures: embedded (training split), a folder, .npz, .safetensors.", None),
    "feature_weights": (Path | None, "The extractor's weights, where it needs a file.", None),
    "pictures": (int | None, "Pictures per distance; 512 or more are advised.", None),
    "weight": (float | None, "Of the distance against the error, in units of their starts.", None),
    "bound": (float | None, "How far the error may rise for the distance, as a factor.", None),
    "plot": (Path | None, "Write a plot of the errors before and after.", None),
}
_SHARED = ("model", "solver", "nfe", "guidance_scale", "out", "grid", "final", "points", "held_out", "reference_steps")
# Stage 4 of "all", which an extractor asks for.
_PICTURES = ("extractor", "reference", "feature_weights", "pictures", "weight", "bound")


def _command(method: str, help_text: str, *own: str) -> None:
    """Add ``diffsamp calibrate <method>`` with the shared options, those of ``own``, and --plot."""

    def command(**given: Any) -> None:
        from .. import calibrate

        _run(getattr(calibrate, f"calibrate_{method}"), method, **given)

    names = (*_SHARED, *own, "plot")
    kinds = {name: Annotated[_OPTIONS[name][0], typer.Option(help=_OPTIONS[name][1])] for name in names}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_OPTIONS[name][2], annotation=kinds[name])
        for name in names
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = kinds
    app.command(method, help=help_text)(command)


_command("dc", "DC-Solver: one ratio per step.", "k", "evaluations", "method", "iterations")
_command("dualfast", "DualFast: one mixing constant per step (the law is this project's).", "tau", "evaluations")
_command("grid", "Noise levels for a given number of calls.", "rounds")
_command(
    "all", "Levels, ratios and constants, then all numbers of the table together.", "k", "tau", "evaluations", "rounds",
    *_PICTURES,
)  # fmt: skip


def find_model(name: str) -> Any:
    """The calibration view of an embedded model or of a pipeline in a local folder."""
    from .. import calibrate, models
    from ..calibrate.model import from_pipeline

    if name in models.names():
        return calibrate.embedded(name)
    if not Path(name).is_dir():
        raise DiffsampError(f"model: {name!r} is neither embedded ({', '.join(models.names())}) nor a local folder")
    try:
        pipeline = pipeline_class(Path(name)).from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DiffsampError(f"model: {name!r} did not load as a pipeline: {reason}") from None
    return from_pipeline(pipeline, Path(name).name)


def pipeline_class(folder: Path) -> Any:
    """The class that a saved pipeline names: ours where it is one of ours, which diffusers does not look for."""
    import json

    from diffusers import DiffusionPipeline

    from ..models.pipeline import ClassConditionalPipeline

    named = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    return ClassConditionalPipeline if named == ClassConditionalPipeline.__name__ else DiffusionPipeline


def numbers(text: str, name: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers written with commas; at least one."""
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise DiffsampError(f"{name}: cannot read {text!r}; write numbers with commas, such as 5,6,8")
    return found


class Progress:
    """One line on stderr with the remaining time."""

    def __init__(self, title: str) -> None:
        self.title, self.began = title, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        left = (time.monotonic() - self.began) / done * (total - done)
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"{self.title}: {what}, {done}/{total}, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)


def _run(
    run: Callable[..., Any], what: str, /, *, model: str, nfe: str, guidance_scale: str, solver: str | None,
    out: Path | None, plot: Path | None, **options: Any,
) -> None:  # fmt: skip
    from rich.console import Console
    from rich.table import Table

    from ..calibrate.artifact import filename

    base = solver or inspect.signature(run).parameters["solver"].default
    if plot is not None:
        _matplotlib()  # what is missing is said before the search, not after it
    calls, scales = numbers(nfe, "nfe", int), numbers(guidance_scale, "guidance-scale", float)
    given = {name: value for name, value in options.items() if value is not None}
    if str(given.get("tau", "")).isdecimal():
        given["tau"] = int(given["tau"])
    lost = [name for name in _PICTURES if name in given]
    if lost and "extractor" not in given:
        raise DiffsampError(
            f"{lost[0].replace('_', '-')}: is of no use without --extractor; name one, such as fashion-cnn"
        )
    found = find_model(model)
    path = out or Path(filename(found.name, what, base))
    show = Progress(f"{what} on {base}")
    artifact = run(found, solver=base, nfe=calls, guidance_scale=scales, out=path, progress=show, **given)
    table = Table(title=f"{what} on {base}, {found.name}: error of the final state on held-out seeds")
    distances = any(setting.distance for setting in artifact.settings.values())
    headings = ["calls", "guidance", "before", "after", "gain", "search calls", "kept"]
    for heading in [*headings, *(["distance"] if distances else [])]:
        table.add_column(heading, justify="right")
    for setting in artifact.settings.values():
        before, after = setting.held_out_before, setting.held_out_after
        table.add_row(
            str(setting.nfe), f"{setting.guidance_scale:g}", f"{before:.5f}", f"{after:.5f}", f"{before / after:.2f}x",
            str(setting.calls), setting.kept, *([_distance(setting)] if distances else []),
        )  # fmt: skip
    Console().print(table)
    print(path)
    if plot is not None:
        _plot(artifact, plot)


def _distance(setting: Any) -> str:
    """Fréchet distance before and after, of a setting that was refined for it."""
    facts = setting.distance
    return "-" if facts is None else f"{facts['before']:.3f} to {facts['after']:.3f}"


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise DiffsampError("plot: needs matplotlib; install diffsamp[report]") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _plot(artifact: Any, path: Path) -> None:
    plt = _matplotlib()
    figure, axis = plt.subplots(figsize=(6, 4))
    for scale in sorted({s.guidance_scale for s in artifact.settings.values()}):
        chosen = sorted((s for s in artifact.settings.values() if s.guidance_scale == scale), key=lambda s: s.nfe)
        calls = [s.nfe for s in chosen]
        (line,) = axis.plot(calls, [s.held_out_before for s in chosen], "--", label=f"before, {scale:g}")
        axis.plot(
            calls, [s.held_out_after for s in chosen], "-o", color=line.get_color(), label=f"after, {scale:g}"
        )  # fmt: skip
    axis.set(
        xlabel="network calls", ylabel="held-out error", yscale="log", title=f"{artifact.method}({artifact.solver})"
    )
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(path)
