"""One scheduler for the discrete pipelines of diffusers: Amused (also img2img and inpainting), LLaDA2, VQ-Diffusion.

    pipe.scheduler = MaskedScheduler.from_pipe(pipe)

These loops call the network in every iteration, so the scheduler spreads the masks evenly over the steps that are left
(no step is empty) and never needs more steps than there are masks. Draws are exact in the tail, and the mask token is
never drawn, however much a model likes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from diffsamp.errors import DiffsampError
from diffsamp.masked.events import Events, FirstHitting
from diffsamp.masked.orders import ORDERS
from diffsamp.masked.sampler import Draw, MaskedState, _by_score, init, masked_log_probabilities

_REFUSED = {
    "DiffusionGemmaPipeline": "its corruption is uniform, without a mask token, so there is nothing to reveal first",
    "DiscreteDDIMScheduler": "its kernel is uniform, without a mask token",
}


@dataclass
class MaskedSchedulerOutput(BaseOutput):
    """Union of what the three pipelines read back; shapes as in `sample`."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
    transfer_index: Tensor | None = None
    editing_transfer_index: Tensor | None = None
    sampled_tokens: Tensor | None = None
    sampled_probs: Tensor | None = None
    pred_logits: Tensor | None = None


class MaskedScheduler(SchedulerMixin, ConfigMixin):
    """First-hitting sampling in groups, for `pipe.scheduler`.

    Args:
        mask_token_id: the mask; LLaDA2 passes its own at every step and may leave it None.
        layout: "auto", "class_last" (B, L, V) or "class_first" (B, V, L); (B, V, H, W) is always flattened.
        order: "random" (unbiased), "confidence", "margin", "entropy", or the legacy "maskgit" and "low-confidence".
        counting: "even" groups, or "cosine", the counts of MaskGIT (few tokens in the early calls).
        temperature, top_k, top_p, precision: of the token draw; LLaDA2's own arguments win over the first three.
        block_length, num_inference_steps: defaults of LLaDA2Pipeline.
    """

    order = 1
    config: Any  # diffusers declares a dict; its keys are attributes too

    @register_to_config
    def __init__(
        self,
        mask_token_id: int | None = None,
        layout: str = "auto",
        order_rule: str = "random",
        counting: str = "even",
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        precision: str = "safe",
        block_length: int = 32,
        num_inference_steps: int = 32,
    ) -> None:
        if layout not in ("auto", "class_last", "class_first"):
            raise DiffsampError(f"layout={layout!r} is not known; accepted: auto, class_last, class_first")
        if counting not in ("even", "cosine"):
            raise DiffsampError(f"counting={counting!r} is not known; accepted: even, cosine")
        if order_rule not in ORDERS:
            raise DiffsampError(f"order_rule={order_rule!r} is not known; accepted: {', '.join(ORDERS)}")
        Draw(temperature, top_k, top_p, precision)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1)
        self._start: Tensor | None = None

    @classmethod
    def from_pipe(cls, pipe: Any, **options: Any) -> MaskedScheduler:
        """A scheduler fit for `pipe`; raises `DiffsampError` for a pipeline whose kernel has no mask."""
        stock = pipe.scheduler
        for name in (type(pipe).__name__, type(stock).__name__):
            if name in _REFUSED:
                raise DiffsampError(f"{name} cannot use a masked sampler: {_REFUSED[name]}")
        config = dict(stock.config)
        if "num_vec_classes" in config:  # VQ-Diffusion: the last class is the mask, logits are (B, V, L)
            gamma = config.get("gamma_cum_end", 1.0)
            if gamma < 0.9:
                raise DiffsampError(f"VQDiffusionScheduler with gamma_cum_end={gamma}: its kernel is mostly uniform")
            made: dict[str, Any] = {"mask_token_id": config["num_vec_classes"] - 1, "layout": "class_first"}
        else:
            made = {"mask_token_id": config.get("mask_token_id")}
            made |= {key: config[key] for key in ("block_length", "num_inference_steps") if key in config}
        return cls(**(made | options))

    def set_timesteps(
        self, num_inference_steps: int, temperature: Any = None, device: Any = None, block_length: int | None = None
    ) -> None:
        """Number of steps; `temperature` is Amused's choice temperature and matters to no unbiased rule."""
        if num_inference_steps < 1:
            raise DiffsampError(f"num_inference_steps={num_inference_steps} must be at least 1")
        self.num_inference_steps = int(num_inference_steps)
        self.timesteps = torch.arange(self.num_inference_steps, device=device).flip(0)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        starting_mask_ratio: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        mask_token_id: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: Tensor | None = None,
    ) -> MaskedSchedulerOutput | tuple[Tensor, ...]:
        """Reveal this step's share of the masks in `sample`; every other token is returned as it is.

        Args:
            model_output: logits or log-probabilities, in any of the three layouts. sample: int64 (B, L) or (B, H, W).
            timestep: counts down to 0, or up within a block when LLaDA2 passes `mask_token_id`.
            threshold, editing_threshold, minimal_topk: accepted for LLaDA2's call; committed tokens are final here.
        """
        blockwise = mask_token_id is not None
        mask_id = mask_token_id if blockwise else self.config.mask_token_id
        if mask_id is None:
            raise DiffsampError("mask_token_id is missing; pass it to MaskedScheduler")
        x = sample.reshape(sample.shape[0], -1)
        logits = self._class_last(model_output, x)
        number = int(timestep)
        left = max(1, self.num_inference_steps - number if blockwise else number + 1)
        draw = (
            Draw(
                1.0 if temperature is None or sampling_method == "greedy" else temperature,
                top_k,
                top_p,
                self.config.precision,
            )
            if blockwise
            else Draw(self.config.temperature, self.config.top_k, self.config.top_p, self.config.precision)
        )
        if blockwise and (sampling_method == "greedy" or temperature == 0):
            draw = Draw(0.0, top_k, top_p, self.config.precision)
        if not bool((x == mask_id).any()):
            after = x
        elif self.config.counting == "cosine" and not blockwise:
            # MaskGIT's counts: with j of N calls left, ceil of L cos(pi (N - j + 1) / 2N) stay masked.
            after = self._reveal(
                x, logits, mask_id, self._cosine_steps(x, mask_id, left, starting_mask_ratio), draw, generator
            )
        else:
            after = self._reveal(x, logits, mask_id, FirstHitting(steps=left), draw, generator)
        transfer = (after != x).reshape(sample.shape)
        prev = after.reshape(sample.shape)
        logp = masked_log_probabilities(logits, torch.ones_like(x, dtype=torch.bool), mask_id)
        inside = after.clamp(0, logp.shape[-1] - 1)
        probability = logp.gather(-1, inside[..., None])[..., 0].exp().reshape(sample.shape)
        best = torch.where(after == mask_id, logp.argmax(-1), after).reshape(sample.shape)
        if not return_dict:
            return prev, transfer, torch.zeros_like(transfer), best, probability, model_output
        return MaskedSchedulerOutput(prev, best, transfer, torch.zeros_like(transfer), best, probability, model_output)

    def _reveal(self, x: Tensor, logits: Tensor, mask_id: int, sampler: Any, draw: Draw, generator: Any) -> Tensor:
        state: MaskedState = init(
            sampler,
            x,
            mask_id=mask_id,
            order_rule=self.config.order_rule,
            generator=generator,
            draw_options=draw,
            record_entropy=False,
        )
        rows = state.active
        index = torch.from_numpy(rows).to(x.device)
        positions, tokens, _ = _by_score(
            state, lambda ids, t, rows: logits[rows], x[index], torch.zeros(len(rows), dtype=torch.float64), rows, index
        )
        after = x.clone()
        at = positions.to(x.device)
        after[at[:, 0], at[:, 1]] = tokens.to(x.device)
        return after

    def _cosine_steps(self, x: Tensor, mask_id: int, left: int, starting_mask_ratio: float) -> _Count:
        masked = (x == mask_id).sum(1).cpu().numpy()
        done = self.num_inference_steps - left + 1
        stay = np.floor(x.shape[1] * np.cos(np.pi / 2 * done / self.num_inference_steps) * starting_mask_ratio)
        count = masked if left == 1 else masked - np.clip(stay, 1, np.maximum(masked - 1, 0)).astype(np.int64)
        return _Count(count)

    def _class_last(self, logits: Tensor, x: Tensor) -> Tensor:
        """Logits as (B, L, V)."""
        if logits.ndim == 4:
            return logits.flatten(2).transpose(1, 2)
        layout = self.config.layout
        if layout == "auto":
            layout = "class_last" if logits.shape[1] == x.shape[1] else "class_first"
        logits = logits.transpose(1, 2) if layout == "class_first" else logits
        if logits.ndim != 3 or logits.shape[:2] != x.shape:
            raise DiffsampError(
                f"model_output of shape {tuple(logits.shape)} does not fit a sample of {tuple(x.shape)}"
            )
        return logits

    def add_noise(self, sample: Tensor, timesteps: Any, generator: torch.Generator | None = None) -> Tensor:
        """Mask each token with the probability of `timesteps` on the linear schedule (Amused img2img)."""
        number = int(torch.as_tensor(timesteps).reshape(-1)[0])
        ratio = (number + 1) / self.num_inference_steps
        device = generator.device if generator is not None else sample.device
        u = torch.rand(sample.shape, generator=generator, device=device, dtype=torch.float64).to(sample.device)
        return sample.masked_fill(u < ratio, self.config.mask_token_id)

    @staticmethod
    def check_eos_finished(
        cur_x: Tensor,
        sampled_tokens: Tensor,
        final_transfer: Tensor,
        finished: Tensor,
        eos_token_id: int,
        mask_token_id: int,
        prompt_length: int,
    ) -> Tensor:
        """Rows whose new text holds the end token with no mask before it (LLaDA2)."""
        new = cur_x[:, prompt_length:]
        ended = (new == eos_token_id).any(1)
        first = (new == eos_token_id).int().argmax(1)
        before = torch.arange(new.shape[1], device=new.device) < first[:, None]
        return finished | (ended & ~((new == mask_token_id) & before).any(1))

    def check_block_should_continue(
        self,
        step_idx: int,
        masks_remaining: bool,
        editing_enabled: bool,
        editing_transfer_index: Tensor,
        post_steps: int,
        max_post_steps: int,
        finished: Tensor,
    ) -> bool:
        """Whether LLaDA2's loop goes on with its block: while there is something to reveal."""
        return bool(masks_remaining) and not bool(finished.all()) and step_idx < self.num_inference_steps


@dataclass(frozen=True)
class _Count:
    """A sampler of one call that reveals given counts."""

    counts: np.ndarray

    def events(self, masked: np.ndarray, seeds: np.ndarray) -> Events:
        return Events(np.minimum(self.counts, masked)[:, None], np.zeros((masked.size, 1)))


# A saved pipeline names the package that diffusers should import.
MaskedScheduler.__module__ = "diffsamp"
__all__ = ["MaskedScheduler", "MaskedSchedulerOutput"]
