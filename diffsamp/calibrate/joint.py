"""Calibrating DualFast's constants and DC-Solver's ratios together: first the constants, then ratios on top of them.

Each search is guarded on the same points, so the pair is never worse there than either stage's base.
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
        constants = search_constants(plan, reference, denoiser, x, tau=tau, prediction=prediction, evaluations=evaluations)
        mixed = dualfast(plan, c=constants.values, tau=tau)
        ratios = search_ratios(mixed, reference, denoiser, x, k=k, prediction=prediction, evaluations=evaluations)
        return Found(
            (*ratios.values, *constants.values), constants.before, ratios.after, f"{constants.kept}, {ratios.kept}",
            constants.calls + ratios.calls, lambda: dc(mixed, ratios=ratios.values, k=k),
        )  # fmt: skip

    return calibrate(
        "all", model, search, solver=solver, nfe=nfe, guidance_scale=guidance_scale, out=out, grid_name=grid, final=final,
        options={"k": k, "tau": tau}, points=points, held_out=held_out, reference_steps=reference_steps,
        progress=progress,
    )  # fmt: skip
