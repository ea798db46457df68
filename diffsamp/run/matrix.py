"""The matrix of a benchmark: solvers x network calls x guidance, each a cell with a name and a place."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffsamp.errors import DiffsampError


@dataclass(frozen=True)
class Cell:
    """One column of pictures: a solver at a budget of network calls and a guidance scale.

    `solver` is a registry name (options and composed names too) or "diffusers:ClassName" with optional JSON-free
    options as in the registry: "diffusers:UniPCMultistepScheduler:solver_order=3".
    """

    solver: str
    nfe: int
    guidance_scale: float | None = None

    @property
    def name(self) -> str:
        """For people."""
        scale = "" if self.guidance_scale is None else f", w {self.guidance_scale:g}"
        return f"{self.solver} @ {self.nfe}{scale}"

    @property
    def folder(self) -> str:
        """For file systems; distinct for distinct cells."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:6]
        scale = "" if self.guidance_scale is None else f"-w{self.guidance_scale:g}"
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.solver}-{self.nfe}{scale}".lower()).strip("-") + f"-{digest}"

    def facts(self) -> dict[str, Any]:
        """As a dictionary."""
        return asdict(self)


def matrix(solvers: Sequence[str], nfe: Sequence[int], scales: Sequence[float | None]) -> list[Cell]:
    """All cells, cheapest budgets first; raises DiffsampError for an empty or bad axis."""
    for name, axis in (("solvers", solvers), ("nfe", nfe), ("guidance_scale", scales)):
        if not axis:
            raise DiffsampError(f"{name} is empty; accepted: at least one")
    for value in nfe:
        if value < 1 or value > 1000:
            raise DiffsampError(f"nfe holds {value}; accepted: 1 to 1000 network calls")
    for value in scales:
        if value is not None and not 0 <= value < 1000:
            raise DiffsampError(f"guidance_scale holds {value}; accepted: 0 to 1000 (1 is no guidance)")
    for solver in solvers:
        check_solver(solver)
    cells = [Cell(solver, budget, scale) for budget in sorted(set(nfe)) for scale in scales for solver in solvers]
    return list(dict.fromkeys(cells))


def stock_options(text: str) -> tuple[str, dict[str, Any]]:
    """Class name and options of "diffusers:ClassName:key=value,key=value"."""
    _, name, *rest = text.split(":", 2)
    options: dict[str, Any] = {}
    for part in rest[0].split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not equals:
            raise DiffsampError(f"solver={text!r}: cannot read {part!r}; write diffusers:ClassName:key=value")
        try:
            options[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            options[key] = value
    return name, options


def check_solver(name: str) -> None:
    """Raises DiffsampError with near names for a solver that is not known."""
    if not name.startswith("diffusers:"):
        from diffsamp.registry import solver

        solver(name)
        return
    import difflib

    import diffusers

    found, _ = stock_options(name)
    known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if found not in known:
        near = difflib.get_close_matches(found, known, n=2)
        raise DiffsampError(
            f"solver={name!r} is no scheduler of diffusers; did you mean {' or '.join(near) or known[0]}?"
        )
