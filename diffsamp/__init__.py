"""diffsamp: a sampling toolkit for diffusion models. Better pictures from fewer network calls.

Names load when they are first used: ``import diffsamp`` imports neither torch, diffusers nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "DiffsampError": "errors",
    "Process": "process",
    "Level": "process",
    "Grid": "grids",
    "grid": "grids",
    "Plan": "plan",
    "Row": "plan",
    "Mix": "plan",
    "sample": "engine",
    "solver": "registry",
    "register_solver": "registry",
    "scheduler_class": "adapters.diffusers",
    "use": "adapters.use",
    "restore": "adapters.use",
    "register": "adapters.use",
    "load": "models",
    "ClassConditionalPipeline": "models.pipeline",
    "fkc": "correctors",
    "MaskedLM": "masked",
    "MaskedScheduler": "masked",
    "sample_categorical": "masked",
}
_MODULES = (
    "adapters", "calibrate", "correctors", "engine", "errors", "guidance", "masked", "metrics", "models", "plan",
    "process", "registry", "report", "rng", "run", "solvers", "teleport", "testing",
)  # fmt: skip
_GUIDERS = "adapters.guiders"

if TYPE_CHECKING:
    from . import correctors, engine, guidance, masked, metrics, models, rng, testing
    from .adapters.diffusers import scheduler_class
    from .adapters.use import register, restore, use
    from .engine import sample
    from .errors import DiffsampError
    from .grids import Grid, grid
    from .models import load
    from .plan import Mix, Plan, Row
    from .process import Level, Process
    from .registry import register_solver, solver, solvers


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f".{_NAMES[name].partition(':')[0]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in ("SchedulerMixin", "BaseGuidance"):
        # diffusers looks for its base classes in the package that a saved pipeline names.
        if name == "SchedulerMixin":
            from diffusers import SchedulerMixin

            return SchedulerMixin
        from diffusers.guiders.guider_utils import BaseGuidance

        return BaseGuidance
    if name.endswith("Scheduler"):
        from .adapters.diffusers import scheduler_class_by_class_name

        found = scheduler_class_by_class_name(name)
        if found is not None:
            return found
    if name.endswith("Guidance"):
        guiders = importlib.import_module(f".{_GUIDERS}", __name__)
        if hasattr(guiders, name):
            return getattr(guiders, name)
    raise AttributeError(f"module 'diffsamp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*_NAMES, *_MODULES, "__version__"})
