"""Calibrating DualFast's constants and DC-Solver's ratios together.

The constants are found first and ratios on top of them; ratios without constants are searched too, and the better of
the
two on the calibration points is kept. Each search is guarded on the same points.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..plan import Plan
from ..solvers.dc import dc
from ..solvers.dualfast import dualfast
from .artifact import Artifact
from .model import Model
from .reference import Denoiser, Reference
from .run import Found, Progress, calibrate
from .search import search_constants, search_ratios


def calibrate_all(
    model: Model,
    *,
    nfe: Sequence[int],
    guidance_scale: Sequence[float],
    solver: str = "unipc",
    out: str | os.PathLike[str] | None = None,
    grid: str = "linspace",
    final: str = "zero",
    k: int = 2,
    tau: str | int = "first",
    points: int = 10,
    held_out: int = 20,
    reference_steps: int = 200,
    evaluations: int = 8,
    progress: Progress | None = None,
) -> Artifact:
    """Ratios and constants for every (nfe, guidance scale); continues ``out`` where it exists."""

    def search(plan: Plan, reference: Reference, denoiser: Denoiser, x: torch.Tensor, prediction: str) -> Found:
        constants = search_constants(
            plan, reference, denoiser, x, tau=tau, prediction=prediction, evaluations=evaluations
        )
        options = {"k": k, "prediction": prediction, "evaluations": evaluations}
        found = search_ratios(plan, reference, denoiser, x, **options)
        calls, values, mixed = constants.calls + found.calls, (0.0,) * plan.nfe, plan
        if any(constants.values):
            pushed = dualfast(plan, c=constants.values, tau=tau)
            both = search_ratios(pushed, reference, denoiser, x, **options)
            calls += both.calls
            if both.after < found.after:
                found, values, mixed = both, constants.values, pushed
        ratios = found.values
        return Found(
            (*ratios, *values), constants.before, found.after, found.kept, calls, lambda: dc(mixed, ratios=ratios, k=k)
        )

    return calibrate(
        "all", model, search, solver=solver, nfe=nfe, guidance_scale=guidance_scale, out=out, grid_name=grid, final=final,  # noqa: E501
        options={"k": k, "tau": tau}, points=points, held_out=held_out, reference_steps=reference_steps,
        progress=progress,
    )  # fmt: skip
