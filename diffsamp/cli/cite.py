"""``diffsamp cite``: the BibTeX of what was used."""

from __future__ import annotations

from typing import Annotated

import typer


def cite(
    names: Annotated[list[str] | None, typer.Argument(help="Solvers; all of them by default.")] = None,
) -> None:
    """Print the BibTeX entries of solvers."""
    from ..registry import solver_info, solvers

    seen: dict[str, None] = {}
    for info in [solver_info(name) for name in names] if names else solvers().values():
        seen.setdefault(info.citation, None)
    print("\n\n".join(text for text in seen if text))
