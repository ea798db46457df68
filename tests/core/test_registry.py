"""The registry: names, options, composition, plug-ins."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import warnings

import pytest

import diffsamp
from diffsamp import registry
from diffsamp.errors import DiffsampError


def test_a_solver_lacks_a_source_a_citation_or_equations():
    for name, info in diffsamp.solvers().items():
        assert info.citation.startswith("@"), name
        assert "Source:" in info.doc or "arXiv" in info.doc, name


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("unipcc", "did you mean"),
        ("unipc:order=7", "order"),
        ("unipc:speed=3", "speed.*accepted"),
        ("euler(unipc)", "not a transform"),
        ("dc(unipc", "closing parenthesis"),
        ("", "not a solver name"),
    ],
)
def test_a_wrong_name_is_accepted_or_not_explained(text, word):
    process = diffsamp.Process.vp()
    with pytest.raises(DiffsampError, match=word):
        diffsamp.solver(text)(process, diffsamp.grid("trailing", process, 5))


def test_options_in_the_text_and_as_keywords_differ():
    process = diffsamp.Process.vp()
    grid = diffsamp.grid("trailing", process, 6)
    assert diffsamp.solver("unipc:order=3,variant=bh1")(process, grid) == diffsamp.solver(
        "unipc", order=3, variant="bh1"
    )(process, grid)


class _Point:
    def __init__(self, name, action):
        self.name, self.value, self._action = name, f"plug:{name}", action

    def load(self):
        return self._action()


@pytest.fixture
def fresh(monkeypatch):
    """The registry as in a new process, with the given entry points."""

    def start(points):
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        monkeypatch.setattr(registry, "_loaded", False)
        monkeypatch.setattr(registry, "_plugin_errors", {})
        monkeypatch.setattr(registry, "_solvers", dict(registry._solvers))

    diffsamp.solvers()
    return start


def test_a_broken_plug_in_takes_the_others_down(fresh):
    def fail():
        raise ImportError("no module named thing")

    def work():
        @diffsamp.register_solver("plugged", order=1)
        def plugged(process, grid):
            """A plug-in."""

    fresh([_Point("bad", fail), _Point("good", work)])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        names = diffsamp.solvers()
    assert "plugged" in names and "unipc" in names
    assert "no module named thing" in registry.plugin_errors()["bad"] and any("bad" in str(w.message) for w in seen)


def test_a_name_clash_does_not_name_both_owners(fresh):
    def clash():
        @diffsamp.register_solver("unipc")
        def mine(process, grid):
            """Another."""

    fresh([_Point("clash", clash)])
    with pytest.raises(DiffsampError, match="test_registry.*diffsamp.solvers.unipc"):
        diffsamp.solvers()


def test_importing_the_package_loads_heavy_libraries():
    code = (
        "import sys, diffsamp; heavy = {'torch', 'diffusers', 'transformers', 'triton', 'torchmetrics', 'matplotlib'}"
        " & set(sys.modules); assert not heavy, heavy;"
        "import diffsamp.registry, diffsamp.engine; diffsamp.solvers();"
        "heavy = {'diffusers', 'transformers', 'triton', 'torchmetrics', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_not_the_distribution_s():
    assert diffsamp.__version__ == importlib.metadata.version("diffsamp")
