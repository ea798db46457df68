"""DEIS (tAB): exponential integrator with Lagrange extrapolation of epsilon in log(sigma/alpha).

x_t/alpha_t = x_s/alpha_s + Σ_j m_j·∫_{rho_s}^{rho_t} l_j(log rho) drho,   rho = sigma/alpha

Order 1 to 3, one evaluation per step, deterministic, epsilon form.
Source: Zhang and Chen 2023, arXiv:2204.13902, Eq. 13 to 15 (log-rho variant). Twin: diffusers DEISMultistepScheduler.

@inproceedings{zhang2023deis, title={Fast Sampling of Diffusion Models with Exponential Integrator},
  author={Zhang, Qinsheng and Chen, Yongxin}, booktitle={ICLR}, year={2023}}
"""

from __future__ import annotations

from ..errors import DiffsampError
from ..grids import Grid
from ..plan import Mix, Plan, Row
from ..process import Process
from ..registry import register_solver
from .exponential import carry, lagrange, moments, order_at, weights


@register_solver("deis", order=2, twin=("DEISMultistepScheduler", {"solver_order": 2}))
def deis(process: Process, grid: Grid, *, order: int = 2, lower_order_final: bool | None = None) -> Plan:
    if order not in (1, 2, 3):
        raise DiffsampError(f"order: got {order!r}; accepted: 1, 2, 3")
    nodes, n = grid.nodes, len(grid)
    rows = []
    for i, (s, t) in enumerate(grid.intervals()):
        now = order_at(i, n, order, lower_order_final, t.sigma == 0.0)
        if now == 1:
            m = (weights("epsilon", s, t, 1),)
        else:
            # v = log rho − log rho_s = lambda_s − lambda falls from 0 to −h; d rho = rho dv
            polynomials = lagrange([s.lambda_ - p.lambda_ for p in nodes[i::-1][:now]])
            integrals = polynomials @ moments(1.0, t.h, now)
            m = tuple(-t.alpha * s.noise_to_signal * integrals)
        rows.append(Row(s, t, Mix(base=carry("epsilon", s, t), m=m)))
    return Plan(tuple(rows), process, grid, form="epsilon", order=order)


deis.__doc__ = __doc__
