"""``diffsamp solvers``: list the registry, show one entry."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .plan import sys_is_terminal

app = typer.Typer(help="The registry of solvers.", invoke_without_command=True, pretty_exceptions_enable=False)


@app.callback()
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_()


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False) -> None:
    """List every registered solver."""
    from rich.console import Console
    from rich.table import Table

    from ..adapters.diffusers import class_name
    from ..registry import plugin_errors, solvers

    known = solvers()
    if as_json:
        print(json.dumps([
            {
                "name": name, "order": info.order, "evaluations": info.evaluations, "stochastic": info.stochastic,
                "transform": info.transform, "class": class_name(name), "origin": info.origin,
                "options": {k: repr(v) for k, v in info.options.items()}, "summary": info.summary,
            }
            for name, info in known.items()
        ]))  # fmt: skip
        return
    table = Table(title="solvers")
    for heading in ("name", "order", "calls/step", "noise", "class", "what it is"):
        table.add_column(heading, no_wrap=heading == "name")
    for name, info in known.items():
        noise = "yes" if info.stochastic else ""
        order = "of its base" if info.transform else str(info.order)
        table.add_row(name, order, str(info.evaluations), noise, class_name(name), info.summary)
    for name, reason in plugin_errors().items():
        table.add_row(f"[red]{name}[/red]", "", "", "", "", f"[red]plug-in did not load: {reason}[/red]")
    Console(width=None if sys_is_terminal() else 160).print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="Registry name.")]) -> None:
    """Show a solver: equations, options, source and citation."""
    from rich.console import Console

    from ..adapters.diffusers import class_name
    from ..registry import solver_info

    info = solver_info(name)
    console = Console(highlight=False)
    console.print(f"[bold]{info.name}[/bold]  ({class_name(info.name)}, from {info.origin})\n")
    console.print(info.doc, markup=False)
    if info.options:
        console.print("\noptions: " + ", ".join(f"{k}={v!r}" for k, v in info.options.items()), markup=False)
