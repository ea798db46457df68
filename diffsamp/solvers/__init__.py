"""One file per solver family: functions from (process, grid, options) to a plan, or from a plan to a plan.

``diffsamp.solvers()`` lists what is registered: the package is callable, since its name is the public function's too.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..registry import SolverInfo


class _CallablePackage(ModuleType):
    def __call__(self) -> dict[str, SolverInfo]:
        from ..registry import solvers

        return solvers()


sys.modules[__name__].__class__ = _CallablePackage
