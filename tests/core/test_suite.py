"""Our own solvers run the suites that are offered to plug-in authors; and the suites fail where they should."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import diffsamp
from diffsamp import registry
from diffsamp.testing import check_order, check_protocol, check_solver

BASES = sorted(name for name, info in diffsamp.solvers().items() if not info.transform)


@pytest.mark.parametrize("name", BASES)
def test_a_solver_of_ours_fails_the_protocol(name):
    check_protocol(name)


@pytest.fixture
def scratch(monkeypatch):
    diffsamp.solvers()
    monkeypatch.setattr(registry, "_solvers", dict(registry._solvers))


def test_the_solver_in_contributing_does_not_work(scratch):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    code = re.search(r"```python\n(\"\"\"My solver.*?)```", text, re.S).group(1)
    assert len(code.splitlines()) <= 40
    exec(compile(code, "mine.py", "exec"), {"__name__": "mine", "__doc__": code.split('"""')[1]})
    check_solver("mine")


def test_the_suites_pass_a_solver_of_the_wrong_order(scratch):
    @diffsamp.register_solver("claims-two", order=2)
    def claims_two(process, grid):
        return registry._solvers["ddim"].build(process, grid)

    claims_two.__doc__ = diffsamp.solvers()["ddim"].build.__doc__
    check_protocol("claims-two")
    with pytest.raises(AssertionError, match=r"order (0\.9|1\.0)"):
        check_order("claims-two")


def test_the_suites_pass_a_solver_without_a_citation(scratch):
    @diffsamp.register_solver("uncited", order=1)
    def uncited(process, grid):
        """A solver without a source."""
        return registry._solvers["ddim"].build(process, grid)

    with pytest.raises(AssertionError, match="BibTeX"):
        check_protocol("uncited")
