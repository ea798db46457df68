"""The command line: ``diffsamp generate``, ``bench``, ``report``, ``calibrate``, ``solvers``, ``plan``, ``cite``,
``doctor``."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from ..errors import DiffsampError


def build():
    """The typer application. Commands import what they need when they run."""
    import typer

    app = typer.Typer(
        name="diffsamp",
        help="A diffusion sampling toolkit: better pictures from fewer network calls.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for module, name in (
        ("generate", "generate"), ("bench", "bench"), ("report", "report"), ("plan", "plan"), ("cite", "cite"),
        ("doctor", "doctor"),
    ):  # fmt: skip
        if importlib.util.find_spec(f"diffsamp.cli.{module}") is None:
            continue
        command = getattr(importlib.import_module(f".{module}", __name__), name)
        app.command(name)(command)
    for module in ("solvers", "calibrate"):
        if importlib.util.find_spec(f"diffsamp.cli.{module}") is None:
            continue
        app.add_typer(importlib.import_module(f".{module}", __name__).app, name=module)
    return app


def main() -> None:
    """Entry point: one clear line for bad input, a traceback only with ``--debug``."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        build()(args=arguments, prog_name="diffsamp")
    except DiffsampError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
