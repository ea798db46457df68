"""Order of accuracy on three closed-form problems."""

from __future__ import annotations

import pytest

import diffsamp
from diffsamp.testing.order import interior_order, lambda_grid, weak_order
from diffsamp.testing.problems import PROBLEMS

PROCESS = diffsamp.Process.vp_continuous(1e-3, 100.0)
FREE = {"lower_order_final": False}
CASES = [
    ("ddim", {}, 1), ("euler", {}, 1), ("heun", {}, 2), ("dpmpp-1m", {}, 1),
    ("dpmpp-2m", FREE, 2), ("dpmpp-2m", FREE | {"variant": "heun"}, 2), ("dpmpp-2m", FREE | {"form": "epsilon"}, 2),
    ("dpmpp-3m", FREE, 2), ("dpmpp-3m", FREE | {"curvature": "exact"}, 3),
    ("dpmpp-2s", FREE, 2), ("dpmpp-3s", FREE, 3), ("dpmpp-3s", FREE | {"variant": "midpoint"}, 3),
    ("unipc", FREE | {"order": 1}, 2), ("unipc", FREE | {"order": 2}, 3), ("unipc", FREE | {"order": 3}, 4),
    ("unipc", FREE | {"order": 2, "variant": "bh1", "form": "epsilon"}, 3),
    ("unipc", FREE | {"order": 3, "corrector": False}, 3),
    ("deis", FREE | {"order": 2}, 2), ("deis", FREE | {"order": 3}, 3),
    ("sde-dpmpp-2m", FREE | {"eta": 0.0}, 2),
    ("er-sde", {"scale": "ode", "order": 2}, 2), ("er-sde", {"scale": "ode", "order": 3}, 3),
    ("sa-solver", FREE | {"tau": 0.0}, 2), ("sa-solver", FREE | {"tau": 0.0, "predictor_order": 3, "corrector_order": 0}, 3),  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize("problem", sorted(PROBLEMS))
@pytest.mark.parametrize(
    ("name", "options", "order"),
    CASES,
    ids=lambda v: str(v) if not isinstance(v, dict) else "-".join(f"{k}={x}" for k, x in v.items()),
)
def test_interior_order_is_not_the_nominal_one(name, options, order, problem):
    solver = diffsamp.solver(name, **options)
    assert solver(PROCESS, lambda_grid(PROCESS, -1.5, 1.5, 12)).order == order
    steps = (168, 336) if order >= 3 else (96, 192)
    assert interior_order(solver, PROBLEMS[problem], PROCESS, steps=steps) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_is_not_of_full_order_where_the_ratio_falls_evenly(order):
    solver = diffsamp.solver("ipndm", order=order)
    for problem in PROBLEMS.values():
        found = interior_order(solver, problem, PROCESS, steps=(600, 1200), even_in="ratio")
        assert found == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("ddpm", {}, 1), ("ddim", {"eta": 0.5}, 1), ("euler-ancestral", {}, 1), ("sde-dpmpp-1", {}, 1),
        ("er-sde", {"order": 1}, 1), ("er-sde", {"order": 2}, 2), ("er-sde", {}, 2),
        ("sa-solver", {"predictor_order": 1, "corrector_order": 0}, 1), ("sa-solver", {}, 2),
    ],
)  # fmt: skip
def test_weak_order_of_a_stochastic_solver_is_not_the_documented_one(name, options, order):
    assert weak_order(diffsamp.solver(name, **options), PROCESS, steps=(192, 384)) == pytest.approx(order, abs=0.2)
