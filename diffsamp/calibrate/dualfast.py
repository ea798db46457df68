"""Calibrating DualFast's constants on a model."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..plan import Plan
from ..solvers.dualfast import dualfast
from .artifact import Artifact
from .model import Model
from .reference import Denoiser, Reference
from .run import Found, Progress, calibrate
from .search import search_constants


def calibrate_dualfast(
    model: Model,
    *,
    nfe: Sequence[int],
    guidance_scale: Sequence[float],
    solver: str = "dpmpp-2m",
    out: str | os.PathLike[str] | None = None,
    grid: str = "linspace",
    final: str = "zero",
    tau: str | int = "first",
    points: int = 10,
    held_out: int = 20,
    reference_steps: int = 200,
    evaluations: int = 8,
    progress: Progress | None = None,
) -> Artifact:
    """Constants for every (nfe, guidance scale); continues ``out`` where it exists. See :func:`search_constants`."""

    def search(plan: Plan, reference: Reference, denoiser: Denoiser, x: torch.Tensor, prediction: str) -> Found:
        found = search_constants(plan, reference, denoiser, x, tau=tau, prediction=prediction, evaluations=evaluations)
        return Found(
            found.values, found.before, found.after, found.kept, found.calls,
            lambda: dualfast(plan, c=found.values, tau=tau),
        )  # fmt: skip

    return calibrate(
        "dualfast", model, search, solver=solver, nfe=nfe, guidance_scale=guidance_scale, out=out, grid_name=grid,
        final=final, options={"tau": tau}, points=points, held_out=held_out, reference_steps=reference_steps,
        progress=progress,
    )  # fmt: skip
