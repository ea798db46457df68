"""Pairs (our solver, stock scheduler) on one grid, for the tests of equality."""

from __future__ import annotations

import importlib
import inspect
import warnings
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging

import diffsamp
from diffsamp import engine
from diffsamp.impulse import _sharpen, respond
from diffsamp.solvers.heun import LARGE_RATIO

diffusers_logging.set_verbosity_error()

VP = (
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("linspace", "leading", "trailing", "karras", "exponential", "given")


@dataclass(frozen=True)
class Twin:
    """A solver of ours and the stock scheduler that is the same method.

    Attributes:
        name, options: of our solver.
        stock, config: class name and config of the stock scheduler.
        kind: ``vp``, ``flow`` or ``both``: what the stock one runs in.
        ratio: the stock one keeps x/alpha.
        times: the stock one knows only timesteps, not noise levels.
        data: the stock one can end at the data itself.
        predictions: that the stock one takes.
        step: keyword arguments of the stock step.
        memory: how many outputs IPNDMScheduler remembers (its order is fixed at 4).
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    stock: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    kind: str = "both"
    ratio: bool = False
    times: bool = False
    data: bool = True
    predictions: tuple[str, ...] = PREDICTIONS
    step: dict[str, Any] = field(default_factory=dict)
    memory: int | None = None

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in {**self.options, **self.step}.items())
        return f"{self.name}({options})-{self.stock}"

    @property
    def accepted(self) -> set[str]:
        return set(inspect.signature(getattr(diffusers, self.stock).__init__).parameters)

    def make(self, **config: Any) -> Any:
        """A stock scheduler with its step bound to :attr:`step` and :attr:`memory`."""
        stock = getattr(diffusers, self.stock)
        if not self.step and self.memory is None:
            return stock(**self.config, **config)
        bound = self.step

        class Bound(stock):  # type: ignore[misc, valid-type]
            @wraps(stock.step)
            def step(inner, *arguments: Any, **options: Any) -> Any:  # noqa: N805
                if self.memory is not None and len(inner.ets) >= self.memory:
                    inner.ets = inner.ets[len(inner.ets) - self.memory + 1 :]
                return super().step(*arguments, **options, **bound)

        return Bound(**self.config, **config)


def multistep(name: str, options: dict[str, Any], **config: Any) -> Twin:
    """A twin among DPMSolverMultistepScheduler's settings."""
    return Twin(name, options, "DPMSolverMultistepScheduler", config)


def singlestep(name: str, options: dict[str, Any], **config: Any) -> Twin:
    return Twin(name, options, "DPMSolverSinglestepScheduler", {"lower_order_final": True, **config})


def unipc(options: dict[str, Any], data: bool = True, **config: Any) -> Twin:
    if not data:
        config["final_sigmas_type"] = "sigma_min"
    kind = "vp" if options.get("form") == "epsilon" else "both"  # the stock one takes no flow in that form
    config = {"solver_order": options["order"], **config}
    return Twin("unipc", options, "UniPCMultistepScheduler", config, kind, data=data)


def sa_solver(options: dict[str, Any], **config: Any) -> Twin:
    config = {"tau_func": lambda t: 1.0, **config}
    return Twin("sa-solver", options, "SASolverScheduler", config, data=False)


def ddim(**step: Any) -> Twin:
    return Twin("ddim", dict(step), "DDIMScheduler", {"clip_sample": False}, "vp", times=True, step=step)


TWINS = [
    multistep("dpmpp-1m", {}, solver_order=1),
    multistep("dpmpp-2m", {}),
    multistep("dpmpp-2m", {"lower_order_final": False}, lower_order_final=False),
    multistep("dpmpp-2m", {"variant": "heun"}, solver_type="heun"),
    multistep("dpmpp-3m", {}, solver_order=3),
    Twin("dpmpp-2m", {"form": "epsilon"}, "DPMSolverMultistepScheduler",
         {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "vp", data=False),
    Twin("dpmpp-3m", {"form": "epsilon"}, "DPMSolverMultistepScheduler",
         {"algorithm_type": "dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"}, "vp", data=False),
    multistep("sde-dpmpp-1", {}, algorithm_type="sde-dpmsolver++", solver_order=1),
    multistep("sde-dpmpp-2m", {}, algorithm_type="sde-dpmsolver++"),
    singlestep("dpmpp-2s", {}, solver_order=2),
    singlestep("dpmpp-3s", {}, solver_order=3, solver_type="heun"),
    singlestep("dpmpp-3s", {"variant": "midpoint"}, solver_order=3),
    unipc({"order": 1}),
    unipc({"order": 2}),
    unipc({"order": 3}),
    unipc({"order": 1, "variant": "bh1"}, False, solver_type="bh1"),
    unipc({"order": 2, "variant": "bh1"}, False, solver_type="bh1"),
    unipc({"order": 3, "variant": "bh1"}, False, solver_type="bh1"),
    unipc({"order": 2, "form": "epsilon"}, False, predict_x0=False),
    unipc({"order": 3, "form": "epsilon"}, False, predict_x0=False),
    unipc({"order": 2, "disable_corrector": (0,)}, disable_corrector=[0]),
    unipc({"order": 3, "lower_order_final": False}, False, lower_order_final=False),
    *(Twin("deis", {"order": k}, "DEISMultistepScheduler", {"solver_order": k}, data=False) for k in (1, 2, 3)),
    sa_solver({}),
    sa_solver({"predictor_order": 1, "corrector_order": 1}, predictor_order=1, corrector_order=1),
    sa_solver({"predictor_order": 3, "corrector_order": 3}, predictor_order=3, corrector_order=3),
    sa_solver({"tau": 0.4}, tau_func=lambda t: 0.4),
    sa_solver({"tau_range": (200.0, 800.0)}, tau_func=None),
    Twin("euler", {}, "EulerDiscreteScheduler", {}, "vp", ratio=True, predictions=("epsilon", "v_prediction")),
    Twin("euler", {}, "FlowMatchEulerDiscreteScheduler", {}, "flow"),
    Twin("euler-ancestral", {}, "EulerAncestralDiscreteScheduler", {}, "vp", ratio=True,
         predictions=("epsilon", "v_prediction")),
    Twin("heun", {}, "HeunDiscreteScheduler", {}, "vp", ratio=True, predictions=("epsilon", "v_prediction")),
    Twin("heun", {}, "FlowMatchHeunDiscreteScheduler", {}, "flow"),
    ddim(),
    ddim(eta=0.5),
    ddim(eta=1.0),
    Twin("ddpm", {}, "DDPMScheduler", {"clip_sample": False}, "vp", times=True),
    *(Twin("ipndm", {"order": k}, "IPNDMScheduler", {}, "vp", predictions=("v_prediction",), memory=k)
      for k in (1, 2, 3, 4)),
]  # fmt: skip


def spaced(gaps: list[float], top: float, data: bool) -> np.ndarray:
    """Ratios sigma/alpha from ``top`` on, steps in log-SNR as long as ``gaps`` say (in total at most 12)."""
    steps = np.array(gaps) * min(1.0, 12.0 / sum(gaps))
    ratios = top * np.exp(-np.concatenate([[0.0], np.cumsum(steps)]))
    return np.append(ratios[:-1], 0.0) if data else ratios


def prepared(
    twin: Twin, gaps: list[float], vp: int, spacing: str, prediction: str, flow: bool, shift: float,
    top: float = 150.0,
) -> tuple[Any, Any, str] | None:  # fmt: skip
    """(our plan, the stock scheduler with its steps set in float64, prediction type), or None where the stock one does
    not take the configuration.

    Args:
        gaps: one positive number per step: its length in log-SNR where ``spacing`` is ``given``.
        top: the ratio sigma/alpha that such a grid starts at.
    """
    steps = len(gaps)
    flow = flow if twin.kind == "both" else twin.kind == "flow"
    if not flow and prediction not in twin.predictions:
        return None
    config: dict[str, Any] = {}
    if flow and twin.kind == "both":
        config |= {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    elif flow:
        config["shift"] = shift
    elif twin.name != "ipndm":
        config |= VP[vp] | {"prediction_type": prediction}
    given = spacing == "given" or twin.name == "ipndm"
    if twin.times:
        # Elsewhere the stock DDIM and DDPM step to a timestep that is not the next one they visit.
        if spacing not in ("leading", "trailing") or 1000 % steps or (twin.name == "ddpm" and spacing != "leading"):
            return None
        config["timestep_spacing"] = spacing
        given = False
    elif not given and flow:
        if spacing != "linspace":
            return None
    elif not given:
        if spacing in ("karras", "exponential"):
            if f"use_{spacing}_sigmas" not in twin.accepted:
                return None
            config[f"use_{spacing}_sigmas"] = True
        elif "timestep_spacing" not in twin.accepted:
            return None
        else:
            config["timestep_spacing"] = spacing
    process = diffsamp.Process.flow(shift) if flow else diffsamp.Process.vp(**VP[vp])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = twin.make(**config)
        stock.set_timesteps(steps)
        levels = []
        if twin.times:
            levels = [process.level_at(float(t), i) for i, t in enumerate(stock.timesteps)] + [process.level(0.0)]
        else:
            if given:
                ratios = spaced(gaps, top, twin.data)
                values = torch.from_numpy(ratios / (1 + ratios) if flow else ratios)
            else:
                # Heun visits every level but the first and the last twice.
                own = stock.sigmas.double()
                values = torch.cat([own[:1], own[1:-1:2], own[-1:]]) if twin.name == "heun" else own
                ratios = (values / (1 - values) if flow else values).numpy()
            if np.unique(ratios).size < ratios.size or (twin.data and ratios[-1] > 0) or not np.isfinite(ratios).all():
                return None
            if twin.name == "heun" and not flow and ratios[0] > LARGE_RATIO:
                return None  # there ours takes the trapezoid of x0 on purpose
            # Stock SA-Solver reads tau at its own timesteps.
            told = [*stock.timesteps.double().tolist(), 0.0]
            levels = [process.level(float(r), i, told[i]) for i, r in enumerate(ratios)]
            inner = values[1:-1].repeat_interleave(2) if twin.name == "heun" else values[1:-1]
            stock.sigmas = torch.cat([values[:1], inner, values[-1:]])
            if twin.name == "ipndm":
                stock.betas = torch.tensor([level.sigma for level in levels], dtype=torch.float64)
                stock.alphas = torch.tensor([level.alpha for level in levels], dtype=torch.float64)
    plan = diffsamp.solver(twin.name, **twin.options)(process, diffsamp.Grid(process, tuple(levels)))
    return plan, stock, "flow_prediction" if flow else prediction


def alphas(twin: Twin, plan: Any) -> np.ndarray:
    """What a sample of the stock scheduler is to be multiplied with at every network call and at the end."""
    levels = [row.level for row in plan.rows] + [plan.last_level]
    return np.array([level.alpha if twin.ratio else 1.0 for level in levels])


def pair(twin: Twin, **configuration: Any) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """(our plan, response of ours, response of the stock scheduler in our sample scale), or None where the stock one
    does not take the :func:`prepared` configuration."""
    found = prepared(twin, **configuration)
    if found is None:
        return None
    plan, stock, prediction = found
    response = respond(stock)[0]
    alpha = alphas(twin, plan)
    response = response * alpha[:, None]
    response[:, 0] /= alpha[0]
    return plan, plan.response(prediction), response


def finals(twin: Twin, start: torch.Tensor, network: Any, **configuration: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Final samples of our engine and of the stock step, from the same start, network and noise, in ``start.dtype``."""
    found = prepared(twin, **configuration)
    assert found is not None, f"{twin} does not take {configuration}"
    plan, stock, prediction = found
    noises = [torch.randn(start.shape, generator=torch.Generator().manual_seed(i)) for i in range(plan.nfe)]
    state = engine.init(plan, start)
    for i, row in enumerate(plan.rows):
        output = network(state.input, i)
        noise = noises[i] if row.uses_noise else None
        state = engine.step(plan, state, output, noise, prediction=prediction)
    module = importlib.import_module(stock.step.__module__)
    _sharpen(stock, None)
    alpha = alphas(twin, plan).tolist()
    y = start / alpha[0]
    for i, t in enumerate(stock.timesteps):
        draw = mock.patch.object(module, "randn_tensor", lambda *a, i=i, **k: noises[i], create=True)
        with draw:
            y = stock.step(network(alpha[i] * y, i), t, y, return_dict=False)[0]
    return state.input, y * alpha[-1]
