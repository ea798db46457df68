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
        # Typer's own way out is a box of several lines; an explicit exit comes back as its code.
        code = build()(args=arguments, prog_name="diffsamp", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except DiffsampError as error:
        if debug:
            raise
        _say(str(error))
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        # The classes have moved between releases of typer; what they carry has not.
        if type(error).__name__ == "Abort":
            _say("interrupted")
            sys.exit(130)
        if debug or not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
        else:
            _say(f"{error.format_message().rstrip('.')}; see diffsamp --help")  # type: ignore[attr-defined]
        sys.exit(2)


def _say(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
