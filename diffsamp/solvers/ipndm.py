"""iPNDM: Adams-Bashforth weights on epsilon, then a DDIM step; full order only where sigma/alpha falls evenly.

e = Σ_j w_j·m_j,   w = (1), (3, −1)/2, (23, −16, 5)/12, (55, −59, 37, −9)/24

Order 1 to 4 with constant weights (as published), one evaluation per step, deterministic, epsilon form.
Source: Liu et al. 2022, arXiv:2202.09778, Eq. 12; Zhang and Chen 2023, arXiv:2204.13902, Appendix H.
Twin: diffusers IPNDMScheduler (which is bound to its own process).

@inproceedings{liu2022pndm, title={Pseudo Numerical Methods for Diffusion Models on Manifolds},
  author={Liu, Luping and Ren, Yi and Lin, Zhijie and Zhao, Zhou}, booktitle={ICLR}, year={2022}}
"""

from __future__ import annotations

from ..errors import DiffsampError
from ..grids import Grid
from ..plan import Mix, Plan, Row
from ..process import Process
from ..registry import register_solver
from .exponential import carry, weights

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@register_solver("ipndm", order=4, twin=("IPNDMScheduler", {}))
def ipndm(process: Process, grid: Grid, *, order: int = 4) -> Plan:
    if order not in (1, 2, 3, 4):
        raise DiffsampError(f"order: got {order!r}; accepted: 1, 2, 3, 4")
    rows = []
    for i, (s, t) in enumerate(grid.intervals()):
        step = weights("epsilon", s, t, 1)
        mix = Mix(base=carry("epsilon", s, t), m=tuple(step * w for w in ADAMS_BASHFORTH[min(order, i + 1) - 1]))
        rows.append(Row(s, t, mix))
    return Plan(tuple(rows), process, grid, form="epsilon", order=order)


ipndm.__doc__ = __doc__
