"""Euler: one explicit step of the probability-flow ODE in the noise-to-signal ratio (flow: in sigma).

x_t/alpha_t = x_s/alpha_s + (r_t − r_s)·epsilon,   r = sigma/alpha

Order 1, one evaluation per step, deterministic. The same map as DDIM.
Source: Karras et al. 2022, arXiv:2206.00364, Algorithm 1 without its correction; Song et al. 2021, arXiv:2011.13456.
Twin: diffusers EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler.

@inproceedings{karras2022edm, title={Elucidating the Design Space of Diffusion-Based Generative Models},
  author={Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli}, booktitle={NeurIPS}, year={2022}}
"""

from __future__ import annotations

from ..grids import Grid
from ..plan import Mix, Plan, Row
from ..process import Process
from ..registry import register_solver
from .exponential import carry, weights


@register_solver("euler", order=1, twin=("EulerDiscreteScheduler", {}))
def euler(process: Process, grid: Grid) -> Plan:
    # In the epsilon form a start without signal would divide by alpha; the x0 form is the same map and does not.
    rows = [Row(s, t, Mix(base=carry("x0", s, t), m=(weights("x0", s, t, 1),))) for s, t in grid.intervals()]
    return Plan(tuple(rows), process, grid, form="x0")


euler.__doc__ = __doc__
