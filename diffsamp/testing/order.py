"""The order suite: how fast a solver's error falls with the step, on problems whose answer is known.

Two figures, which are not the same. The *interior order* starts from an exact history and ends before the data, so it
is the order of the method itself. The *end-to-end order* is of a whole run: warm-up at first order, lowered order at
the end, and what a user gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..grids import Grid
from ..plan import Plan, Row
from ..process import Process
from .problems import PROBLEMS, Problem

Build = Callable[[Process, Grid], Plan]
_START = np.array([-1.3, -0.4, 0.2, 0.9, 1.7])


def lambda_grid(process: Process, low: float, high: float, steps: int, *, even_in: str = "lambda") -> Grid:
    """Grid over log-SNR halves low..high that ends before the data; evenly spaced in ``lambda`` or in ``ratio``."""
    ratios = np.exp(-np.linspace(low, high, steps + 1))
    if even_in == "ratio":
        ratios = np.linspace(np.exp(-low), np.exp(-high), steps + 1)
    return Grid(process, tuple(process.level(r, i) for i, r in enumerate(ratios)), f"even-{even_in}")


def error(plan: Plan, problem: Problem, *, exact_history: bool) -> float:
    """Largest error of the final sample; with ``exact_history`` the first rows are put on the exact trajectory."""
    start = plan.first_level
    warm = max(plan.depth, plan.order) + 1

    def output(i: int, row: Row, x: np.ndarray) -> np.ndarray:
        x0 = problem.denoise(x, row.level)
        return x0 if plan.form == "x0" else (x - row.level.alpha * x0) / row.level.sigma

    def visit(i: int, row: Row, x: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        if not exact_history or i >= warm:
            return None
        assert row.base_level is not None
        exact = problem.trajectory(_START, start, row.next_level)
        at_base = exact if row.base_level is row.next_level else problem.trajectory(_START, start, row.base_level)
        return exact, at_base

    found = plan.simulate(_START, output, visit=visit)
    return float(np.abs(found - problem.trajectory(_START, start, plan.last_level)).max())


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Order of convergence: minus the slope of log error against log steps."""
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def interior_order(
    build: Build, problem: Problem, process: Process, *, steps: Sequence[int] = (48, 96, 192), even_in: str = "lambda"
) -> float:
    """Measured interior order of a solver on one problem."""
    errors = [
        error(build(process, lambda_grid(process, -1.5, 1.5, n, even_in=even_in)), problem, exact_history=True)
        for n in steps
    ]
    return slope(steps, errors)


def end_to_end_order(
    build: Build, problem: Problem, process: Process, *, steps: Sequence[int] = (48, 96, 192)
) -> float:
    """Measured order of whole runs on a grid that ends just before the data."""
    errors = [error(build(process, lambda_grid(process, -1.5, 1.5, n)), problem, exact_history=False) for n in steps]
    return slope(steps, errors)


def weak_order(
    build: Build, process: Process, *, steps: Sequence[int] = (64, 128, 256), variance: float = 0.3
) -> float:
    """Order at which a stochastic solver's final variance approaches the true one, on Gaussian data.

    The denoiser is linear there, so mean and variance are propagated exactly: no sampling error.
    """
    errors = []
    for n in steps:
        plan = build(process, lambda_grid(process, -1.5, 1.5, n))
        unit = np.eye(1 + n)
        start = plan.first_level

        def output(i: int, row: Row, x: np.ndarray, plan: Plan = plan) -> np.ndarray:
            a, s = row.level.alpha, row.level.sigma
            x0 = a * variance / (a * a * variance + s * s) * x
            return x0 if plan.form == "x0" else (x - a * x0) / s

        first = np.sqrt(start.alpha**2 * variance + start.sigma**2) * unit[0]
        final = plan.simulate(first, output, lambda i, unit=unit: unit[1 + i])
        end = plan.last_level
        errors.append(abs(float((final**2).sum()) - (end.alpha**2 * variance + end.sigma**2)))
    return slope(steps, errors)


def orders(build: Build, process: Process, **options) -> dict[str, float]:
    """Interior order on every problem."""
    return {name: interior_order(build, problem, process, **options) for name, problem in PROBLEMS.items()}
