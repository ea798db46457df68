"""``diffsamp plan``: print the table of a solver."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..errors import DiffsampError


def plan(
    solver: Annotated[str, typer.Option(help="Registry name, with options or composed.")] = "unipc",
    steps: Annotated[int, typer.Option(help="Steps of the grid.")] = 8,
    grid: Annotated[str, typer.Option(help="Name of the grid; 'auto' suits the process.")] = "auto",
    process: Annotated[str, typer.Option(help="vp, ve or flow.")] = "vp",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Print the compiled table of a solver on a grid: one row per network call."""
    from rich.console import Console
    from rich.table import Table

    from ..grids import grid as make_grid
    from ..process import Process
    from ..registry import solver as make_solver

    made = {"vp": lambda: Process.vp("scaled_linear", 0.00085, 0.012), "ve": Process.ve, "flow": Process.flow}
    if process not in made:
        raise DiffsampError(f"process: got {process!r}; accepted: {', '.join(made)}")
    chosen = made[process]()
    names = {"vp": "trailing", "ve": "karras", "flow": "uniform"}
    table = make_solver(solver)(chosen, make_grid(names[process] if grid == "auto" else grid, chosen, steps))
    if as_json:
        rows = [
            {
                "t": row.level.t, "alpha": row.level.alpha, "sigma": row.level.sigma,
                "input": dict(row.advance.terms()), "base": None if row.correct is None else dict(row.correct.terms()),
                "rewrite": row.rewrite,
            }
            for row in table.rows
        ]  # fmt: skip
        print(json.dumps({"solver": table.solver, "fingerprint": table.fingerprint, "form": table.form, "rows": rows}))
        return
    shown = Table(title=f"{table.solver}, {table.nfe} network calls, {table.form} form", caption=table.fingerprint)
    for heading in ("call", "t", "alpha", "sigma", "register", "combination"):
        shown.add_column(heading, justify="right" if heading in ("call", "t", "alpha", "sigma") else "left")
    for i, row in enumerate(table.rows):
        lines = [("input", str(row.advance))]
        if row.correct is not None:
            lines.insert(0, ("base", str(row.correct)))
        if row.rewrite is not None:
            lines.insert(len(lines) - 1, ("m0", " ".join(f"{w:+.6g}·m{j}" for j, w in enumerate(row.rewrite))))
        for k, (register, text) in enumerate(lines):
            where = (str(i), f"{row.level.t:.3f}", f"{row.level.alpha:.5f}", f"{row.level.sigma:.5f}")
            shown.add_row(*(where if k == 0 else ("", "", "", "")), register, text)
    Console(width=None if sys_is_terminal() else 140).print(shown)


def sys_is_terminal() -> bool:
    """Whether standard output is a terminal (tables keep a fixed width elsewhere)."""
    import sys

    return sys.stdout.isatty()
