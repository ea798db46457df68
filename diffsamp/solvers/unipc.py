"""UniPC: predictor UniP-p and corrector UniC-p of one unified form, one evaluation per step.

x_t = carry·x + k_1·m_0 + sign·B·Σ_j rho_j·D_j,   D_j = (m_j − m_0)/r_j,   Σ_j rho_j·r_j^{k−1} = k!·psi_{k+1}/B

B = u (bh1) or e^u − 1 (bh2), u = −h (x0 form) or h (epsilon form), psi_1 = e^u − 1, psi_{k+1} = psi_k/u − 1/k!.
The corrector at t uses the output at the predicted point, which then serves the next step too.
UniPC-p has order p + 1 with the corrector, p without. Deterministic.
Source: Zhao et al. 2023, arXiv:2302.04867, Algorithms 1 and 2. Twin: diffusers UniPCMultistepScheduler.

@inproceedings{zhao2023unipc, title={UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
  Models}, author={Zhao, Wenliang and Bai, Lujia and Rao, Yongming and Zhou, Jie and Lu, Jiwen},
  booktitle={NeurIPS}, year={2023}}
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import DiffsampError
from ..grids import Grid, Node
from ..plan import Mix, Plan, Row
from ..process import Process
from ..registry import register_solver
from .exponential import carry, phi, weights


def _difference_weights(ratios: Sequence[float], u: float, b: float) -> np.ndarray:
    """rho_j for nodes r_j. The published code fixes a single unknown at 1/2."""
    q = len(ratios)
    if q == 1:
        return np.array([0.5])
    powers = np.vander(np.array(ratios), q, increasing=True).T
    right = np.array([math.factorial(k) * u * phi(k + 1, u) / b for k in range(1, q + 1)])
    return np.linalg.solve(powers, right)


def _update(form: str, variant: str, past: Sequence[Node], t: Node, corrector: bool) -> tuple[float, list[float]]:
    """(carry, weights of the outputs) of a step past[0] → t; a corrector's first weight is of the output at t."""
    s = past[0]
    k1 = weights(form, s, t, 1)
    outputs = [k1] + [0.0] * (len(past) - 1)
    extra = 0.0
    ratios = [(p.lambda_ - s.lambda_) / t.h for p in past[1:]] + ([1.0] if corrector else [])
    # A start without signal lies infinitely far back: its difference has no weight.
    ratios = [r for r in ratios if math.isfinite(r)]
    if ratios and math.isfinite(t.h):
        u = -t.h if form == "x0" else t.h
        b = u if variant == "bh1" else math.expm1(u)
        scale = -(t.alpha if form == "x0" else t.sigma) * b
        for j, (rho, r) in enumerate(zip(_difference_weights(ratios, u, b), ratios, strict=True)):
            value = scale * float(rho) / r
            outputs[0] -= value
            if corrector and j == len(ratios) - 1:
                extra = value
            else:
                outputs[j + 1] += value
    return carry(form, s, t), [extra, *outputs] if corrector else outputs


@register_solver("unipc", order=2, twin=("UniPCMultistepScheduler", {}))
def unipc(
    process: Process,
    grid: Grid,
    *,
    order: int = 2,
    variant: str = "bh2",
    form: str = "x0",
    corrector: bool = True,
    disable_corrector: tuple[int, ...] = (),
    lower_order_final: bool = True,
) -> Plan:
    if order not in (1, 2, 3):
        raise DiffsampError(f"order: got {order!r}; accepted: 1, 2, 3")
    if variant not in ("bh1", "bh2"):
        raise DiffsampError(f"variant: got {variant!r}; accepted: bh1, bh2")
    nodes, n = grid.nodes, len(grid)
    rows = []
    last = 0
    for i, (s, t) in enumerate(grid.intervals()):
        # The predictor's base stays in the bank: the corrector of the next row starts from it again.
        correct = Mix(input=1.0) if corrector else None
        if i and corrector and i - 1 not in disable_corrector:
            a, m = _update(form, variant, nodes[i - 1 :: -1][:last], s, True)
            correct = Mix(base=a, m=tuple(m))
        now = min(order, i + 1)
        if lower_order_final:
            now = min(now, n - i)
        last = 1 if t.sigma == 0.0 else now
        a, m = _update(form, variant, nodes[i::-1][:last], t, False)
        rows.append(Row(s, t, Mix(base=a, m=tuple(m)), correct, s if correct is not None else None))
    return Plan(tuple(rows), process, grid, form=form, order=order + 1 if corrector else order)


unipc.__doc__ = __doc__
