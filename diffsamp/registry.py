"""The registry of solvers: names, options, citations, third-party plug-ins, and composed names such as ``dc(unipc)``.

A solver is a function ``(process, grid, **options) -> Plan``. A transform is a function ``(plan, **options) -> Plan``.
Third parties add either by an entry point in the group ``diffsamp.solvers`` whose object is a module or function that
calls :func:`register_solver`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from .errors import DiffsampError
from .grids import Grid
from .plan import Plan
from .process import Process

_BUILTIN = (
    "ddim", "euler", "heun", "dpmpp", "singlestep", "unipc", "deis", "ipndm", "sde_dpmpp", "ancestral", "er_sde",
    "sa_solver", "dc", "dualfast", "all",
)  # fmt: skip
_solvers: dict[str, SolverInfo] = {}
_plugin_errors: dict[str, str] = {}
_loaded = False


@dataclass(frozen=True)
class SolverInfo:
    """What the registry knows of a solver.

    Attributes:
        name: registry name, lower case with hyphens.
        build: ``(process, grid, **options) -> Plan``, or ``(plan, **options) -> Plan`` for a transform.
        order: nominal order of accuracy.
        evaluations: network calls per step of the method.
        stochastic: whether it draws noise.
        transform: whether it maps a plan to a plan.
        twin: ``(class name in diffusers, config)`` of the same method, or None.
        origin: the distribution that registered it.
    """

    name: str
    build: Callable[..., Plan] = field(compare=False)
    order: int = 1
    evaluations: int = 1
    stochastic: bool = False
    transform: bool = False
    base: str | None = None
    twin: tuple[str, dict[str, Any]] | None = field(default=None, compare=False)
    origin: str = "diffsamp"

    @property
    def doc(self) -> str:
        return inspect.cleandoc(self.build.__doc__ or inspect.getmodule(self.build).__doc__ or "")  # type: ignore[union-attr]

    @property
    def summary(self) -> str:
        return self.doc.split("\n", 1)[0]

    @property
    def citation(self) -> str:
        """The BibTeX entries at the end of the docstring."""
        found = re.search(r"^\s*(@\w+\{.*)", self.doc, re.S | re.M)
        return found.group(1).strip() if found else ""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options and their defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True)
class Solver:
    """A solver with its options bound: call it with (process, grid) to compile a plan."""

    info: SolverInfo
    options: tuple[tuple[str, Any], ...] = ()
    inner: Solver | None = None

    def __call__(self, process: Process, grid: Grid) -> Plan:
        options = dict(self.options)
        if self.info.transform:
            assert self.inner is not None
            plan = self.info.build(self.inner(process, grid), **options)
        else:
            plan = self.info.build(process, grid, **options)
        return plan.with_rows(plan.rows, solver=self.name)

    @property
    def name(self) -> str:
        text = ",".join(f"{k}={_written(v)}" for k, v in self.options)
        if self.inner is None:
            return f"{self.info.name}:{text}" if text else self.info.name
        return f"{self.info.name}({self.inner.name}{',' + text if text else ''})"

    @property
    def stochastic(self) -> bool:
        return self.info.stochastic or (self.inner is not None and self.inner.stochastic)


def register_solver(
    name: str,
    *,
    order: int = 1,
    evaluations: int = 1,
    stochastic: bool = False,
    transform: bool = False,
    base: str | None = None,
    twin: tuple[str, dict[str, Any]] | None = None,
) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Register a solver under ``name``.

    Args:
        name: lower case letters, digits, hyphens; the paper's name.
        order, evaluations, stochastic: facts that lists print and suites test.
        transform: the function maps a plan to a plan.
        base: for a transform, the solver that it wraps when its name is used alone.
        twin: diffusers class name and config of the same method.

    Raises:
        DiffsampError: the name is malformed, or already taken (the message names both owners).
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise DiffsampError(f"name: {name!r} is not a solver name; accepted: lower case letters, digits, hyphens")

    def add(build: Callable[..., Plan]) -> Callable[..., Plan]:
        origin = build.__module__
        taken = _solvers.get(name)
        if taken is not None and (taken.build.__module__, taken.build.__qualname__) != (origin, build.__qualname__):
            raise DiffsampError(f"name: solver {name!r} of {origin} is already registered by {taken.build.__module__}")
        _solvers[name] = SolverInfo(
            name, build, order, evaluations, stochastic, transform, base, twin, origin.split(".")[0]
        )
        return build

    return add


def _load() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    for module in _BUILTIN:
        if importlib.util.find_spec(f"diffsamp.solvers.{module}") is None:
            continue
        importlib.import_module(f"diffsamp.solvers.{module}")
    for point in entry_points(group="diffsamp.solvers"):
        try:
            point.load()
        except DiffsampError as error:  # a name clash is the plug-in's fault and must be seen
            _plugin_errors[point.name] = str(error)
            raise
        except Exception as error:  # noqa: BLE001 - a broken plug-in must not take the others down
            _plugin_errors[point.name] = f"{type(error).__name__}: {error}"
            warnings.warn(f"solver plug-in {point.name!r} ({point.value}) did not load: {error}", stacklevel=3)


def solvers() -> dict[str, SolverInfo]:
    """Every registered solver by name, sorted."""
    _load()
    return dict(sorted(_solvers.items()))


def plugin_errors() -> dict[str, str]:
    """Entry points that did not load, with the reason."""
    _load()
    return dict(_plugin_errors)


def solver_info(name: str) -> SolverInfo:
    """The registry's entry of ``name``; raises DiffsampError with near names."""
    known = solvers()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"accepted: {', '.join(known)}"
    raise DiffsampError(f"solver: {name!r} is not registered; {hint}")


