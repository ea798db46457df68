"""Masked sampling as `init / step / info`: an explicit state, one network call per step.

    state = init(FirstHitting(), x, mask_id=1024, seeds=[0, 1])
    while not state.done:
        state = step(state, denoiser)
    tokens, facts = state.x, info(state)

`sample` runs the loop. Rows have clocks of their own: a batch makes as many calls as its busiest row has events, never
more than its largest number of masks. Tokens that are not the mask at the start are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsamp.errors import DiffsampError
from diffsamp.masked.categorical import PRECISIONS, draw
from diffsamp.masked.denoisers import Denoiser, call
from diffsamp.masked.events import CountFirst, Events, FirstHitting
from diffsamp.masked.filters import check_filters
from diffsamp.masked.orders import Order, SampleThenChoose, best, entropy, order
from diffsamp.masked.randomness import PERMUTATION, SECOND, TOKENS, hashed_uniforms, row_seeds


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn: see `sample_categorical`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    precision: str = "safe"

    def __post_init__(self) -> None:
        check_filters(self.temperature, self.top_k, self.top_p)
        if self.precision not in PRECISIONS:
            raise DiffsampError(f"precision={self.precision!r} is not known; accepted: {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class MaskedState:
    """Everything that a run knows between two calls of the network.

    Attributes:
        x: int64 (B, L), the tokens so far. free: bool (B, L), positions that were masked at the start.
        seeds: int64 (B,). sizes, times, token_times: see `Events`. permutation: int64 (B, n), the random order.
        event: number of the next event. revealed: int64 (B,), tokens revealed so far. calls: network calls so far.
        step_of: int64 (B, L), the event that revealed a position; -1 for a given or still masked one.
        entropies: per call, mean entropy in nats of the predictions that were drawn from.
        previous: predictions (A, K, V) of the last call for the positions of the coming event (extrapolation).
        confidence: float64 (B, L), probability with which a token was drawn (remasking samplers).
        waiting: float64 (B, L), what decides when a masked position falls (ReMDM). turns: int64 (B,), calls that
            drew a token of the row (ReMDM).
        uniforms: float64 (B, n, 2), the numbers of the token draws in the order of `permutation`.
    """

    sampler: Any
    rule: Order | SampleThenChoose
    draw: Draw
    mask_id: int
    x: Tensor
    free: Tensor
    seeds: np.ndarray
    masks: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    token_times: np.ndarray | None
    permutation: np.ndarray | None
    event: int = 0
    calls: int = 0
    revealed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    step_of: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    entropies: tuple[float, ...] = ()
    record_entropy: bool = True
    previous: Tensor | None = None
    confidence: Tensor | None = None
    waiting: Tensor | None = None
    turns: np.ndarray | None = None
    uniforms: np.ndarray | None = None

    @property
    def masked(self) -> Tensor:
        """Bool (B, L): positions that are masked now."""
        return self.free & (self.x == self.mask_id)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.sampler.finished(self) if hasattr(self.sampler, "finished") else not self.active.size

    @property
    def active(self) -> np.ndarray:
        """Rows with something to reveal at this event."""
        if self.rule.adaptive:
            return np.flatnonzero(self.revealed < self.masks)
        if self.event >= self.sizes.shape[1]:
            return np.zeros(0, np.int64)
        return np.flatnonzero(self.sizes[:, self.event] > 0)


def init(
    sampler: Any,
    x: Tensor,
    *,
    mask_id: int,
    order_rule: str | Order | SampleThenChoose = "random",
    seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    draw_options: Draw | None = None,
    record_entropy: bool = True,
) -> MaskedState:
    """State before the first call.

    Args:
        sampler: `FirstHitting`, `CountFirst`, `ReMDM` or `P2`.
        x: int64 (B, L); every `mask_id` in it is a hole to fill, everything else is frozen.
        order_rule: see `diffsamp.masked.orders`. seeds: one integer a row; else `generator`, one or one a row.
        record_entropy: keep the entropy of each call's predictions (costs a softmax of the drawn rows).
    """
    if not isinstance(x, Tensor) or x.ndim != 2 or x.dtype != torch.int64:
        raise DiffsampError(
            f"x must be an int64 tensor (B, L); got {getattr(x, 'dtype', type(x).__name__)}, "
            f"shape {tuple(getattr(x, 'shape', ()))}"
        )
    if isinstance(mask_id, bool) or not isinstance(mask_id, (int, np.integer)):
        raise DiffsampError(f"mask_id={mask_id!r} must be the integer id of the mask token")
    rule = order(order_rule)
    if isinstance(sampler, type) or not hasattr(sampler, "events"):
        raise DiffsampError(f"sampler={sampler!r:.60} must be a sampler, such as FirstHitting() or CountFirst(64)")
    if hasattr(sampler, "advance") and rule != Order("random"):
        raise DiffsampError(f"order={rule.name!r}: {type(sampler).__name__} chooses the positions itself; leave it out")
    if getattr(sampler, "extrapolate", False) and (
        rule != Order("random") or (draw_options or Draw()).temperature == 0
    ):
        raise DiffsampError("extrapolate=True needs order 'random' and a temperature above 0")
    if rule.adaptive and not isinstance(sampler, FirstHitting):
        raise DiffsampError(f"order={rule.name!r} decides the counts itself; use it with FirstHitting")
    free = x == mask_id
    masks = free.sum(1).cpu().numpy()
    keys = row_seeds(x.shape[0], seeds, generator)
    planned: Events = sampler.events(masks, keys)
    permutation = uniforms = None
    if rule == Order("random") and not hasattr(sampler, "advance"):
        permutation = random_order(keys, free)
        if (draw_options or Draw()).precision == "safe":
            uniforms = planned_uniforms(keys, planned.sizes, permutation)
    return MaskedState(
        sampler,
        rule,
        draw_options or Draw(),
        int(mask_id),
        x.clone(),
        free,
        keys,
        masks,
        planned.sizes,
        planned.times,
        planned.token_times,
        permutation,
        revealed=np.zeros_like(masks),
        step_of=torch.full_like(x, -1),
        record_entropy=record_entropy,
        uniforms=uniforms,
    )


def planned_uniforms(seeds: np.ndarray, sizes: np.ndarray, permutation: np.ndarray) -> np.ndarray:
    """The numbers that `draw_at` would make for every token of the plan, float64 (B, n, 2) in order of revelation."""
    rows, most = permutation.shape
    event = np.zeros((rows, most), np.int64)
    event[np.arange(most) < sizes.sum(1)[:, None]] = np.repeat(np.tile(np.arange(sizes.shape[1]), rows), sizes.ravel())
    lanes = (2 * permutation[..., None] + np.arange(2)).reshape(rows, 2 * most)
    return hashed_uniforms(seeds, TOKENS + event.repeat(2, axis=1), lanes).reshape(rows, most, 2)


def random_order(seeds: np.ndarray, free: Tensor) -> np.ndarray:
    """Free positions of each row in random order, int64 (B, n), n the most of a row; frozen ones come last."""
    free_here = free.cpu().numpy()
    level = np.where(free_here, hashed_uniforms(seeds, PERMUTATION, free.shape[1]), 2.0)
    return level.argsort(axis=1)[:, : int(free_here.sum(1).max(initial=0))]


def step(state: MaskedState, denoiser: Denoiser) -> MaskedState:
    """One network call and what it reveals; a finished state is returned as it is."""
    if state.done:
        return state
    if hasattr(state.sampler, "advance"):
        return state.sampler.advance(state, denoiser)
    rows = state.active
    device = state.x.device
    index = torch.from_numpy(rows).to(device)
    x = state.x.clone() if len(rows) == len(state.x) else state.x[index]
    t = torch.from_numpy(_time(state, rows)).to(device)
    if state.permutation is not None:
        positions, tokens, spread, previous = _in_random_order(state, denoiser, x, t, rows, index)
    else:
        positions, tokens, spread = _by_score(state, denoiser, x, t, rows, index)
        previous = None
    return commit(state, rows, positions, tokens, spread, previous)


def _time(state: MaskedState, rows: np.ndarray) -> np.ndarray:
    if not state.rule.adaptive:
        return state.times[rows, state.event]
    assert state.token_times is not None
    return state.token_times[rows, state.revealed[rows]]


def _in_random_order(
    state: MaskedState, denoiser: Denoiser, x: Tensor, t: Tensor, rows: np.ndarray, index: Tensor
) -> tuple[Tensor, Tensor, float | None, Tensor | None]:
    """(positions (R, 2), tokens (R,), mean entropy, predictions for the next event)."""
    assert state.permutation is not None
    sizes, extrapolate = state.sizes[rows, state.event], getattr(state.sampler, "extrapolate", False)
    width, last = int(sizes.max()), state.permutation.shape[1] - 1
    lanes = np.minimum(state.revealed[rows, None] + np.arange(width), last)
    at = state.permutation[rows[:, None], lanes]
    asked = at
    if extrapolate and state.event + 1 < state.sizes.shape[1]:
        ahead = np.arange(int(state.sizes[rows, state.event + 1].max()))
        following = np.minimum((state.revealed[rows] + sizes)[:, None] + ahead, last)
        asked = np.concatenate([at, state.permutation[rows[:, None], following]], 1)
    logits = call(denoiser, x, t, torch.from_numpy(asked).to(x.device), index)
    check_width(logits, state)
    previous = None
    if extrapolate:
        logits, previous = _extrapolated(state, logits, rows, lanes, width)
    flat, numbers = logits[:, :width].flatten(0, 1), state.uniforms
    chosen = np.stack([rows.repeat(width), at.ravel()], 1)
    if numbers is not None:
        numbers = numbers[rows[:, None], lanes].reshape(-1, 2)
    if int(sizes.min()) < width:
        valid = np.flatnonzero(np.arange(width) < sizes[:, None])
        flat, chosen = flat[torch.from_numpy(valid).to(x.device)], chosen[valid]
        numbers = None if numbers is None else numbers[valid]
    positions = torch.from_numpy(chosen)
    return positions, draw_at(state, flat, positions, numbers), _mean_entropy(state, flat), previous


def _extrapolated(
    state: MaskedState, logits: Tensor, rows: np.ndarray, lanes: np.ndarray, width: int
) -> tuple[Tensor, Tensor | None]:
    """Second-order prediction for the tokens of this event, and the plain one for those of the next.

    q_j = mu + w_j (mu - mu_before), w_j = (tau_j - tau) / (tau - tau_before) within [0, 2]: linear interpolation in
    time through the last two calls, in the probability domain (log-probabilities gave no better results).
    """
    assert state.token_times is not None
    banned = logits
    if 0 <= state.mask_id < logits.shape[-1]:
        banned = logits.clone()
        banned[..., state.mask_id] = -torch.inf
    mu = banned.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    now, following = mu[:, :width], mu[:, width:]
    out = now.log()
    if state.previous is not None:
        tau = state.times[rows, state.event][:, None]
        before = state.times[rows, state.event - 1][:, None]
        ahead = np.take_along_axis(state.token_times[rows], lanes, 1) - tau
        w = np.clip(ahead / np.minimum(tau - before, -1e-300), 0.0, 2.0)
        earlier = state.previous[torch.from_numpy(rows).to(mu.device)][:, :width]
        weight = torch.from_numpy(w).to(mu.device, mu.dtype)[..., None]
        q = (now + weight * (now - earlier)).clamp_min(0)
        out = torch.where(weight > 0, q.log(), out)
    if not following.shape[1]:
        return out, None
    kept = mu.new_zeros(state.x.shape[0], following.shape[1], mu.shape[-1])
    kept[torch.from_numpy(rows).to(mu.device)] = following
    return out, kept


def _by_score(
    state: MaskedState, denoiser: Denoiser, x: Tensor, t: Tensor, rows: np.ndarray, index: Tensor
) -> tuple[Tensor, Tensor, float | None]:
    """Positions chosen from what the network says about all masked ones."""
    masked = state.masked[index]
    logits = call(denoiser, x, t, None, index)
    check_width(logits, state)
    counts = torch.ones(len(rows), dtype=torch.int64, device=x.device)
    if not state.rule.adaptive:
        counts = torch.from_numpy(state.sizes[rows, state.event]).to(x.device)
    if isinstance(state.rule, SampleThenChoose):
        return _legacy(state, logits, masked, counts, rows)
    logp = masked_log_probabilities(logits, masked, state.mask_id)
    if isinstance(state.rule, Order) and state.rule.name == "random":
        score = torch.from_numpy(hashed_uniforms(state.seeds[rows], SECOND + state.event, x.shape[1])).to(x.device)
        keep = best(score, masked, counts)
    else:
        keep = state.rule.choose(logp, masked, counts)
    where = keep.nonzero()
    flat = logits[where[:, 0], where[:, 1]]
    positions = torch.stack([index[where[:, 0]], where[:, 1]], 1).cpu()
    return positions, draw_at(state, flat, positions), _mean_entropy(state, flat)


def _legacy(
    state: MaskedState, logits: Tensor, masked: Tensor, counts: Tensor, rows: np.ndarray
) -> tuple[Tensor, Tensor, float | None]:
    where = masked.nonzero()
    flat = logits[where[:, 0], where[:, 1]]
    every = torch.stack([torch.from_numpy(rows).to(where.device)[where[:, 0]], where[:, 1]], 1).cpu()
    tokens = draw_at(state, flat, every)
    logp = masked_log_probabilities(flat[:, None], torch.ones_like(where[:, :1], dtype=torch.bool), state.mask_id)[:, 0]
    # The confidence is that of the distribution before temperature and filters, as in LLaDA.
    confidence = logp.gather(-1, tokens[:, None])[:, 0]
    assert isinstance(state.rule, SampleThenChoose)
    share = 1 - state.event / max(state.sizes.shape[1] - 1, 1)
    if state.rule.choice_temperature > 0 and share > 0:
        u = hashed_uniforms(state.seeds[rows], SECOND + state.event, masked.shape[1])
        gumbel = -np.log(-np.log1p(-np.clip(u, 2.0**-53, None)) + 1e-300)
        gumbel = torch.from_numpy(gumbel).to(confidence.device)[where[:, 0], where[:, 1]]
        confidence = confidence + state.rule.choice_temperature * share * gumbel
    score = torch.full(masked.shape, -torch.inf, dtype=confidence.dtype, device=masked.device)
    score[where[:, 0], where[:, 1]] = confidence
    keep = best(score, masked, counts)[where[:, 0], where[:, 1]]
    return every[keep.cpu()], tokens[keep], _mean_entropy(state, flat[keep])


def masked_log_probabilities(logits: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """log mu (B, L, V) without the mask class, in at least float32; rows that are not masked hold zeros."""
    rows = logits[masked]  # a copy, of what is needed only
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if 0 <= mask_id < rows.shape[-1]:
        rows[:, mask_id] = -torch.inf
    faulty = rows.amax(-1).isnan()
    if bool(faulty.any()):
        bad = masked.nonzero()[faulty][0].tolist()
        raise DiffsampError(f"logits: row {bad[0]}, position {bad[1]} holds NaN")
    out = torch.zeros(logits.shape, dtype=rows.dtype, device=rows.device)
    out[masked] = rows.log_softmax(-1)
    return out


def draw_at(state: MaskedState, logits: Tensor, positions: Tensor, numbers: np.ndarray | None = None) -> Tensor:
    """Tokens at `positions` (R, 2), row and position, from logits (R, V), by the numbers of (seed, event, position).

    `numbers` (R, 2), where they are known already, are those that precision "safe" asks for.
    """

    def source(shape: tuple[int, ...]) -> Tensor:
        if numbers is not None:
            return torch.from_numpy(numbers)
        rows, place = positions[:, 0].numpy(), positions[:, 1:].numpy()
        event = state.event if state.turns is None else state.turns[rows, None]
        u = hashed_uniforms(state.seeds[rows], TOKENS + event, place * shape[1] + np.arange(shape[1]))
        if state.draw.precision == "fp32":
            return torch.from_numpy(np.floor(u * 2.0**24) * 2.0**-24)
        return torch.from_numpy(u)

    d = state.draw
    return draw(
        logits,
        source,
        precision=d.precision,
        temperature=d.temperature,
        top_k=d.top_k,
        top_p=d.top_p,
        mask_id=state.mask_id,
    )


def commit(
    state: MaskedState,
    rows: np.ndarray,
    positions: Tensor,
    tokens: Tensor,
    spread: float | None,
    previous: Tensor | None = None,
) -> MaskedState:
    """State with `tokens` (R,) written at `positions` (R, 2)."""
    x, step_of = state.x.clone(), state.step_of.clone()
    if x.is_cpu:  # the same memory through NumPy, where writing a few numbers takes less
        at = tuple(positions.numpy().T)
        x.numpy()[at], step_of.numpy()[at] = tokens.numpy(), state.event
    else:
        at = positions.to(x.device).unbind(1)
        x[at], step_of[at] = tokens.to(x.device), state.event
    revealed = state.revealed + np.bincount(positions[:, 0].numpy(), minlength=x.shape[0])
    entropies = state.entropies if spread is None else (*state.entropies, spread)
    return replace(
        state,
        x=x,
        step_of=step_of,
        revealed=revealed,
        event=state.event + 1,
        calls=state.calls + 1,
        entropies=entropies,
        previous=previous,
    )


def check_width(logits: Tensor, state: MaskedState) -> None:
    """Raise unless every given token, other than mask and padding, is a class of the logits."""
    if state.calls == 0 and not bool(state.free.all()):
        highest = int(state.x.masked_fill(state.free, -1).max())
        if highest >= logits.shape[-1]:
            raise DiffsampError(f"logits are {logits.shape[-1]} wide, but token {highest} is in the given sequence")


def _mean_entropy(state: MaskedState, logits: Tensor) -> float | None:
    if not state.record_entropy:
        return None
    wide = logits.float()
    if 0 <= state.mask_id < wide.shape[-1]:
        wide = wide.clone()
        wide[..., state.mask_id] = -torch.inf
    return float(entropy(wide.log_softmax(-1)).mean())


def info(state: MaskedState) -> dict[str, Any]:
    """Facts of a run: network calls, order of revelation, entropies.

    Keys: "calls" (int); "revealed" (B,); "step_of" int64 (B, L), the call that revealed each position, -1 if given;
    "order" int64 (B, L), positions in the order of revelation, then -1; "entropy" per call, nats; "done".
    """
    when = state.step_of.masked_fill(~state.free | (state.step_of < 0), torch.iinfo(torch.int64).max)
    order_of = when.argsort(dim=1, stable=True)
    known = (state.free & (state.step_of >= 0)).sum(1, keepdim=True)
    order_of = order_of.masked_fill(torch.arange(when.shape[1], device=when.device) >= known, -1)
    return {
        "calls": state.calls,
        "revealed": state.revealed.copy(),
        "step_of": state.step_of.clone(),
        "order": order_of,
        "entropy": list(state.entropies),
        "done": state.done,
    }


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x: Tensor,
    *,
    mask_id: int,
    sampler: Any = None,
    order: str | Order | SampleThenChoose = "random",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    precision: str = "safe",
    seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    callback: Callable[[MaskedState], None] | None = None,
    record_entropy: bool = True,
) -> tuple[Tensor, dict[str, Any]]:
    """Fill the masks of `x`; arguments as for `init` and `sample_categorical`.

    `callback(state)` runs after every call. Returns the tokens, int64 (B, L), and `info`. A sequence without a mask is
    returned without any call. No gradients are recorded; a denoiser that needs them inside turns them on itself.
    """
    state = init(
        sampler or FirstHitting(),
        x,
        mask_id=mask_id,
        order_rule=order,
        seeds=seeds,
        generator=generator,
        draw_options=Draw(temperature, top_k, top_p, precision),
        record_entropy=record_entropy,
    )
    while not state.done:
        state = step(state, denoiser)
        if callback is not None:
            callback(state)
    return state.x, info(state)


__all__ = ["CountFirst", "Draw", "FirstHitting", "MaskedState", "commit", "info", "init", "sample", "step"]
