"""Calibrating DC-Solver's ratios on a model."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ..plan import Plan
from ..solvers.dc import dc
from .artifact import Artifact
from .model import Model
from .reference import Denoiser, Reference
from .run import Found, Progress, calibrate
from .search import search_ratios


def calibrate_dc(
    model: Model,
    *,
    nfe: Sequence[int],
    guidance_scale: Sequence[float],
    solver: str = "unipc",
    out: str | os.PathLike[str] | None = None,
    grid: str = "linspace",
    final: str = "zero",
    k: int = 2,
    points: int = 10,
    held_out: int = 20,
    reference_steps: int = 200,
    evaluations: int = 8,
    method: str = "search",
    iterations: int = 40,
    progress: Progress | None = None,
) -> Artifact:
    """Ratios for every (nfe, guidance scale); continues ``out`` where it exists. See :func:`search_ratios`.

    ``method="adamw"`` is the published recipe, with the guard on top; ``iterations`` are its own.
    """
    # Only what departs from the search is noted, so that files made without the choice stay valid.
    options: dict[str, object] = {"k": k}
    if method != "search":
        options |= {"method": method, "iterations": iterations}

    def search(plan: Plan, reference: Reference, denoiser: Denoiser, x: torch.Tensor, prediction: str) -> Found:
        found = search_ratios(
            plan, reference, denoiser, x, k=k, prediction=prediction, evaluations=evaluations, method=method,
            iterations=iterations,
        )  # fmt: skip
        return Found(
            found.values, found.before, found.after, found.kept, found.calls, lambda: dc(plan, ratios=found.values, k=k)
        )

    return calibrate(
        "dc", model, search, solver=solver, nfe=nfe, guidance_scale=guidance_scale, out=out, grid_name=grid, final=final,  # noqa: E501
        options=options, points=points, held_out=held_out, reference_steps=reference_steps, progress=progress,
    )  # fmt: skip
