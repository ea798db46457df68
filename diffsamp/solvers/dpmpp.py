"""DPM-Solver++ multistep (1M, 2M, 3M), in the x0 form (DPM-Solver++) or the epsilon form (DPM-Solver).

x_t = (sigma_t/sigma_s)·x + alpha_t·h·[phi_1(−h)·m_0 + phi_2(−h)·D_1 + phi_3(−h)·D_2],   h = lambda_t − lambda_s

D_1, D_2 are divided differences of the outputs in lambda, scaled by h. The midpoint variant of order 2 has phi_1/2 in
place of phi_2. The published 3M takes half of the second difference, which leaves it at order 2 (measured: 2.1);
``curvature="exact"`` takes all of it and is of order 3. One evaluation per step, deterministic.
Source: Lu et al. 2022, arXiv:2211.01095, Algorithm 2 and Appendix B; arXiv:2206.00927.
Twin: diffusers DPMSolverMultistepScheduler.

@article{lu2022dpmpp, title={DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models},
  author={Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun},
  journal={arXiv:2211.01095}, year={2022}}
"""

from __future__ import annotations

from ..errors import DiffsampError
from ..grids import Grid
from ..plan import Mix, Plan, Row
from ..process import Process
from ..registry import register_solver
from .exponential import carry, order_at, weights


def _multistep(
    process: Process, grid: Grid, order: int, form: str, variant: str, lower_order_final: bool | None,
    curvature: float = 1.0,
) -> Plan:  # fmt: skip
    if form not in ("x0", "epsilon"):
        raise DiffsampError(f"form: got {form!r}; accepted: x0, epsilon")
    if variant not in ("midpoint", "heun"):
        raise DiffsampError(f"variant: got {variant!r}; accepted: midpoint, heun")
    nodes, n = grid.nodes, len(grid)
    rows = []
    for i, (s, t) in enumerate(grid.intervals()):
        now = order_at(i, n, order, lower_order_final, t.sigma == 0.0)
        k1 = weights(form, s, t, 1)
        m = [k1, 0.0, 0.0]
        if now >= 2:
            h = t.h
            r0 = s.h / h
            k2 = weights(form, s, t, 2)
            if now == 2:
                slope = 0.5 * k1 if variant == "midpoint" else k2
                m = [k1 + slope / r0, -slope / r0, 0.0]
            else:
                r1 = nodes[i - 1].h / h
                k3 = curvature * weights(form, s, t, 3)
                # D1 = d0 + r0/(r0+r1)·(d0 − d1), D2 = (d0 − d1)/(r0+r1) with d0 = (m0−m1)/r0, d1 = (m1−m2)/r1
                d0 = k2 * (1 + r0 / (r0 + r1)) + k3 / (r0 + r1)
                d1 = -k2 * r0 / (r0 + r1) - k3 / (r0 + r1)
                m = [k1 + d0 / r0, -d0 / r0 + d1 / r1, -d1 / r1]
        rows.append(Row(s, t, Mix(base=carry(form, s, t), m=tuple(m))))
    return Plan(tuple(rows), process, grid, form=form, order=order)


@register_solver("dpmpp-1m", order=1, twin=("DPMSolverMultistepScheduler", {"solver_order": 1}))
def dpmpp_1m(process: Process, grid: Grid, *, form: str = "x0") -> Plan:
    return _multistep(process, grid, 1, form, "midpoint", None)


@register_solver("dpmpp-2m", order=2, twin=("DPMSolverMultistepScheduler", {"solver_order": 2}))
def dpmpp_2m(
    process: Process, grid: Grid, *, form: str = "x0", variant: str = "midpoint", lower_order_final: bool | None = None
) -> Plan:
    return _multistep(process, grid, 2, form, variant, lower_order_final)


@register_solver("dpmpp-3m", order=2, twin=("DPMSolverMultistepScheduler", {"solver_order": 3}))
def dpmpp_3m(
    process: Process,
    grid: Grid,
    *,
    form: str = "x0",
    lower_order_final: bool | None = None,
    curvature: str = "published",
) -> Plan:
    if curvature not in ("published", "exact"):
        raise DiffsampError(f"curvature: got {curvature!r}; accepted: published, exact")
    exact = curvature == "exact"
    plan = _multistep(process, grid, 3, form, "midpoint", lower_order_final, 2.0 if exact else 1.0)
    return plan.with_rows(plan.rows, order=3 if exact else 2)


dpmpp_1m.__doc__ = dpmpp_2m.__doc__ = dpmpp_3m.__doc__ = __doc__
