"""``diffsamp bench``: quality against network calls of any solvers on any model, resumable, on many processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DiffsampError


def bench(
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command goes on where it stopped.")] = Path(
        "runs/bench"
    ),
    model: Annotated[str, typer.Option(help="Embedded name or local folder of a diffusers pipeline.")] = "fashion",
    solvers: Annotated[
        str, typer.Option(help="Commas between: registry names, dc(unipc), diffusers:DPMSolverMultistepScheduler.")
    ] = "unipc,dpmpp-2m,ddim",
    nfe: Annotated[str, typer.Option(help="Network calls per picture: 4,8 or 3-10.")] = "4,8",
    guidance_scale: Annotated[str | None, typer.Option(help="One or more, commas between; the model's own.")] = None,
    n: Annotated[int, typer.Option("--n", help="Pictures per cell.")] = 192,
    seed: Annotated[int, typer.Option(help="The first seed; picture i has seed + i.")] = 0,
    chunk: Annotated[int, typer.Option(help="Seeds per chunk, which is the network's batch size.")] = 64,
    metrics: Annotated[
        str, typer.Option(help="fd, fd-infinity, kid, is, precision, recall, accuracy, trajectory.")
    ] = "fd,kid,accuracy,precision,recall",
    protocol: Annotated[
        str, typer.Option(help="embedded, torch-fidelity, torchmetrics or clean-fid.")
    ] = "embedded",
    extractor: Annotated[str | None, typer.Option(help="Another feature extractor than the protocol's.")] = None,
    resize: Annotated[str | None, typer.Option(help="tf1, antialias or pil-bicubic, in place of the protocol's.")] =
    None, feature_weights: Annotated[str | None, typer.Option(help="Local weights file of the extractor.")] = None,
    reference: Annotated[str, typer.Option(help="embedded, a folder of pictures, .npz or .safetensors.")] = "embedded",
    samples_from: Annotated[str, typer.Option(help="solver@calls that the trajectory error is against.")] = "unipc@50",
    grid: Annotated[str | None, typer.Option(help="Grid of the registry's solvers, by name.")] = None,
    artifacts: Annotated[
        str | None, typer.Option(help="Folder of calibrated ratios for dc(...), in place of those that ship.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, local, torch (torchrun, accelerate), shared or ray.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of this process; pictures are repeatable for equal threads.")] =
    1, device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    keep: Annotated[int, typer.Option(help="Seeds whose pictures are kept for the report.")] = 64,
    prompts: Annotated[Path | None, typer.Option(help="Text models: a file with one prompt a line.")] = None,
    report: Annotated[bool, typer.Option(help="Write report.html into the folder when done.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run.")] = False,
) -> None:
    """Measure solvers against network calls. With no arguments: a small real table from the embedded model."""
    from ..run.bench import Bench
    from ..run.engines import ranks, resolve

    if threads < 1:
        raise DiffsampError(f"threads: got {threads}; must be 1 or above")
    job = Bench(
        out, model=model, solvers=split(solvers), nfe=numbers(nfe), guidance_scale=scales(guidance_scale), n=n,
        seed=seed, chunk=chunk, metrics=[m.strip() for m in metrics.split(",") if m.strip()], protocol=protocol,
        extractor=extractor, resize=resize, feature_weights=feature_weights, reference=reference,
        samples_from=samples_from, grid=grid, artifacts=artifacts, engine=engine, threads=threads,
        device=device, keep=keep, prompts=lines(prompts),
    )  # fmt: skip
    resolve(engine)
    cells = job.cells()
    if dry_run:
        calls = sum(cell.nfe for cell in cells) * n
        names = [cell.name for cell in cells]
        print(json.dumps({"out": str(out), "cells": names, "pictures": n * len(cells), "calls": calls}))
        return
    first = ranks(engine)[0] == 0
    results = job.run() if as_json or not first else _with_progress(job)
    if not first:
        return
    if report:
        from ..report import write_report

        write_report([out], out / "report.html")
    if as_json:
        print(json.dumps(results, sort_keys=True))
        return
    from ..report import print_table

    print_table(results)
    for warning in results["warnings"]:
        print(f"warning: {warning}")
    if report:
        print(f"report: {out / 'report.html'}")


def _with_progress(job: Any) -> dict[str, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..run.matrix import Cell

    total = len(job.cells()) * -(-job.n // job.chunk)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    seen: dict[Cell, int] = {}
    with Progress(*columns) as progress:
        task = progress.add_task("chunks", total=total)

        def told(cell: Cell, done: int, _: int) -> None:
            seen[cell] = done
            progress.update(task, completed=sum(seen.values()), description=cell.name)

        results = job.run(told)
        progress.update(task, completed=total, description="done")
    return results


def split(text: str) -> list[str]:
    """Solver names of a list with commas; commas inside parentheses and option lists belong to the name."""
    found, depth, part = [], 0, ""
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            found.append(part.strip())
            part = ""
        else:
            part += letter
    found.append(part.strip())
    names: list[str] = []
    for name in found:
        # unipc:order=3,lower_order_final=False is one name: what follows a comma is an option there, not a solver.
        if names and "=" in name and ":" not in name and "(" not in name and ":" in names[-1]:
            names[-1] += f",{name}"
        elif name:
            names.append(name)
    return names


def numbers(text: str) -> list[int]:
    """Network calls: "4,8" or "3-10"; raises DiffsampError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise DiffsampError(
                f"nfe: cannot read {part.strip()!r} in {text!r}; write numbers and ranges like 4,8 or 3-10"
            )
        found += range(int(first), (int(last) if dash else int(first)) + 1)
    return found


def scales(text: str | None) -> list[float | None]:
    """Guidance scales with commas between; None is the model's own."""
    if text is None:
        return [None]
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise DiffsampError(f"guidance-scale: cannot read {text!r}; write numbers like 1,2,4") from None


def lines(path: Path | None) -> list[str]:
    """The lines of a file that are not empty."""
    if path is None:
        return []
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DiffsampError(f"prompts: {path} cannot be read ({error})") from None
