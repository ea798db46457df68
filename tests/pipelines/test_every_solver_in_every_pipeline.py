"""Every registered solver runs in every pipeline family: finite result, right number of network calls."""

from __future__ import annotations

import pytest
import tiny_pipelines
import torch

import diffsamp

STEPS = 4
SOLVERS = sorted(diffsamp.registry.solvers())


def evaluations(name: str) -> int:
    info = diffsamp.registry.solvers()[name]
    return evaluations(info.base) if info.transform else info.evaluations


def test_at_least_thirty_families():
    assert len(tiny_pipelines.FAMILIES) >= 30
    assert {entry.kind for entry in tiny_pipelines.FAMILIES.values()} == {"vp", "edm", "flow"}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)
def test_runs_finite_with_the_right_number_of_network_calls(family: str, solver: str):
    tiny = tiny_pipelines.build(family)
    tiny.pipe.scheduler = diffsamp.scheduler_class(solver).from_config(tiny.stock.config)
    try:
        result, calls = tiny.counted(STEPS)
    finally:
        tiny.pipe.scheduler = tiny.stock
    assert torch.isfinite(result).all()
    assert result.float().std() > 1e-3
    assert calls == tiny.family.expected_calls(STEPS, evaluations(solver))
