"""SDE-DPM-Solver++ (1, 2M): the reverse SDE in the x0 form; eta scales the noise from the ODE (0) to the SDE (1).

x_t = (sigma_t/sigma_s)·e^{−eta²h}·x + alpha_t·(1 − e^{−(1+eta²)h})·[m_0 + (1/2r)·(m_0 − m_1)]
      + sigma_t·sqrt(1 − e^{−2·eta²·h})·noise,     r = h_prev/h

Deterministic order 2, one evaluation per step; weak order 1 as published (the noise inside a step is not resolved).
Source: Lu et al. 2022, arXiv:2211.01095, Section 5. Twin: diffusers DPMSolverMultistepScheduler with
algorithm_type="sde-dpmsolver++".

@article{lu2022dpmpp, title={DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models},
  author={Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun},
  journal={arXiv:2211.01095}, year={2022}}
"""

from __future__ import annotations

import math

from ..errors import DiffsampError
from ..grids import Grid
from ..plan import Mix, Plan, Row
from ..process import Process
from ..registry import register_solver
from .exponential import order_at


def _sde(
    process: Process, grid: Grid, order: int, eta: float, variant: str, lower_order_final: bool | None
) -> Plan:
    if not 0.0 <= eta <= 2.0:
        raise DiffsampError(f"eta: got {eta}; must be between 0 and 2")
    if variant not in ("midpoint", "heun"):
        raise DiffsampError(f"variant: got {variant!r}; accepted: midpoint, heun")
    n = len(grid)
    rows = []
    for i, (s, t) in enumerate(grid.intervals()):
        h, rate = t.h, 1 + eta * eta
        now = order_at(i, n, order, lower_order_final, t.sigma == 0.0)
        k1 = -t.alpha * math.expm1(-rate * h)
        m = (k1,)
        if now == 2:
            r = s.h / h
            slope = 0.5 * k1 if variant == "midpoint" else t.alpha * (1 + math.expm1(-rate * h) / (rate * h))
            m = (k1 + slope / r, -slope / r)
        decay = 1.0 if eta == 0.0 else math.exp(-eta * eta * h)
        noise = 0.0 if eta == 0.0 else t.sigma * math.sqrt(-math.expm1(-2 * eta * eta * h))
        rows.append(Row(s, t, Mix(base=t.sigma / s.sigma * decay, m=m, noise=noise)))
    return Plan(tuple(rows), process, grid, order=order)


@register_solver(
    "sde-dpmpp-2m", order=2, stochastic=True,
    twin=("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
)  # fmt: skip
def sde_dpmpp_2m(
    process: Process, grid: Grid, *, eta: float = 1.0, variant: str = "midpoint", lower_order_final: bool | None = None
) -> Plan:
    return _sde(process, grid, 2, eta, variant, lower_order_final)


@register_solver(
    "sde-dpmpp-1", order=1, stochastic=True,
    twin=("DPMSolverMultistepScheduler", {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
)  # fmt: skip
def sde_dpmpp_1(process: Process, grid: Grid, *, eta: float = 1.0) -> Plan:
    return _sde(process, grid, 1, eta, "midpoint", None)


sde_dpmpp_2m.__doc__ = sde_dpmpp_1.__doc__ = __doc__
