"""Rewards as further weight functions of the same machinery: tilted marginals, Feynman-Kac steering, twisted diffusion.

A reward is ``reward(x) -> (batch,)``. :class:`Tilt` evaluates it at the noisy sample xt = x/alpha; the other two at the
predicted x0, which is why they need no derivative in time and are exact for the discrete sampler at any step size.

Sources: Skreta et al. 2025, arXiv:2503.02819, Proposition 3.4 (tilt); Singhal et al. 2025, arXiv:2501.06848 (steering);
Wu et al. 2023, arXiv:2306.17775 (twisted diffusion).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import DiffsampError
from .rewards import decoded

Reward = Callable[[torch.Tensor], torch.Tensor]


def evaluate(reward: Reward, x: torch.Tensor, gradient: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(values float64 of shape (batch,), gradient, shape of x, or None). DiffsampError for NaN or a wrong shape."""
    with torch.set_grad_enabled(gradient):
        leaf = x.detach().requires_grad_(gradient)
        values = reward(leaf)
        if not isinstance(values, torch.Tensor) or tuple(values.shape) != (x.shape[0],):
            shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise DiffsampError(f"reward: returned {shape}; must be one number per sample, shape ({x.shape[0]},)")
        slope = torch.autograd.grad(values.sum(), leaf)[0] if gradient else None
    values = values.detach().to(torch.float64)
    if bool(torch.isnan(values).any()):
        raise DiffsampError(f"reward: returned NaN for sample {int(torch.isnan(values).nonzero()[0])}; needs a number")
    return values, slope


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise DiffsampError(f"scale: got {scale}; must be a finite number")


def seen(potential: Steering | Twist) -> Reward:
    """The reward as a function of the predicted x0: of its picture where decoding is asked for."""
    if potential.decode is True:
        raise DiffsampError("decode: True is the VAE of a pipeline and there is none here; give the VAE, decode=vae")
    return potential.reward if potential.decode is False else decoded(potential.reward, potential.decode)


def with_vae(potential: Potential | None, vae: Any) -> Potential | None:
    """The potential with ``decode=True`` replaced by a pipeline's VAE."""
    if not isinstance(potential, Steering | Twist) or potential.decode is not True:
        return potential
    if vae is None:
        raise DiffsampError("decode: True is the VAE of the pipeline and this one has none; leave it out")
    return replace(potential, decode=vae)


def _check_decode(decode: Any) -> None:
    if not isinstance(decode, bool) and not callable(getattr(decode, "decode", None)):
        raise DiffsampError(f"decode: got {type(decode).__name__}; accepted: False, True (the pipeline's), or a VAE")


@dataclass(frozen=True)
class Tilt:
    """p_s ∝ q_s·exp(beta(s)·r(xt)), beta log-linear from 0 at ``s_max`` to ``scale`` at ``s_min``.

    The samples are moved by the gradient of r, which may be evaluated at any noise level.
    """

    reward: Reward
    scale: float = 1.0
    s_min: float = 0.02
    s_max: float = 20.0

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not 0 < self.s_min < self.s_max:
            raise DiffsampError(f"s_min, s_max: got {self.s_min}, {self.s_max}; needs 0 < s_min < s_max")

    def beta(self, s: float) -> float:
        """The tilt at noise-to-signal s."""
        share = math.log(self.s_max / max(s, self.s_min)) / math.log(self.s_max / self.s_min)
        return self.scale * min(max(share, 0.0), 1.0)


@dataclass(frozen=True)
class Steering:
    """p(x0)·exp(scale·r(x0)) by potentials of r at the predicted x0, the sampler's own moves.

    ``kind``: ``difference`` telescopes; ``maximum`` and ``sum`` weigh a path by its best or its total reward and settle
    the account at the end. Weights that are not used by a resampling are carried, so all three are exact.

    ``decode``: give the reward pictures and not latents: True for the VAE of the pipeline, or a VAE.
    """

    reward: Reward
    scale: float = 1.0
    kind: str = "difference"
    decode: Any = False

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        _check_decode(self.decode)
        if self.kind not in ("difference", "maximum", "sum"):
            raise DiffsampError(f"kind: got {self.kind!r}; accepted: difference, maximum, sum")


@dataclass(frozen=True)
class Twist:
    """p(x0)·exp(scale·r(x0)) with moves along the gradient of r at the predicted x0 and exact discrete weights.

    The gradient is taken at x0 and carried to x by dx0/dx ≈ alpha/(alpha² + sigma²), the Jacobian of a unit Gaussian,
    so that no pass back through the network is needed. Any shift is a valid proposal: the weights stay exact.
    ``decode`` as for :class:`Steering`; the gradient then goes back through the VAE's decoder.
    """

    reward: Reward
    scale: float = 1.0
    decode: Any = False

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        _check_decode(self.decode)


Potential = Tilt | Steering | Twist
