"""The suite of the README's table: its registry of runs, which cells run, its verdicts, and that verify verifies."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from diffsamp.run.matrix import Cell, check_solver

HOME = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def suite():
    spec = importlib.util.spec_from_file_location("suite_benchmark", HOME / "suite.py")
    module = importlib.util.module_from_spec(spec)
    was = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = was
    return module


def results(**values: float) -> dict:
    """Cells at 5 calls with these FDs; a name that starts with x is a stock scheduler."""
    cells = []
    for name, value in values.items():
        solver = f"diffusers:{name[1:].title()}Scheduler" if name.startswith("x") else name
        fd = [value, value - 0.2, value + 0.2]
        cells.append({"solver": solver, "nfe": 5, "calls": 5, "not_finite": 0, "metrics": {"fd": fd}})
    return {"cells": cells}


def test_every_run_names_solvers_that_exist_and_committed_figures(suite):
    for name, run in suite.runs().items():
        for solver in suite.solvers_of(run["solvers"]):
            check_solver(solver)
        if run["expected"] is not None:
            expected = json.loads((HOME / "results" / f"{run['expected']}.json").read_text())
            assert expected["cells"] and all(len(cell["probe"]) == suite.PROBE for cell in expected["cells"]), name
            assert all(cell["n"] == run["n"] for cell in expected["cells"]), name


def test_one_table_is_run_once_and_what_is_left_out_is_told(suite, tmp_path):
    cells = [Cell(s, 4) for s in ("unipc", "dc", "dpmpp-1m", "euler", "ddim", "diffusers:PNDMScheduler")]
    kept, notes = suite.choose(cells, tmp_path)
    assert [c.solver for c in kept] == ["unipc", "dpmpp-1m", "ddim"]
    assert notes == [
        "`euler` at 4 calls is `dpmpp-1m`, row for row; it ran once.",
        "`dc` at 4 calls is left out: no calibrated values.",
        "`diffusers:PNDMScheduler` at 4 calls is left out: it needs more calls.",
    ]


@pytest.mark.parametrize(
    ("ours", "spread", "verdict"),
    [(1.5, 0.1, "we lose"), (0.5, 0.1, "we win"), (1.1, 0.3, "a tie"), (1.0001, 1e-9, "the same")],
)
def test_verdicts_follow_the_paired_interval(suite, ours, spread, verdict):
    found = results(unipc=ours, ddim=3.0, xunipc=1.0, xddim=2.0)
    noise = np.random.default_rng(0).standard_normal(50)
    common = np.random.default_rng(1).standard_normal(50)  # of the resample, shared by all cells: it cancels
    drawn = [c["metrics"]["fd"][0] + 5 * common + (i == 0) * spread * noise for i, c in enumerate(found["cells"])]
    compared = suite.compare(found, drawn)
    assert suite.losses(found, compared)[0].endswith(f"**{verdict}**.")
    table = suite.grid_table(found, compared)
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}
    assert ("▼" in rows["`unipc`"]) == (verdict == "we lose") and "▼" in rows["`ddim`"]
    assert "▼" not in rows["diffusers Ddim"]  # the mark is for ours
    assert table.count("**") == 2  # one best
    found["cells"][2]["solver"] = "diffusers:UniPCMultistepScheduler"
    line = suite.pairs(found, drawn).splitlines()[-1]
    assert line.startswith("| `unipc` against UniPCMultistep | ")
    assert ("▼" in line, "**" in line) == (verdict == "we lose", verdict == "we win")


def test_a_cell_with_pictures_that_are_not_finite_is_named_and_never_best(suite):
    found = results(unipc=1.0, xunipc=1.2, xheun=0.1)
    found["cells"][2]["not_finite"] = 3
    drawn = [np.full(50, c["metrics"]["fd"][0]) for c in found["cells"]]
    compared = suite.compare(found, drawn)
    assert "| diffusers Heun | not finite |" in suite.grid_table(found, compared)
    assert "best stock scheduler `UnipcScheduler`" in suite.losses(found, compared)[0]
    assert "**1.00 ± 0.20**" in suite.grid_table(found, compared)


def test_verify_accepts_the_committed_figures_and_notices_others(suite, tmp_path, capsys):
    expected = json.loads((HOME / "results" / "suite_quick.json").read_text())
    assert suite.verify(expected, tmp_path, 1) == 0
    for change in ("probe", "calls", "model"):
        other = copy.deepcopy(expected)
        for cell in other["cells"]:
            if change == "probe":
                cell["probe"][0] *= 1.01
            elif change == "calls":
                cell["calls"] += 1
        if change == "model":
            other["model_sha256"] = "0" * 64
        assert suite.verify(other, tmp_path, 1) == 1, change  # the chunks are there, so this costs little
    assert "NOT" in capsys.readouterr().out
