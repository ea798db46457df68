"""SA-Solver: stochastic Adams predictor-corrector of the reverse SDE with noise level tau.

x_t = (sigma_t/sigma_s)·e^{−tau²h}·x + (1+tau²)·alpha_t·Σ_j m_j·∫_{−h}^0 e^{(1+tau²)v}·l_j(v) dv
      + sigma_t·sqrt(1 − e^{−2·tau²·h})·noise

l_j: Lagrange polynomials in lambda; the corrector at t adds the output there and reuses the predictor's noise. At order
2 the published code replaces one integral by its small-step value; so does this (an O(h³) change).
Predictor order 1 to 3, corrector order 0 (none) to 3, one evaluation per step, stochastic where tau > 0.
tau holds everywhere unless ``tau_range`` gives the network times where it does. The stock scheduler's default is
tau_range=(200, 800) on any clock, so that in Stable Video Diffusion and near a flow's ends it draws no noise.
Source: Xue et al. 2023, arXiv:2309.05019, Algorithms 1 and 2. Twin: diffusers SASolverScheduler.

@inproceedings{xue2023sasolver, title={SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models},
  author={Xue, Shuchen and Yi, Mingyang and Luo, Weijian and Zhang, Shifeng and Sun, Jiacheng and Li, Zhenguo and
  Ma, Zhi-Ming}, booktitle={NeurIPS}, year={2023}}
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import DiffsampError
from ..grids import Grid, Node
from ..plan import Mix, Plan, Row
from ..process import Process
from ..registry import register_solver
from .exponential import lagrange, moments


def _adams(points: Sequence[Node], s: Node, t: Node, tau: float, corrector: bool) -> list[float]:
    """Weights of the outputs at ``points`` (newest first) for a step s → t; log-SNR is measured from t."""
    rate, h = 1 + tau * tau, t.h
    order = len(points)
    if order == 1:
        return [-t.alpha * math.expm1(-rate * h)]
    values = rate * t.alpha * (lagrange([p.lambda_ - t.lambda_ for p in points]) @ moments(rate, h, order))
    if order == 2:
        exact = (h * rate + math.expm1(-rate * h)) / rate**2
        # h²/2 − exact is O(h³); the spacing is that of the two points.
        change = rate * t.alpha * (h * h / 2 - exact) / (points[0].lambda_ - points[1].lambda_)
        values = values + [change, -change]
    return [float(v) for v in values]


@register_solver("sa-solver", order=2, stochastic=True, twin=("SASolverScheduler", {}))
def sa_solver(
    process: Process,
    grid: Grid,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    tau_range: tuple[float, float] | None = None,
    lower_order_final: bool = True,
) -> Plan:
    if predictor_order not in (1, 2, 3) or corrector_order not in (0, 1, 2, 3):
        raise DiffsampError(
            f"predictor_order, corrector_order: got {predictor_order!r}, {corrector_order!r}; accepted: 1..3, 0..3"
        )
    if not tau >= 0.0:
        raise DiffsampError(f"tau: got {tau}; must be 0 or above")
    nodes, n = grid.nodes, len(grid)

    def tau_at(node: Node) -> float:
        return tau if tau_range is None or tau_range[0] <= node.t <= tau_range[1] else 0.0

    def spread(s: Node, t: Node, level: float) -> tuple[float, float]:
        decay = 1.0 if level == 0.0 else math.exp(-level * level * t.h)
        noise = 0.0 if level == 0.0 else t.sigma * math.sqrt(-math.expm1(-2 * level * level * t.h))
        return t.sigma / s.sigma * decay, noise

    rows = []
    corrector_now = 0
    for i, (s, t) in enumerate(grid.intervals()):
        correct = Mix(input=1.0) if corrector_order else None
        if i and corrector_order:
            before = nodes[i - 1]
            a, noise = spread(before, s, tau_at(before))
            m = _adams(nodes[i::-1][:corrector_now], before, s, tau_at(before), True)
            correct = Mix(base=a, m=tuple(m), old_noise=noise)
        left = n - i
        now = min(predictor_order, i + 1, left) if lower_order_final else min(predictor_order, i + 1)
        corrector_now = min(corrector_order, i + 2, left + 1) if lower_order_final else min(corrector_order, i + 2)
        a, noise = spread(s, t, tau_at(s))
        m = _adams(nodes[i::-1][: 1 if t.sigma == 0.0 else now], s, t, tau_at(s), False)
        rows.append(Row(s, t, Mix(base=a, m=tuple(m), noise=noise), correct, s if correct is not None else None))
    return Plan(tuple(rows), process, grid, order=predictor_order)


sa_solver.__doc__ = __doc__
