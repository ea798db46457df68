"""Targets: powers of several densities, p_s ∝ Π q_{i,s}^{b_i}, and what each asks of a step.

In the variance clock (xt = x/alpha, s = sigma/alpha) with scores s_i, mix m = Σ b_i s_i and B = Σ b_i, one formula
holds for all of them and does not depend on the noise that is injected:

    d log w = h/2·(|m|² − Σ b_i |s_i|²),   h = s0² − s1²

With epsilon_i = −s·s_i and Q = s²·(|m|² − Σ b_i|s_i|²) the step is (1 − s1²/s0²)/2·Q (left point) or
log(s0/s1)·(Q0 + Q1)/2 (trapezoid).

Source: Skreta et al. 2025, "Feynman-Kac Correctors in Diffusion", arXiv:2503.02819, Propositions 3.1 to 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import DiffsampError
from ..process import Level


@dataclass(frozen=True)
class Target:
    """Π q_i^{b_i}. ``powers`` holds b in the order in which the denoiser returns its predictions.

    Attributes:
        powers: one finite number per prediction; their sum must be above 0, or there is no such density at high noise.
        name: for messages.
    """

    powers: tuple[float, ...]
    name: str = "target"

    def __post_init__(self) -> None:
        object.__setattr__(self, "powers", tuple(float(b) for b in self.powers))
        if not self.powers or not all(math.isfinite(b) for b in self.powers):
            raise DiffsampError(f"powers: got {list(self.powers)}; needs at least one finite number")
        if not self.total > 0:
            raise DiffsampError(f"powers: got {list(self.powers)}, which sum to {self.total:g}; needs a sum above 0")

    @property
    def conditions(self) -> int:
        """How many predictions the denoiser must return."""
        return len(self.powers)

    @property
    def total(self) -> float:
        """B = Σ b; at high noise the target is a Gaussian of variance s²/B, so the start noise is scaled by 1/√B."""
        total = math.fsum(self.powers)
        return 1.0 if abs(total - 1.0) < 1e-12 else total

    @property
    def trivial(self) -> bool:
        """One prediction to the power 1: the plain sampler, no weights."""
        return sorted(b for b in self.powers if b != 0.0) == [1.0]

    def mix(
        self, x0: Sequence[torch.Tensor], x: torch.Tensor, level: Level, gain: float | None = None
    ) -> torch.Tensor:
        """The x0 prediction whose score is Σ b_i s_i: Σ b_i x0_i + (1 − B)·x/alpha, shape of ``x``.

        ``gain`` takes the place of B, with the mean Σ b_i x0_i/B as it is: how far a long step goes towards it.
        """
        used = [(b, d) for b, d in zip(self.powers, x0, strict=True) if b != 0.0]
        total = used[0][1] if used[0][0] == 1.0 else used[0][1] * used[0][0]
        for b, d in used[1:]:
            total = torch.add(total, d, alpha=b)
        if self.total == 1.0:
            return total
        gain = self.total if gain is None else gain
        return torch.add(total * (gain / self.total), x, alpha=(1.0 - gain) / level.alpha)

    def rate(self, x0: Sequence[torch.Tensor], x: torch.Tensor, level: Level) -> torch.Tensor:
        """Q = |Σ b eps_i|² − Σ b|eps_i|², float64 of shape (batch,).

        Written as (B − 1) Σ b_i|eps_i|² − Σ_{i<j} b_i b_j |eps_i − eps_j|², which does not cancel in float32.
        """
        value = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        used = [(b, d) for b, d in zip(self.powers, x0, strict=True) if b != 0.0]
        ratio = level.alpha / level.sigma
        if self.total != 1.0:
            for b, d in used:
                value += (self.total - 1.0) * b * _square((x - level.alpha * d) / level.sigma)
        for i, (b, d) in enumerate(used):
            for c, e in used[i + 1 :]:
                value -= b * c * ratio * ratio * _square(d - e)
        return value


def _square(value: torch.Tensor) -> torch.Tensor:
    return value.flatten(1).to(torch.float64).square().sum(1)


def annealed(beta: float) -> Target:
    """p^beta; the denoiser returns one prediction."""
    if not (math.isfinite(beta) and beta > 0):
        raise DiffsampError(f"beta: got {beta}; must be a finite number above 0")
    return Target((beta,), f"anneal(beta={beta:g})")


def product(n: int = 2, power: float = 1.0) -> Target:
    """(q_1 ··· q_n)^power: product of experts, or with power 1/n their geometric average."""
    if n < 2:
        raise DiffsampError(f"n: got {n}; a product needs 2 or more")
    return Target((power,) * n, f"product(n={n}, power={power:g})")


def cfg(guidance_scale: float, beta: float = 1.0) -> Target:
    """(q_c^w·q_u^{1−w})^beta: what guidance claims to sample; predictions (conditional, unconditional)."""
    w = float(guidance_scale)
    return Target((beta * w, beta * (1.0 - w)), f"cfg(w={w:g}, beta={beta:g})")


def composed(scales: Sequence[float], beta: float = 1.0) -> Target:
    """Guidance on several conditions, (Π q_i^{w_i}·q_u^{1−Σw})^beta; predictions (c_1, ..., c_n, unconditional).

    Scales of 1 give the product of conditions, p(x|c_1)···p(x|c_n)/p(x)^{n−1} ∝ p(x|c_1 and ... c_n).
    """
    powers = [beta * float(w) for w in scales]
    return Target((*powers, beta - math.fsum(powers)), f"composed(w={'+'.join(f'{w:g}' for w in scales)})")
