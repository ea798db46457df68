"""Heun: the trapezoid rule of the probability-flow ODE, two evaluations per step (one in the last, at sigma = 0).

d(r) = epsilon at ratio r = sigma/alpha;   x_t/alpha_t = x_s/alpha_s + (r_t − r_s)·(d(r_s) + d(r_t))/2

For a flow the same rule is applied to the velocity in sigma. Order 2, deterministic.
Source: Karras et al. 2022, arXiv:2206.00364, Algorithm 1. Twin: diffusers HeunDiscreteScheduler,
FlowMatchHeunDiscreteScheduler.

@inproceedings{karras2022edm, title={Elucidating the Design Space of Diffusion-Based Generative Models},
  author={Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli}, booktitle={NeurIPS}, year={2022}}
"""

from __future__ import annotations

from ..grids import Grid
from ..plan import Mix, Plan, Row
from ..process import Process
from ..registry import register_solver


@register_solver("heun", order=2, evaluations=2, twin=("HeunDiscreteScheduler", {}))
def heun(process: Process, grid: Grid) -> Plan:
    rows = []
    for s, t in grid.intervals():
        if process.kind == "flow":
            # velocity = (x − x0)/sigma
            step = t.sigma - s.sigma
            euler = Mix(base=1 + step / s.sigma, m=(-step / s.sigma,))
        else:
            step = t.noise_to_signal - s.noise_to_signal
            euler = Mix(base=t.alpha / s.alpha, m=(t.alpha * step,))
        if t.sigma == 0.0:
            rows.append(Row(s, t, euler))
            continue
        rows.append(Row(s, t, euler, correct=Mix(base=1.0), base_level=s, committed=False))
        if process.kind == "flow":
            half = step / 2
            full = Mix(base=1 + half / s.sigma, input=half / t.sigma, m=(-half / t.sigma, -half / s.sigma))
        else:
            half = t.alpha * step / 2
            full = Mix(base=t.alpha / s.alpha, m=(half, half))
        rows.append(Row(t, t, full))
    return Plan(tuple(rows), process, grid, form="x0" if process.kind == "flow" else "epsilon", order=2)


heun.__doc__ = __doc__
