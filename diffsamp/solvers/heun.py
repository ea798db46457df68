"""Heun: the trapezoid rule of the probability-flow ODE, two evaluations per step (one in the last, at sigma = 0).

d(r) = epsilon at ratio r = sigma/alpha;   x_t/alpha_t = x_s/alpha_s + (r_t − r_s)·(d(r_s) + d(r_t))/2

For a flow the same rule is applied to the velocity in sigma. From a ratio above 1000 (zero terminal SNR) the
trapezoid is
taken of x0 in the exponential step instead, which is of order 2 too and stays bounded. Order 2, deterministic.
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
from .exponential import carry, weights

# Beyond this ratio (zero terminal SNR) the trapezoid in the ratio multiplies a network's error by thousands.
LARGE_RATIO = 1000.0


@register_solver("heun", order=2, evaluations=2, twin=("HeunDiscreteScheduler", {}))
def heun(process: Process, grid: Grid) -> Plan:
    rows = []
    for s, t in grid.intervals():
        euler = Mix(base=carry("x0", s, t), m=(weights("x0", s, t, 1),))
        if t.sigma == 0.0:
            rows.append(Row(s, t, euler))
            continue
        rows.append(Row(s, t, euler, correct=Mix(base=1.0), base_level=s, committed=False))
        if s.noise_to_signal > LARGE_RATIO and process.kind != "flow":
            half = euler.m[0] / 2
            full = Mix(base=euler.base, m=(half, half))
        elif process.kind == "flow":
            # velocity = (x − x0)/sigma
            half = (t.sigma - s.sigma) / 2
            full = Mix(base=1 + half / s.sigma, input=half / t.sigma, m=(-half / t.sigma, -half / s.sigma))
        else:
            # epsilon = (x − alpha·x0)/sigma
            half = t.alpha * (t.noise_to_signal - s.noise_to_signal) / 2
            full = Mix(
                base=t.alpha / s.alpha + half / s.sigma, input=half / t.sigma,
                m=(-half * t.alpha / t.sigma, -half * s.alpha / s.sigma),
            )  # fmt: skip
        rows.append(Row(t, t, full))
    return Plan(tuple(rows), process, grid, order=2)


heun.__doc__ = __doc__
