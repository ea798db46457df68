"""Pairs (our solver, stock scheduler) on one grid, for the tests of equality."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import numpy as np
from diffusers.utils import logging as diffusers_logging

import diffsamp
from diffsamp.impulse import respond

diffusers_logging.set_verbosity_error()

VP = (
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
)
# name, options of ours, stock class, its config, whether flow is supported, whether the stock one keeps x/alpha
TWINS: list[tuple[str, dict[str, Any], str, dict[str, Any], bool, bool]] = [
    ("dpmpp-1m", {}, "DPMSolverMultistepScheduler", {"solver_order": 1}, True, False),
    ("dpmpp-2m", {}, "DPMSolverMultistepScheduler", {"solver_order": 2}, True, False),
    ("dpmpp-2m", {"variant": "heun"}, "DPMSolverMultistepScheduler", {"solver_type": "heun"}, True, False),
    ("dpmpp-3m", {}, "DPMSolverMultistepScheduler", {"solver_order": 3}, True, False),
    ("dpmpp-2m", {"form": "epsilon"}, "DPMSolverMultistepScheduler",
     {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, False, False),
    ("dpmpp-3m", {"form": "epsilon"}, "DPMSolverMultistepScheduler",
     {"algorithm_type": "dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"}, False, False),
    ("sde-dpmpp-1", {}, "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}, True, False),  # noqa: E501
    ("sde-dpmpp-2m", {}, "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True, False),
    ("dpmpp-2s", {}, "DPMSolverSinglestepScheduler", {"solver_order": 2, "lower_order_final": True}, False, False),
    ("dpmpp-3s", {}, "DPMSolverSinglestepScheduler",
     {"solver_order": 3, "solver_type": "heun", "lower_order_final": True}, False, False),
    ("dpmpp-3s", {"variant": "midpoint"}, "DPMSolverSinglestepScheduler",
     {"solver_order": 3, "lower_order_final": True}, False, False),
    ("unipc", {"order": 1}, "UniPCMultistepScheduler", {"solver_order": 1}, True, False),
    ("unipc", {"order": 2}, "UniPCMultistepScheduler", {"solver_order": 2}, True, False),
    ("unipc", {"order": 3}, "UniPCMultistepScheduler", {"solver_order": 3}, True, False),
    ("unipc", {"order": 2, "variant": "bh1"}, "UniPCMultistepScheduler",
     {"solver_order": 2, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, False, False),
    ("unipc", {"order": 3, "variant": "bh1"}, "UniPCMultistepScheduler",
     {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, False, False),
    ("unipc", {"order": 2, "form": "epsilon"}, "UniPCMultistepScheduler",
     {"solver_order": 2, "predict_x0": False, "final_sigmas_type": "sigma_min"}, False, False),
    ("unipc", {"order": 2, "disable_corrector": (0,)}, "UniPCMultistepScheduler",
     {"solver_order": 2, "disable_corrector": [0]}, True, False),
    ("deis", {"order": 1}, "DEISMultistepScheduler", {"solver_order": 1}, False, False),
    ("deis", {"order": 2}, "DEISMultistepScheduler", {"solver_order": 2}, False, False),
    ("deis", {"order": 3}, "DEISMultistepScheduler", {"solver_order": 3}, False, False),
    ("sa-solver", {}, "SASolverScheduler", {"tau_func": lambda t: 1.0}, False, False),
    ("sa-solver", {"predictor_order": 3, "corrector_order": 3}, "SASolverScheduler",
     {"tau_func": lambda t: 1.0, "predictor_order": 3, "corrector_order": 3}, False, False),
    ("euler", {}, "EulerDiscreteScheduler", {}, False, True),
    ("euler-ancestral", {}, "EulerAncestralDiscreteScheduler", {}, False, True),
    ("ddim", {}, "DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, False, False),
]  # fmt: skip


def pair(twin: int, steps: int, vp: int, spacing: str, prediction: str, flow: bool, shift: float):
    """(our plan, response of ours, response of the stock scheduler in our sample scale), or None where the stock one
    cannot run the configuration."""
    name, options, stock_name, stock_config, flow_ok, kept_scale = TWINS[twin]
    config = dict(stock_config)
    if kept_scale and prediction == "sample":
        prediction = "epsilon"  # stock Euler has no x0 prediction
    if name == "ddim" and 1000 % steps:
        return None  # stock DDIM then steps to a timestep that is not the next one it visits
    if flow and flow_ok:
        config |= {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    else:
        flow = False
        config |= VP[vp] | {"prediction_type": prediction}
        if spacing in ("karras", "exponential") and "use_karras_sigmas" in _accepted(stock_name):
            config[f"use_{spacing}_sigmas"] = True
        elif (
            "timestep_spacing" in _accepted(stock_name)
            and "timestep_spacing" not in config
            and spacing in ("linspace", "trailing")
        ):
            config["timestep_spacing"] = spacing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = getattr(diffusers, stock_name)(**config)
        response, run = respond(stock, steps)
    process = diffsamp.Process.flow(shift) if flow else diffsamp.Process.vp(**VP[vp])
    levels = []
    if getattr(run, "sigmas", None) is not None and len(run.sigmas) == steps + 1:
        for i, sigma in enumerate(run.sigmas.double().tolist()):
            levels.append(process.level(sigma / (1 - sigma) if flow else sigma, i))
    else:
        levels = [process.level_at(float(t), i) for i, t in enumerate(run.timesteps)] + [process.level(0.0)]
    # Karras grids of stock schedulers may end twice at sigma_min.
    if levels[-1].noise_to_signal == levels[-2].noise_to_signal:
        return None
    grid = diffsamp.Grid(process, tuple(levels))
    plan = diffsamp.solver(name, **options)(process, grid)
    if kept_scale:
        alpha = np.array([level.alpha for level in grid.levels])
        response = response * alpha[:, None]
        response[:, 0] /= alpha[0]
    return plan, plan.response("flow_prediction" if flow else prediction), response


def _accepted(stock_name: str) -> set[str]:
    import inspect

    return set(inspect.signature(getattr(diffusers, stock_name).__init__).parameters)
