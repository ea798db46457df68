"""Guidance for modular pipelines: guider classes of diffusers that work on x0.

A guider of diffusers is given predictions only. These also look at what the denoiser is called with (by a hook that
lives for the one call) and at the scheduler they are bound to, and so know the noise level:

    guider = diffsamp.APGGuidance(guidance_scale=7.5, norm=15.0).bind(pipe)
    pipe.update_components(guider=guider)          # or diffsamp.use(pipe, guidance="apg:7.5,norm=15")

save_pretrained of a modular pipeline does not save its guider; guider.save_pretrained does.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput

from ..errors import DiffsampError
from ..guidance import APG, Guidance, parse
from ..guidance.base import GuidanceState
from .current_level import Here, LevelReader
from .x0_space import denoiser_input, denoiser_timestep, guided_prediction, noisy_part


class _X0Guider(BaseGuidance):
    """What the guiders share; a subclass sets ``self.guidance`` and ``self.negated``."""

    _input_predictions = ["pred_cond", "pred_uncond"]
    guidance: Guidance
    negated: bool

    def _reset(self) -> None:
        self._owner: Any = getattr(self, "_owner", None)
        self._handle: Any = None
        self._seen: tuple[torch.Tensor, Any] | None = None
        self._reader: LevelReader | None = None
        self._timesteps: torch.Tensor | None = None
        self._memory: GuidanceState | None = None

    def bind(self, owner: Any) -> _X0Guider:
        """Say whose noise levels apply: a pipeline (its scheduler at the time of each run) or a scheduler."""
        if not hasattr(owner, "scheduler") and not hasattr(owner, "timesteps"):
            raise DiffsampError(f"owner: got {type(owner).__name__}; accepted: a pipeline or a scheduler")
        self._owner = owner
        return self

    @property
    def _scheduler(self) -> Any:
        if self._owner is None:
            raise DiffsampError("scheduler: this guider does not know it; call guider.bind(pipe) first")
        return getattr(self._owner, "scheduler", self._owner)

    # -- the interface of diffusers -----------------------------------------------------------------------------------

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Called before every step; a run begins at step 0, or where the schedule is a new one."""
        super().set_state(step, num_inference_steps, timestep)
        scheduler = self._scheduler
        if step == 0 or self._timesteps is not scheduler.timesteps:
            self._memory = self.guidance.init(1, num_inference_steps)
            self._reader = LevelReader(scheduler, sign=-1.0 if self.negated else 1.0)
            self._timesteps = scheduler.timesteps

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Watch the coming call of the denoiser."""
        super().prepare_models(denoiser)
        self._handle = denoiser.register_forward_pre_hook(self._watch, with_kwargs=True)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _watch(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._seen = denoiser_input(args, kwargs), denoiser_timestep(args, kwargs)

    def prepare_inputs(self, data: Any) -> list:
        """One batch per prediction; ``data``: name -> (conditional, unconditional)."""
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, i, name) for i, name in enumerate(names)]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, str | tuple[str, str]]) -> list:
        """As :meth:`prepare_inputs`, from a block state."""
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in enumerate(names)]

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        """Guide one step."""
        if pred_uncond is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        if self._seen is None or self._reader is None or self._memory is None:
            raise DiffsampError("guider: it saw no call of the denoiser; set_state and prepare_models come first")
        x, channels = noisy_part(self._seen[0], pred_cond, "the pipeline")
        if channels != pred_cond.shape[1]:
            raise DiffsampError("guider: the model predicts more than it denoises; not supported")
        here: Here = self._reader.here(self._seen[1])
        guided, after = guided_prediction(self.guidance, self._memory, pred_cond, pred_uncond, x, here)
        if not here.midway:
            self._memory = after
        self._seen = None
        return GuiderOutput(pred=guided, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the call in preparation is the conditional one."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """Denoiser calls of the current step: 2 where guidance acts, else 1."""
        if not self._enabled or self.guidance.guidance_scale == 1.0:
            return 1
        if self._num_inference_steps is None:
            return 2
        first = int(self._start * self._num_inference_steps)
        last = int(self._stop * self._num_inference_steps)
        return 2 if first <= self._step < last else 1


class APGGuidance(_X0Guider):
    """Adaptive projected guidance on x0, with the paper's settings (eta 0, reverse momentum).

    Args:
        guidance_scale: w >= 1; 1 is no guidance.
        eta, norm, momentum, norm_kind: as in :class:`diffsamp.guidance.APG`.
        start, stop: fractions of the run between which guidance acts.
        enabled: False gives the conditional prediction.
        negated: whether the pipeline negates the prediction before its scheduler sees it.

    diffusers' AdaptiveProjectedGuidance differs: it projects in the network's output space, computes u + w·g in place
    of c + (w − 1)·g, and by default neither projects (eta 1) nor has momentum.
    """

    @register_to_config
    def __init__(
        self,
        *,  # diffusers' guider.new() forgets what was given by position
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        norm: float = 0.0,
        momentum: float = -0.5,
        norm_kind: str = "l2",
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        negated: bool = False,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.guidance = APG(guidance_scale, eta, norm, momentum, norm_kind)
        self.guidance_scale = guidance_scale
        self.negated = negated
        self._reset()


class MethodGuidance(_X0Guider):
    """Any two-prediction method by its written form, so that it can be saved as a configuration.

    Args:
        guidance: as ``"cfg-rescale:7.5,rescale=0.7"``; the scale must be in it.
        start, stop, enabled, negated: as in :class:`APGGuidance`.
    """

    @register_to_config
    def __init__(
        self,
        *,
        guidance: str = "apg:7.5",
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        negated: bool = False,
    ) -> None:
        super().__init__(start, stop, enabled)
        method = parse(guidance)
        if method.guidance_scale is None:
            raise DiffsampError(f"guidance: {guidance!r} has no scale; give it, as in 'apg:7.5'")
        if method.conditions != 2 or guidance.startswith("autoguidance"):
            raise DiffsampError(f"guidance: {guidance!r} needs more than a conditional and an unconditional prediction")
        self.guidance = method
        self.guidance_scale = method.guidance_scale
        self.negated = negated
        self._reset()


for _class in (APGGuidance, MethodGuidance):
    # Under this name a saved configuration can be found again after `import diffsamp`.
    _class.__module__ = "diffsamp"
