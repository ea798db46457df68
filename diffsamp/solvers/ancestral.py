"""Euler-ancestral: a deterministic step to a lower level, then fresh noise back up to the target.

r_up = min(r_t, eta·r_t·sqrt(r_s² − r_t²)/r_s),  r_down = sqrt(r_t² − r_up²),   r = sigma/alpha
x_t/alpha_t = x_s/alpha_s + (r_down − r_s)·epsilon + r_up·noise

Order 1, one evaluation per step, stochastic. With eta = 1 this is DDPM's posterior step.
Source: k-diffusion's sample_euler_ancestral; Song et al. 2021, arXiv:2011.13456, Appendix F.
Twin: diffusers EulerAncestralDiscreteScheduler.

@inproceedings{song2021score, title={Score-Based Generative Modeling through Stochastic Differential Equations},
  author={Song, Yang and Sohl-Dickstein, Jascha and Kingma, Diederik P and Kumar, Abhishek and Ermon, Stefano and
  Poole, Ben}, booktitle={ICLR}, year={2021}}
"""

from __future__ import annotations

import math

from ..errors import DiffsampError
from ..grids import Grid
from ..plan import Mix, Plan, Row
from ..process import Process
from ..registry import register_solver


@register_solver("euler-ancestral", order=1, stochastic=True, twin=("EulerAncestralDiscreteScheduler", {}))
def euler_ancestral(process: Process, grid: Grid, *, eta: float = 1.0) -> Plan:
    if not eta >= 0.0:
        raise DiffsampError(f"eta: got {eta}; must be 0 or above")
    rows = []
    for s, t in grid.intervals():
        # alpha_t·r_up and alpha_t·r_down, written so that a start without signal stays finite
        up = min(t.sigma, eta * t.sigma * math.sqrt(-math.expm1(-2 * t.h)))
        down = math.sqrt(max(t.sigma**2 - up**2, 0.0))
        mix = Mix(base=t.alpha / s.alpha, m=(down - t.alpha * s.noise_to_signal,), noise=up)
        rows.append(Row(s, t, mix))
    return Plan(tuple(rows), process, grid, form="epsilon")


euler_ancestral.__doc__ = __doc__
