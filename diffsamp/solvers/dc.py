"""DC-Solver: dynamic compensation, one ratio per step that moves the time at which the newest output is read.

Before the predictor of step i, and after the corrector has used the raw output, the newest output m_0 becomes the value
at  t' = t_{i-1} + rho_i·(t_i − t_{i-1})  of the Lagrange polynomial through the last k+1 outputs:

    m_0 ← Σ_j w_j·m_j,   w_j = Π_{l≠j} (t' − t_{i-l}) / (t_{i-j} − t_{i-l})

The compensated value stays in the history (the method is recursive). rho = 1 is the identity, and the first k steps
have
too few outputs, so their ratios are 1. The coordinate t is the network's time (sigma for flows). Ratios belong to one
model, solver, grid and guidance scale: `diffsamp calibrate dc` finds them.

Order of the base with every ratio 1; a fixed ratio other than 1 makes it first order in the limit of many steps.
Source: Zhao et al. 2024, DC-Solver, arXiv:2409.03755, Section 3.2; recursion as in the authors' code.

@inproceedings{zhao2024dcsolver,
  title={DC-Solver: Improving Predictor-Corrector Diffusion Sampler via Dynamic Compensation},
  author={Zhao, Wenliang and Wang, Haolin and Zhou, Jie and Lu, Jiwen},
  booktitle={European Conference on Computer Vision},
  year={2024}
}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..errors import DiffsampError
from ..plan import Plan
from ..registry import register_solver
from .multistep import require_multistep


def lagrange_weights(nodes: Sequence[float], at: float) -> tuple[float, ...]:
    """Weights w with p(at) = Σ w_j·p(nodes_j) for every polynomial p of degree below ``len(nodes)``; they sum to 1."""
    weights = []
    for j, node in enumerate(nodes):
        weight = 1.0
        for other, value in enumerate(nodes):
            if other != j:
                if value == node:
                    raise DiffsampError(f"dc: two steps are at time {node:g}; the grid must visit a time once")
                weight *= (at - value) / (node - value)
        weights.append(weight)
    return tuple(weights)


def compensation(plan: Plan, index: int, ratio: float, k: int = 2) -> tuple[float, ...] | None:
    """Weights over (m0, m1, ...) that replace m0 in row ``index``; None where the ratio is 1 or outputs are too few."""
    if ratio == 1.0 or index < k:
        return None
    nodes = [plan.rows[index - j].level.t for j in range(k + 1)]
    return lagrange_weights(nodes, nodes[1] + ratio * (nodes[0] - nodes[1]))


@register_solver("dc", transform=True, base="unipc")
def dc(plan: Plan, *, ratios: Sequence[float] | None = None, k: int = 2) -> Plan:
    """DC-Solver's dynamic compensation of any deterministic multistep solver.

    Args:
        plan: the base; UniPC in the paper, ddim, dpmpp-2m, deis and others here.
        ratios: one per network call; the first ``k`` must be 1. None: 1 everywhere, which is the base itself.
        k: degree of the interpolation, 1 to 3 (the paper's is 2).

    Raises:
        DiffsampError: a wrong number of ratios, one that is not finite, one other than 1 in the first k steps, or a
            base that is stochastic or has several calls per step.

    Source: Zhao et al. 2024, DC-Solver, arXiv:2409.03755, Section 3.2.

    @inproceedings{zhao2024dcsolver,
      title={DC-Solver: Improving Predictor-Corrector Diffusion Sampler via Dynamic Compensation},
      author={Zhao, Wenliang and Wang, Haolin and Zhou, Jie and Lu, Jiwen},
      booktitle={European Conference on Computer Vision},
      year={2024}
    }
    """
    if isinstance(k, bool) or k not in (1, 2, 3):
        raise DiffsampError(f"k: got {k!r}; accepted: 1, 2, 3")
    require_multistep(plan, "dc")
    if any(row.rewrite is not None for row in plan.rows):
        raise DiffsampError(
            f"dc: {plan.solver or 'this plan'} is compensated already; accepted: one dc in a composition"
        )
    if ratios is None:
        return plan
    if isinstance(ratios, str) or not hasattr(ratios, "__iter__"):
        raise DiffsampError(f"ratios: got {ratios!r}; needs a list, one for each of the {plan.nfe} network calls")
    values = [float(r) for r in ratios]
    if len(values) != plan.nfe:
        raise DiffsampError(f"ratios: got {len(values)} for a plan of {plan.nfe} network calls; needs one for each")
    if not all(math.isfinite(r) for r in values):
        raise DiffsampError(f"ratios: must be finite, got {values}")
    for i, ratio in enumerate(values[:k]):
        if ratio != 1.0:
            raise DiffsampError(f"ratios: ratio {i} is {ratio:g}; the first {k} must be 1, for lack of older outputs")
    rows = [
        replace(row, rewrite=compensation(plan, i, r, k))
        for i, (row, r) in enumerate(zip(plan.rows, values, strict=True))
    ]
    return plan.with_rows(rows)


@register_solver("dc-unipc", transform=True, base="unipc")
def dc_unipc(plan: Plan, *, ratios: Sequence[float] | None = None, k: int = 2) -> Plan:
    """DC-Solver on UniPC, the paper's configuration; the same as ``dc(unipc)``.

    Source: Zhao et al. 2024, DC-Solver, arXiv:2409.03755.

    @inproceedings{zhao2024dcsolver,
      title={DC-Solver: Improving Predictor-Corrector Diffusion Sampler via Dynamic Compensation},
      author={Zhao, Wenliang and Wang, Haolin and Zhou, Jie and Lu, Jiwen},
      booktitle={European Conference on Computer Vision},
      year={2024}
    }
    """
    return dc(plan, ratios=ratios, k=k)
