"""Masking schedules: m(t) = 1 - alpha(t), the probability that a token is masked at time t, with its inverse.

Time runs from 0 (clean) to 1 (all masked). Two different curves are called "cosine" in the literature; they have two
names here: "cosine" (MaskGIT, MD4, LLaDA-like) and "cosine_mdlm".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffsamp.errors import DiffsampError

Curve = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class MaskSchedule:
    """A masking probability m(t), increasing in t on [0, 1], and its inverse; both act on float64 arrays.

    `inverse` is clipped to [0, 1]: a schedule with m(0) > 0 can be asked for a level that it never reaches, and the
    tokens that are left there are decoded at time 0.
    """

    name: str
    masked: Curve
    inverse_of: Curve

    def m(self, t: np.ndarray | float) -> np.ndarray:
        """Masking probability at time t in [0, 1]."""
        return np.asarray(self.masked(np.asarray(t, dtype=np.float64)), dtype=np.float64)

    def alpha(self, t: np.ndarray | float) -> np.ndarray:
        """Survival probability 1 - m(t)."""
        return 1.0 - self.m(t)

    def inverse(self, m: np.ndarray | float) -> np.ndarray:
        """The time in [0, 1] at which the masking probability is m."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.asarray(self.inverse_of(np.asarray(m, dtype=np.float64)), dtype=np.float64)
        return np.clip(np.nan_to_num(t, nan=0.0, neginf=0.0, posinf=1.0), 0.0, 1.0)


def linear() -> MaskSchedule:
    """m(t) = t (LLaDA, MD4)."""
    return MaskSchedule("linear", lambda t: t, lambda m: m)


def log_linear(eps: float = 1e-3) -> MaskSchedule:
    """m(t) = (1 - eps) t, that is sigma(t) = -log(1 - (1 - eps) t) (SEDD, MDLM)."""
    return MaskSchedule("log_linear", lambda t: (1 - eps) * t, lambda m: m / (1 - eps))


def cosine() -> MaskSchedule:
    """m(t) = sin(pi t / 2) (MaskGIT, MD4)."""
    return MaskSchedule("cosine", lambda t: np.sin(np.pi * t / 2), lambda m: 2 / np.pi * np.arcsin(np.minimum(m, 1)))


def cosine_mdlm(eps: float = 1e-3) -> MaskSchedule:
    """m(t) = (1 - eps)(1 - cos(pi t / 2)): MDLM's "cosine", another curve than `cosine`."""
    # 1 - cos x = 2 sin^2(x/2), which keeps its digits at small t.
    return MaskSchedule(
        "cosine_mdlm",
        lambda t: 2 * (1 - eps) * np.sin(np.pi * t / 4) ** 2,
        lambda m: 4 / np.pi * np.arcsin(np.sqrt(np.minimum(m / (2 * (1 - eps)), 0.5))),
    )


def cosine_squared(eps: float = 1e-3) -> MaskSchedule:
    """m(t) = (1 - eps) sin^2(pi t / 2) (MDLM)."""
    return MaskSchedule(
        "cosine_squared",
        lambda t: (1 - eps) * np.sin(np.pi * t / 2) ** 2,
        lambda m: 2 / np.pi * np.arcsin(np.sqrt(np.minimum(m / (1 - eps), 1))),
    )


def polynomial(power: float = 2.0) -> MaskSchedule:
    """m(t) = t^power; power above 0."""
    if not power > 0:
        raise DiffsampError(f"power={power} of a polynomial schedule must be above 0")
    return MaskSchedule(f"polynomial({power:g})", lambda t: t**power, lambda m: m ** (1 / power))


def geometric(sigma_min: float = 1e-4, sigma_max: float = 20.0) -> MaskSchedule:
    """m(t) = 1 - exp(-sigma_min^(1-t) sigma_max^t) (SEDD). m(0) > 0: what is masked there is decoded at time 0."""
    if not 0 < sigma_min < sigma_max:
        raise DiffsampError(f"sigma_min={sigma_min}, sigma_max={sigma_max}: 0 < sigma_min < sigma_max is required")
    log_ratio = np.log(sigma_max / sigma_min)
    return MaskSchedule(
        "geometric",
        lambda t: -np.expm1(-sigma_min * np.exp(t * log_ratio)),
        lambda m: np.log(-np.log1p(-m) / sigma_min) / log_ratio,
    )


SCHEDULES: dict[str, Callable[[], MaskSchedule]] = {
    "linear": linear, "log_linear": log_linear, "cosine": cosine, "cosine_mdlm": cosine_mdlm,
    "cosine_squared": cosine_squared, "polynomial": polynomial, "geometric": geometric,
}  # fmt: skip


def schedule(name: str | MaskSchedule) -> MaskSchedule:
    """A schedule by name, or the given one; any `MaskSchedule(name, m, inverse)` of your own is accepted."""
    if isinstance(name, MaskSchedule):
        return name
    if name not in SCHEDULES:
        raise DiffsampError(f"schedule={name!r} is not known; accepted: {', '.join(SCHEDULES)} or a MaskSchedule")
    return SCHEDULES[name]()
