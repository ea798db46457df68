"""Feynman-Kac correctors: annealed, guided, product and reward-tilted targets with weights that are right."""

from __future__ import annotations

from .corrector import Corrector, Result, State, StepInfo, slot_seeds
from .distributed import Shared
from .kernels import adams_maruyama, churned_heun, euler_maruyama
from .parse import Recipe, fkc, parse
from .potentials import Steering, Tilt, Twist
from .targets import Target, annealed, cfg, composed, product

__all__ = [
    "Corrector", "Recipe", "Result", "Shared", "State", "Steering", "StepInfo", "Target", "Tilt", "Twist",
    "adams_maruyama", "annealed", "cfg", "churned_heun", "composed", "euler_maruyama", "fkc", "parse", "product",
    "slot_seeds",
]  # fmt: skip
