"""DDIM and DDPM: the first-order step, from deterministic (eta = 0) to ancestral (eta = 1).

x_t = (sqrt(sigma_t² − c²)/sigma_s)·(x − alpha_s·x0) + alpha_t·x0 + c·noise,   c = eta·sigma_t·sqrt(1 − e^{−2h})

Order 1, one evaluation per step. With eta = 1 this is DDPM's posterior step, and the same map as Euler-ancestral.
Source: Song, Meng, Ermon 2021, arXiv:2010.02502, Eq. 12 and 16; Ho et al. 2020, arXiv:2006.11239, Eq. 6.
Twin: diffusers DDIMScheduler.

@inproceedings{song2021ddim, title={Denoising Diffusion Implicit Models},
  author={Song, Jiaming and Meng, Chenlin and Ermon, Stefano}, booktitle={ICLR}, year={2021}}
@inproceedings{ho2020ddpm, title={Denoising Diffusion Probabilistic Models},
  author={Ho, Jonathan and Jain, Ajay and Abbeel, Pieter}, booktitle={NeurIPS}, year={2020}}
"""

from __future__ import annotations

import math

from ..errors import DiffsampError
from ..grids import Grid
from ..plan import Mix, Plan, Row
from ..process import Process
from ..registry import register_solver


def _first_order(process: Process, grid: Grid, eta: float, form: str) -> Plan:
    if not 0.0 <= eta <= 1.0:
        raise DiffsampError(f"eta: got {eta}; must be between 0 and 1")
    rows = []
    for s, t in grid.intervals():
        noise = eta * t.sigma * math.sqrt(-math.expm1(-2 * (t.lambda_ - s.lambda_)))
        kept = math.sqrt(max(t.sigma**2 - noise**2, 0.0))
        if form == "x0":
            mix = Mix(base=kept / s.sigma, m=(t.alpha - s.alpha * kept / s.sigma,), noise=noise)
        else:
            mix = Mix(base=t.alpha / s.alpha, m=(kept - t.alpha * s.sigma / s.alpha,), noise=noise)
        rows.append(Row(s, t, mix))
    return Plan(tuple(rows), process, grid, form=form)


@register_solver("ddim", order=1, twin=("DDIMScheduler", {}))
def ddim(process: Process, grid: Grid, *, eta: float = 0.0, form: str = "x0") -> Plan:
    return _first_order(process, grid, eta, form)


@register_solver("ddpm", order=1, stochastic=True, twin=("DDPMScheduler", {}))
def ddpm(process: Process, grid: Grid) -> Plan:
    return _first_order(process, grid, 1.0, "x0")


ddim.__doc__ = ddpm.__doc__ = __doc__
