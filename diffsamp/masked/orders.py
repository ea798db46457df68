"""Which masked positions are revealed next.

A rule of the choose-then-sample kind looks at the predicted distributions, picks positions, and only then draws their
tokens: one token at a time it samples the model's own joint law, in a better order. The legacy kind ("maskgit", and
"low-confidence" of LLaDA) draws a token everywhere and keeps the most probable ones; that is biased towards likely
tokens at every number of steps, an implicit low temperature, and is here to reproduce published results.

Sources: confidence, margin (arXiv:2502.06768), entropy (Dream, DiffuCoder), entropy-bounded (arXiv:2505.24857),
threshold (Fast-dLLM), MaskGIT (arXiv:2202.04200), low-confidence (LLaDA, arXiv:2502.09992).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffsamp.errors import DiffsampError


def entropy(logp: Tensor) -> Tensor:
    """Entropy in nats of log-probabilities (..., V)."""
    return -(logp.exp() * logp.clamp_min(-1e30)).sum(-1)


@dataclass(frozen=True)
class Order:
    """A rule by name: "random", "confidence", "margin" or "entropy"."""

    name: str = "random"
    adaptive = False  # True: the rule itself decides how many positions

    def __post_init__(self) -> None:
        if self.name not in ("random", "confidence", "margin", "entropy"):
            raise DiffsampError(f"order={self.name!r} is not known; accepted: {', '.join(ORDERS)}")

    def score(self, logp: Tensor) -> Tensor:
        """Score (..., ) of positions from log-probabilities (..., V); the highest go first."""
        if self.name == "confidence":
            return logp.amax(-1)
        if self.name == "margin":
            if logp.shape[-1] < 2:
                return torch.zeros_like(logp[..., 0])
            first, second = logp.topk(2, dim=-1).values.exp().unbind(-1)
            return first - second
        return -entropy(logp)

    def choose(self, logp: Tensor, masked: Tensor, counts: Tensor) -> Tensor:
        """Positions to reveal, bool (B, L), from log-probabilities (B, L, V), masks (B, L) and counts (B,)."""
        return best(self.score(logp), masked, counts)


@dataclass(frozen=True)
class Threshold(Order):
    """All positions whose largest probability is above `threshold`, and at least one."""

    name: str = "threshold"
    threshold: float = 0.9
    adaptive = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise DiffsampError(f"threshold={self.threshold} must be between 0 and 1")

    def choose(self, logp: Tensor, masked: Tensor, counts: Tensor) -> Tensor:
        top = logp.amax(-1).exp()
        return (masked & (top > self.threshold)) | best(top, masked, counts.clamp(max=1))


@dataclass(frozen=True)
class EntropyBounded(Order):
    """The most certain positions U with sum of H - max of H at most gamma, and at least one; gamma in nats."""

    name: str = "entropy-bounded"
    gamma: float = 0.1
    adaptive = True

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise DiffsampError(f"gamma={self.gamma} must be at least 0")

    def choose(self, logp: Tensor, masked: Tensor, counts: Tensor) -> Tensor:
        h, index = entropy(logp).masked_fill(~masked, torch.inf).sort(dim=-1)
        # Sorted ascending, the largest of the first k is the k-th, so the bound is the running total before it.
        before = torch.cat([torch.zeros_like(h[:, :1]), h.cumsum(-1)[:, :-1]], -1)
        keep = (before <= self.gamma) & h.isfinite()
        return torch.zeros_like(masked).scatter(1, index, keep) & masked


@dataclass(frozen=True)
class SampleThenChoose:
    """The legacy rule: draw everywhere, keep the draws with the largest log p + T Gumbel; biased, see above.

    `choice_temperature` is the T of the first call and falls linearly to 0 at the last ("maskgit"); 0 throughout is
    LLaDA's "low-confidence" and the "maskgit_plus" of Dream.
    """

    name: str = "low-confidence"
    choice_temperature: float = 0.0
    adaptive = False


ORDERS = ("random", "confidence", "margin", "entropy", "entropy-bounded", "threshold", "maskgit", "low-confidence")


def order(rule: str | Order | SampleThenChoose) -> Order | SampleThenChoose:
    """A rule by name, or the given one."""
    if isinstance(rule, (Order, SampleThenChoose)):
        return rule
    made = {"entropy-bounded": EntropyBounded, "threshold": Threshold, "low-confidence": SampleThenChoose}
    if rule in made:
        return made[rule]()
    return SampleThenChoose("maskgit", 2.0) if rule == "maskgit" else Order(rule)


def best(score: Tensor, masked: Tensor, counts: Tensor) -> Tensor:
    """The `counts` (B,) masked positions of each row with the highest score, bool (B, L); ties go to the left."""
    ranked = score.masked_fill(~masked, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    # Masked positions may score minus infinity themselves, so rank them ahead of the rest explicitly.
    ranked = ranked.gather(1, masked.gather(1, ranked).logical_not().to(torch.int8).sort(dim=-1, stable=True).indices)
    keep = torch.arange(score.shape[1], device=score.device) < counts[:, None]
    return torch.zeros_like(masked).scatter(1, ranked, keep) & masked
