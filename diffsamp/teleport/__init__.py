"""Analytical teleportation: from the start noise to a lower noise level in closed form, with no network call.

With Gaussian data the probability-flow ODE is linear and solved exactly; real data look Gaussian at high noise. So the
first part of a run can be replaced by a formula, and any plan can start at the level where the formula stops.

Source: Wang and Vastola 2024, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and
its Applications", arXiv:2412.09726.
"""

from __future__ import annotations

from .guided import guided_map, one_call_map
from .maps import gaussian_denoiser, gaussian_map
from .network import network_means
from .start import Choice, choose_start, lowest_starts, start_grid, teleport
from .statistics import Statistics, gather, load

__all__ = [
    "Choice", "Statistics", "choose_start", "gather", "gaussian_denoiser", "gaussian_map", "guided_map", "load",
    "lowest_starts", "network_means", "one_call_map", "start_grid", "teleport",
]  # fmt: skip
