"""The noise level at which a pipeline's denoiser is being called, read from its scheduler.

Ours carry their plan. For a scheduler of diffusers the level comes from ``sigmas[step_index]`` (with Karras sigmas the
timestep is rounded, by up to 1.8 % in sigma), or from ``alphas_cumprod[t]`` where it keeps none (DDIM, DDPM, PNDM).
The input of the network is in the process's own scale for all of them: Euler and its kin divide by sqrt(sigma² + 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DiffsampError
from ..process import Level, Process

_VP = Process.vp_continuous()
_FLOW = Process.flow()
_FLOW_INVERTED = Process.flow(inverted=True)


@dataclass(frozen=True)
class Here:
    """Where a run stands.

    Attributes:
        level: level of the network's input.
        p, q: x0 = p·input + q·prediction; None where the prediction does not determine x0.
        key: identifies the step within the run.
        midway: whether this is a later stage of a step of several evaluations (Heun).
    """

    level: Level
    p: float | None
    q: float | None
    key: Any
    midway: bool


class LevelReader:
    """Reads levels of one run; make a new one when ``scheduler.timesteps`` is another object."""

    def __init__(self, scheduler: Any, *, sign: float = 1.0, img2img: bool = False) -> None:
        self.scheduler, self.sign, self.img2img = scheduler, sign, img2img
        self.config = scheduler.config
        self.prediction = self.config.get("prediction_type") or "epsilon"
        name = type(scheduler).__name__
        self.flow = (
            "FlowMatch" in name or bool(self.config.get("use_flow_sigmas")) or self.prediction == "flow_prediction"
        )
        self.edm = name.startswith("EDM")
        self.inverted = bool(self.config.get("invert_sigmas"))
        if self.flow:
            self.prediction = "flow_prediction"
        if not self.edm and hasattr(scheduler, "precondition_outputs"):
            raise DiffsampError(f"guidance: {name} preconditions the prediction; it is not supported")
        self.sigmas = self._listed("sigmas")
        self.between = self._listed("sigmas_interpol")
        if self.sigmas is None and not hasattr(scheduler, "alphas_cumprod"):
            raise DiffsampError(f"guidance: {name} keeps neither sigmas nor alphas_cumprod; the noise level is unknown")

    def _listed(self, name: str) -> list[float] | None:
        values = getattr(self.scheduler, name, None)
        return values.tolist() if isinstance(values, torch.Tensor) and values.ndim == 1 else None

    def here(self, timestep: Any) -> Here:
        """The place of the call whose network was told ``timestep``."""
        plan = getattr(self.scheduler, "plan", None)
        if plan is not None and hasattr(plan, "rows"):
            return self._ours(plan, timestep)
        midway = getattr(self.scheduler, "state_in_first_order", True) is False
        if self.sigmas is None:
            t = int(_first(timestep))
            bar = float(self.scheduler.alphas_cumprod[t])
            level = Level(float(t), math.sqrt(bar), math.sqrt(1.0 - bar))
            return self._made(level, _VP, self.prediction, t, midway)
        index = self._index(timestep)
        table = self.between if midway and self.between is not None else self.sigmas
        sigma = table[index]
        if self.flow:
            sigma = 1.0 - sigma if self.inverted else sigma
            process = _FLOW_INVERTED if self.inverted else _FLOW
            return self._made(Level(sigma, 1.0 - sigma, sigma), process, self.prediction, index, midway)
        if self.edm:
            return self._edm(sigma, index, midway)
        alpha = 1.0 / math.sqrt(1.0 + sigma * sigma)
        return self._made(Level(sigma, alpha, sigma * alpha), _VP, self.prediction, index, midway)

    def _ours(self, plan: Any, timestep: Any) -> Here:
        index = min(self._index(timestep), len(plan.rows) - 1)
        row = plan.rows[index]
        midway = not _committed_before(plan, index)
        if self.scheduler.prediction == "edm":
            return self._edm(row.level.sigma, index, midway)
        return self._made(row.level, plan.process, self.scheduler.prediction, index, midway)

    def _made(self, level: Level, process: Process, prediction: str, key: Any, midway: bool) -> Here:
        try:
            p, q = process.x0_coefficients(level, prediction)
        except DiffsampError:
            return Here(level, None, None, key, midway)
        return Here(level, p, self.sign * q, key, midway)

    def _edm(self, sigma: float, index: int, midway: bool) -> Here:
        # The network's input is c_in·x, and c_out changes its sign for a v-prediction.
        width = float(self.config.get("sigma_data", 0.5))
        spread = math.sqrt(sigma * sigma + width * width)
        c_skip, c_out = width * width / spread**2, sigma * width / spread
        sign = -1.0 if self.prediction == "v_prediction" else 1.0
        level = Level(sigma, 1.0 / spread, sigma / spread)
        return Here(level, c_skip * spread, sign * c_out, index, midway)

    def _index(self, timestep: Any) -> int:
        scheduler = self.scheduler
        if getattr(scheduler, "step_index", None) is not None:
            return int(scheduler.step_index)
        if getattr(scheduler, "begin_index", None) is not None:
            return int(scheduler.begin_index)
        # First step of a run, and the pipeline has not said where it begins.
        if not self.img2img:
            return 0
        t, times = _first(timestep), scheduler.timesteps.tolist()
        gap, index = min(
            (abs(value - scaled), i) for scaled in (t, 1000.0 * t) for i, value in enumerate(times)
        )  # fmt: skip
        if gap > 0.51:
            raise DiffsampError(f"guidance: timestep {t:g} is not in the schedule, so the noise level is unknown")
        return index


def _committed_before(plan: Any, index: int) -> bool:
    return index == 0 or getattr(plan.rows[index - 1], "committed", True)


def _first(timestep: Any) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
