"""The protocol suite: what every registered solver must satisfy. Our own solvers run it; so can a plug-in's author."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DiffsampError
from ..grids import grid
from ..plan import Plan
from ..process import Process
from ..registry import solver, solver_info
from .order import interior_order, weak_order
from .problems import PROBLEMS

_PROCESSES = {
    "vp": (Process.vp("scaled_linear", 0.00085, 0.012), ("trailing", "karras", "exponential")),
    "cosine": (Process.vp("squaredcos_cap_v2"), ("trailing",)),
    "ve": (Process.ve(), ("karras",)),
    "flow": (Process.flow(3.0), ("flow", "uniform")),
}


def check_protocol(name: str, **options: Any) -> None:
    """Plans exist for every process, grid and step count, are finite, repeatable and hashable, and are documented.

    Raises:
        AssertionError: with what does not hold.
    """
    info = solver_info(name)
    assert info.doc, f"{name} has no docstring"
    assert info.citation.startswith("@"), f"{name}'s docstring does not end in BibTeX"
    made = solver(name, **options)
    for label, (process, grids) in _PROCESSES.items():
        for grid_name in grids:
            for steps in (1, 2, 3, 4, 7, 15, 31):
                levels = grid(grid_name, process, steps)
                plan = made(process, levels)
                where = f"{name} on {label}/{grid_name}, {steps} steps"
                assert isinstance(plan, Plan), f"{where}: is not a Plan"
                assert plan == made(process, levels), f"{where}: is not repeatable"
                assert np.isfinite(plan.response("sample")).all(), f"{where}: is not finite"
                assert plan.nfe <= info.evaluations * steps, f"{where}: calls the network {plan.nfe} times"
                assert plan.last_level.sigma == 0.0, f"{where}: does not end at the data"
                assert info.stochastic or not plan.stochastic, f"{where}: draws noise, but is registered without"


def check_order(name: str, order: float | None = None, *, tolerance: float = 0.15, **options: Any) -> None:
    """Interior order of a deterministic solver, or weak order of a stochastic one, within ``tolerance`` (0.2 weak).

    ``options`` should switch the lowering of the order at the end off (``lower_order_final=False``).
    """
    made = solver(name, **options)
    process = Process.vp_continuous(1e-3, 100.0)
    nominal = solver_info(name).order if order is None else order
    if solver_info(name).stochastic:
        found = weak_order(made, process, steps=(192, 384))
        assert abs(found - nominal) <= 0.2, f"{name}: weak order {found:.2f}, nominal {nominal}"
        return
    for label, problem in PROBLEMS.items():
        found = interior_order(made, problem, process, steps=(96, 192))
        assert abs(found - nominal) <= tolerance, f"{name} on {label}: order {found:.2f}, nominal {nominal}"


def check_solver(name: str, **options: Any) -> None:
    """The protocol suite, then the order suite; DiffsampError for an unknown name."""
    try:
        check_protocol(name, **options)
    except DiffsampError as error:
        raise AssertionError(f"{name}: {error}") from error
    check_order(name, **options)
