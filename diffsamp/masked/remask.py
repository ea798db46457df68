"""Samplers that may mask a token again: ReMDM and P2.

Remasking repairs mistakes of the model, not of the discretisation: with exact conditionals it does not help. Both see
the network at most once a step; a step in which nothing would change makes no call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffsamp.errors import DiffsampError
from diffsamp.masked.denoisers import Denoiser, call
from diffsamp.masked.events import Events, positive
from diffsamp.masked.orders import best
from diffsamp.masked.randomness import LEVELS, SECOND, hashed_uniforms
from diffsamp.masked.sampler import (
    MaskedState,
    check_width,
    commit,
    draw_at,
    masked_log_probabilities,
    random_order,
)
from diffsamp.masked.schedules import MaskSchedule, schedule


@dataclass(frozen=True)
class ReMDM:
    """Ancestral steps in which a revealed token is masked again with probability sigma.

    From t to s a mask becomes a token with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), and a revealed
    token becomes a mask with probability sigma <= min(1, (1 - alpha_s) / alpha_t).

    Args:
        steps: N. strategy: "cap" sigma = min(eta, max), "rescale" eta max, "conf" softmax over the row of minus the
            probability at which each token was drawn, times eta max. eta: in [0, 1]; 0 is ancestral sampling, with
            the tokens that `CountFirst(steps)` has for the same seeds.
        loop: None, or (t_on, t_off): remask only at t in [t_off, t_on], as a loop at the constant level of t_on
            that takes half of the steps.

    Source: Wang et al. 2025, arXiv:2503.00307.
    """

    steps: int
    strategy: str = "rescale"
    eta: float = 0.02
    schedule: str | MaskSchedule = "linear"
    loop: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.strategy not in ("cap", "rescale", "conf"):
            raise DiffsampError(f"strategy={self.strategy!r} is not known; accepted: cap, rescale, conf")
        if not 0 <= self.eta <= 1:
            raise DiffsampError(f"eta={self.eta} must be between 0 and 1")
        positive("steps", self.steps)
        if self.loop is not None and not 0 < self.loop[1] <= self.loop[0] < 1:
            raise DiffsampError(f"loop={self.loop} must be (t_on, t_off) with 0 < t_off <= t_on < 1")

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """(times (N + 1,), which of the N steps may remask)."""
        if self.loop is None or self.steps < 4:
            return np.linspace(1.0, 0.0, self.steps + 1), np.ones(self.steps, bool)
        on = self.loop[0]
        inner = self.steps // 2
        first = max(1, round((self.steps - inner) * (1 - on)))
        last = self.steps - inner - first
        times = np.concatenate([np.linspace(1, on, first + 1), np.full(inner, on), np.linspace(on, 0, last + 1)[1:]])
        active = np.zeros(self.steps, bool)
        active[first : first + inner] = True
        return times, active

    def events(self, masked: np.ndarray, seeds: np.ndarray) -> Events:
        """Times only: the sizes depend on what is masked again."""
        times = np.broadcast_to(self.grid()[0][:-1], (masked.size, self.steps))
        return Events(np.zeros((masked.size, self.steps), np.int64), times)

    def finished(self, state: MaskedState) -> bool:
        """After the last step, or without anything to fill at all."""
        return state.event >= self.steps or not bool(state.free.any())

    def advance(self, state: MaskedState, denoiser: Denoiser) -> MaskedState:
        """One step of the grid."""
        times, active = self.grid()
        curve, i = schedule(self.schedule), state.event
        a_t, a_s = curve.alpha(times[i]).item(), curve.alpha(times[i + 1]).item()
        if i == self.steps - 1:
            a_s = 1.0  # what m(0) > 0 would leave is decoded here
        cap = min(1.0, (1 - a_s) / a_t) if a_t > 0 else 1.0
        sigma = 0.0
        if active[i]:
            sigma = min(self.eta, cap) if self.strategy == "cap" else self.eta * cap
        masked, shown = state.masked, state.free & (state.x != state.mask_id)
        length, device = state.x.shape[1], state.x.device
        if state.waiting is None:
            waiting = torch.from_numpy(first_waiting(state.seeds, state.free)).to(device)
            state = replace(state, waiting=waiting, turns=np.zeros(len(state.seeds), np.int64))
        assert state.waiting is not None and state.turns is not None
        # A mask falls where its number, uniform in [0, 1), reaches the probability of staying; below it is stretched.
        stay = max((1 - a_s - sigma * a_t) / (1 - a_t), 0.0) if a_t < 1 else 1.0
        unmask = masked & (state.waiting >= stay)
        waiting = state.waiting / stay if stay > 0 else state.waiting
        remask = torch.zeros_like(masked)
        if sigma > 0:
            rate = torch.full(masked.shape, sigma, dtype=torch.float64, device=device)
            if self.strategy == "conf" and state.confidence is not None:
                weight = (-state.confidence).masked_fill(~shown, -torch.inf).softmax(-1)
                rate = (weight.nan_to_num(0.0) * sigma).clamp(max=cap)
            u = torch.from_numpy(hashed_uniforms(state.seeds, SECOND + i, 2 * length)).to(device)
            remask = shown & (u[:, :length] < rate)
            waiting = torch.where(remask, u[:, length:], waiting)
        before = state.x  # what the network sees: the sequence without this step's changes
        x = before.masked_fill(remask, state.mask_id)
        state = replace(
            state,
            x=x,
            waiting=waiting,
            step_of=state.step_of.masked_fill(remask, -1),
            revealed=state.revealed - remask.sum(1).cpu().numpy(),
        )
        rows = unmask.any(1).nonzero()[:, 0]
        if not len(rows):
            return replace(state, event=i + 1)
        t = torch.full((len(rows),), times[i], dtype=torch.float64, device=x.device)
        logits = call(denoiser, before[rows], t, None, rows)
        check_width(logits, state)
        where = unmask.nonzero()
        local = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        local[rows] = torch.arange(len(rows), device=x.device)
        flat = logits[local[where[:, 0]], where[:, 1]]
        tokens = draw_at(state, flat, where.cpu())
        assert state.turns is not None
        turns = state.turns.copy()
        turns[rows.cpu().numpy()] += 1
        state = replace(commit(state, rows.cpu().numpy(), where.cpu(), tokens, None), turns=turns)
        p = flat.softmax(-1, dtype=torch.float64).gather(-1, tokens[:, None])[:, 0]
        confidence = state.confidence if state.confidence is not None else torch.ones(x.shape, dtype=torch.float64)
        confidence = confidence.to(x.device).clone()
        confidence[where[:, 0], where[:, 1]] = p
        return replace(state, confidence=confidence)


def first_waiting(seeds: np.ndarray, free: Tensor) -> np.ndarray:
    """The levels of `CountFirst`, the highest at the first position of the random order; float64 (B, L)."""
    order = random_order(seeds, free)
    count = free.sum(1, keepdim=True).cpu().numpy()
    level = np.where(np.arange(order.shape[1]) < count, hashed_uniforms(seeds, LEVELS, order.shape[1]), -1.0)
    waiting = np.zeros(free.shape)
    np.put_along_axis(waiting, order, -np.sort(-level, axis=1), 1)
    return waiting


@dataclass(frozen=True)
class P2:
    """Path planning: all masks are drawn, then the least probable tokens, also earlier ones, are masked again.

    After call i of N the (1 - kappa) n lowest of the n free positions are masked, kappa = i/N. The score of a new
    token is log p, of an earlier one eta log p; eta = 0 never masks an earlier token.

    Source: Peng et al. 2025, arXiv:2502.03540.
    """

    steps: int
    eta: float = 1.0

    def __post_init__(self) -> None:
        positive("steps", self.steps)
        if not self.eta >= 0:
            raise DiffsampError(f"eta={self.eta} must be at least 0")

    def events(self, masked: np.ndarray, seeds: np.ndarray) -> Events:
        """Times only."""
        times = np.broadcast_to(np.linspace(1, 0, self.steps + 1)[:-1], (masked.size, self.steps))
        return Events(np.zeros((masked.size, self.steps), np.int64), times)

    def finished(self, state: MaskedState) -> bool:
        """After the last step; without earlier tokens to reconsider also when nothing is masked."""
        return state.event >= self.steps or not bool((state.masked if self.eta == 0 else state.free).any())

    def advance(self, state: MaskedState, denoiser: Denoiser) -> MaskedState:
        """One call."""
        i, x = state.event, state.x
        rows = torch.arange(x.shape[0], device=x.device)
        t = torch.full((x.shape[0],), 1 - i / self.steps, dtype=torch.float64, device=x.device)
        logits = call(denoiser, x, t, None, rows)
        check_width(logits, state)
        masked, where = state.masked, state.masked.nonzero()
        filled = x.clone()
        if len(where):
            filled[where[:, 0], where[:, 1]] = draw_at(state, logits[where[:, 0], where[:, 1]], where.cpu())
        logp = masked_log_probabilities(logits, state.free, state.mask_id)
        score = logp.gather(-1, filled.clamp(0, logp.shape[-1] - 1)[..., None])[..., 0]
        score = torch.where(masked, score, self.eta * score.clamp_min(-1e30))
        count = state.free.sum(1)
        hide = count - (count * (i + 1)).div(self.steps, rounding_mode="floor")
        if i == self.steps - 1:
            hide = torch.zeros_like(count)
        if self.eta == 0:  # earlier tokens are out of reach, whatever the new ones score
            again = best(-score, masked, hide)
        else:
            again = best(-score, state.free, hide)
        after = torch.where(again, state.mask_id, filled)
        new = state.free & (after != state.mask_id)
        step_of = torch.where(new & (masked | (state.step_of < 0)), i, state.step_of).masked_fill(again, -1)
        return replace(
            state, x=after, step_of=step_of, revealed=new.sum(1).cpu().numpy(), event=i + 1, calls=state.calls + 1
        )