def solver(name: str, **options: Any) -> Solver:
    """A solver by name, with options bound.

    ``name`` may carry options and be composed: ``unipc``, ``unipc:order=3``, ``dc(unipc)``,
    ``dc(dualfast(unipc),k=1)``.

    Raises:
        DiffsampError: unknown name or option, or a composition that makes no sense.
    """
    made, rest = _parse(name.strip())
    if rest:
        raise DiffsampError(f"solver: cannot read {rest!r} at the end of {name!r}")
    return _bind(made, options) if options else made


def _bind(made: Solver, options: dict[str, Any]) -> Solver:
    accepted = made.info.options
    for key in options:
        if key not in accepted:
            raise DiffsampError(
                f"{key}: is not an option of solver {made.info.name!r}; accepted: {', '.join(accepted) or 'none'}"
            )
    merged = {**dict(made.options), **options}
    return Solver(made.info, tuple(sorted(merged.items())), made.inner)


def _parse(text: str) -> tuple[Solver, str]:
    found = re.match(r"[a-z0-9][a-z0-9-]*", text)
    if not found:
        raise DiffsampError(f"solver: {text!r} is not a solver name; accepted: {', '.join(solvers())}")
    info = solver_info(found.group())
    rest = text[found.end() :]
    inner, options = None, {}
    if rest.startswith("("):
        if not info.transform:
            raise DiffsampError(
                f"solver: {info.name!r} is not a transform and wraps nothing; write {info.name}:key=value"
            )
        inner, rest = _parse(rest[1:].strip())
        while rest.startswith(","):
            options_part = re.match(r",\s*([a-z_0-9]+)\s*=\s*(\[[^\]]*\]|[^,()]+)", rest)
            if not options_part:
                raise DiffsampError(f"solver: cannot read the options in {text!r}; write name(inner,key=value)")
            options[options_part.group(1)] = _value(options_part.group(2))
            rest = rest[options_part.end() :]
        if not rest.startswith(")"):
            raise DiffsampError(f"solver: {text!r} lacks a closing parenthesis")
        rest = rest[1:].strip()
    elif rest.startswith(":"):
        found_options = re.match(r":((?:[a-z_0-9]+=(?:\[[^\]]*\]|[^,()]+),?)+)", rest)
        if not found_options:
            raise DiffsampError(f"solver: cannot read the options in {text!r}; write name:key=value,key=value")
        body = found_options.group(1)
        for key, value in re.findall(r"([a-z_0-9]+)=(\[[^\]]*\]|[^,()]+)", body):
            options[key] = _value(value)
        rest = rest[found_options.end() :]
        if body.endswith(","):
            rest = "," + rest
    if info.transform and inner is None:
        if info.base is None:
            raise DiffsampError(f"solver: {info.name!r} is a transform; write {info.name}(unipc)")
        inner = _parse(info.base)[0]
    made = Solver(info, (), inner)
    return (_bind(made, options) if options else made), rest.strip()


def _written(value: Any) -> str:
    """An option's value as the grammar reads it: lists as ``[1;1;0.9]``."""
    if isinstance(value, tuple | list):
        return "[" + ";".join(_written(v) for v in value) + "]"
    return repr(float(value)) if isinstance(value, float) else str(value)


def _value(text: str) -> Any:
    text = text.strip()
    if text.startswith("["):
        return tuple(_value(part) for part in text[1:-1].split(";" if ";" in text else ",") if part.strip())
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
