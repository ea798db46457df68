"""DPM-Solver++ singlestep (2S, 3S): each group of 2 or 3 evaluations is one step of order 2 or 3 from a kept base.

Within a group the stage points are levels of the grid itself, so n steps of the grid are n network calls. The group's
result needs no history from before it, which is why it starts anywhere at full order.
Order 2 or 3, deterministic, x0 or epsilon form.
Source: Lu et al. 2022, arXiv:2211.01095, Algorithm 1; arXiv:2206.00927, Algorithms 1 and 2, Appendix D.
Twin: diffusers DPMSolverSinglestepScheduler.

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
from .exponential import carry, weights


def _orders(n: int, order: int, lower_order_final: bool, data_end: bool) -> list[int]:
    full, rest = divmod(n, order)
    groups = [list(range(1, order + 1))] * full
    if rest:
        groups = [*groups, list(range(1, rest + 1))]
    elif lower_order_final and groups:
        # The last group ends one order lower and one single step follows.
        groups = [*groups[:-1], list(range(1, order)), [1]]
    orders = [k for group in groups for k in group]
    if data_end:
        orders[-1] = 1
    return orders


def _singlestep(process: Process, grid: Grid, order: int, form: str, variant: str, lower_order_final: bool) -> Plan:
    if variant not in ("midpoint", "heun"):
        raise DiffsampError(f"variant: got {variant!r}; accepted: midpoint, heun")
    nodes, n = grid.nodes, len(grid)
    orders = _orders(n, order, lower_order_final, nodes[-1].sigma == 0.0)
    rows = []
    for i, k in enumerate(orders):
        t, base = nodes[i + 1], nodes[i + 1 - k]
        k1 = weights(form, base, t, 1)
        m = [k1]
        h = t.lambda_ - base.lambda_
        if k == 2:
            r0 = (nodes[i].lambda_ - base.lambda_) / h
            slope = (0.5 * k1 if variant == "midpoint" else weights(form, base, t, 2)) / r0
            m = [slope, k1 - slope]
        elif k == 3:
            k2 = weights(form, base, t, 2)
            r0 = (nodes[i].lambda_ - base.lambda_) / h
            r1 = (nodes[i - 1].lambda_ - base.lambda_) / h
            # near = (m1 − m2)/r1, far = (m0 − m2)/r0; m2 is the base's output
            near, far = 0.0, k2
            if variant == "heun":
                k3 = weights(form, base, t, 3)
                near = (k2 * r0 - 2 * k3) / (r0 - r1)
                far = (-k2 * r1 + 2 * k3) / (r0 - r1)
            m = [far / r0, near / r1, k1 - far / r0 - near / r1]
        mix = Mix(base=carry(form, base, t), m=tuple(m))
        inside = i + 1 < n and orders[i + 1] > 1
        next_base = nodes[i + 2 - orders[i + 1]] if inside else t
        rows.append(Row(nodes[i], t, mix, Mix(base=1.0) if inside else None, next_base))
    return Plan(tuple(rows), process, grid, form=form, order=order)


@register_solver("dpmpp-2s", order=2, twin=("DPMSolverSinglestepScheduler", {"solver_order": 2}))
def dpmpp_2s(
    process: Process, grid: Grid, *, form: str = "x0", variant: str = "midpoint", lower_order_final: bool = True
) -> Plan:
    return _singlestep(process, grid, 2, form, variant, lower_order_final)


@register_solver("dpmpp-3s", order=3, twin=("DPMSolverSinglestepScheduler", {"solver_order": 3, "solver_type": "heun"}))
def dpmpp_3s(
    process: Process, grid: Grid, *, form: str = "x0", variant: str = "heun", lower_order_final: bool = True
) -> Plan:
    return _singlestep(process, grid, 3, form, variant, lower_order_final)


dpmpp_2s.__doc__ = dpmpp_3s.__doc__ = __doc__
