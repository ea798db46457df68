"""Suites that a plug-in's author can run on a solver, and problems whose answer is known."""

from __future__ import annotations

from .order import end_to_end_order, interior_order, orders, weak_order
from .problems import PROBLEMS, Problem
from .suite import check_order, check_protocol, check_solver

__all__ = [
    "PROBLEMS",
    "Problem",
    "check_order",
    "check_protocol",
    "check_solver",
    "end_to_end_order",
    "interior_order",
    "orders",
    "weak_order",
]
