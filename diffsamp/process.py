"""Diffusion processes: the noise schedule alpha(t), sigma(t) in float64 and the conversions between prediction types.

A noisy sample at time t is  x_t = alpha·x0 + sigma·epsilon.  Everything else follows from the noise-to-signal ratio
s = sigma/alpha (what k-diffusion and diffusers call "sigma" of a variance-preserving model), so a process is a rule
from s to (alpha, sigma) and a clock between s and the time that the network is told.

Sources: Ho et al. 2020 (VP, arXiv:2006.11239); Karras et al. 2022 (VE/EDM, arXiv:2206.00364, Table 1);
Lipman et al. 2023, Liu et al. 2023 (flow, arXiv:2210.02747, arXiv:2209.03003); Lin et al. 2024 (zero terminal SNR,
arXiv:2305.08891, Algorithm 1).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import DiffsampError

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction", "edm")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
# The smallest alpha-bar kept for a schedule with zero terminal SNR: finite log-SNR, and below fp16 resolution.
ZERO_SNR_FLOOR = 2.0**-24


@dataclass(frozen=True)
class Level:
    """One noise level: x = alpha·x0 + sigma·epsilon, and the time ``t`` that the network is told there.

    ``sigma`` may be 0 (the data) and ``alpha`` may be 0 (pure noise); ``index`` is the position in the grid.
    """

    t: float
    alpha: float
    sigma: float
    index: int = -1

    @property
    def lambda_(self) -> float:
        """Half log-SNR, log(alpha/sigma); +inf at the data, -inf at pure noise."""
        if self.sigma == 0.0:
            return math.inf
        return -math.inf if self.alpha == 0.0 else math.log(self.alpha) - math.log(self.sigma)

    @property
    def noise_to_signal(self) -> float:
        """sigma/alpha, the noise level in variance-exploding coordinates."""
        return math.inf if self.alpha == 0.0 else self.sigma / self.alpha

    def __float__(self) -> float:
        return self.t


def _betas(schedule: str, start: float, end: float, n: int) -> np.ndarray:
    if schedule == "linear":
        return np.linspace(start, end, n, dtype=np.float64)
    if schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, n, dtype=np.float64) ** 2
    if schedule == "squaredcos_cap_v2":
        u = np.arange(n + 1, dtype=np.float64) / n
        bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    if schedule == "laplace":
        u = np.arange(n + 1, dtype=np.float64) / n
        snr = np.exp(-0.5 * np.copysign(1.0, 0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6))
        bar = np.sqrt(snr / (1 + snr))
        return np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    if schedule == "sigmoid":
        return (end - start) / (1 + np.exp(-np.linspace(-6, 6, n, dtype=np.float64))) + start
    raise DiffsampError(f"beta_schedule: {schedule!r} is not known; accepted: {', '.join(BETA_SCHEDULES)}")


def rescale_zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha-bar) so that the last one is zero (Lin et al. 2024, Algorithm 1)."""
    root = np.sqrt(alphas_cumprod)
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)) ** 2


class Process:
    """A frozen, hashable noise process. Make one with :meth:`vp`, :meth:`ve`, :meth:`flow` or :meth:`from_config`.

    Attributes:
        kind: ``"vp"`` (alpha² + sigma² = 1), ``"ve"`` (alpha = 1) or ``"flow"`` (alpha = 1 − sigma).
        clock: how the network's time is counted: ``"discrete"`` (index 0..N−1 of a table, fractional allowed),
            ``"c_noise"`` (log(sigma/alpha)/4, EDM), ``"sigma"`` (the noise level itself), ``"flow"`` (N·sigma) or
            ``"flow_inverted"`` (N·(1 − sigma), and the
            network predicts x0 − epsilon; Mochi).
        num_train_timesteps: N.
    """

    __slots__ = ("kind", "clock", "num_train_timesteps", "shift", "sigma_data", "_log_s", "_range", "_key")

    def __init__(
        self,
        kind: str,
        clock: str,
        num_train_timesteps: int = 1000,
        *,
        alphas_cumprod: np.ndarray | None = None,
        sigma_range: tuple[float, float] | None = None,
        shift: float = 1.0,
        sigma_data: float = 0.5,
    ) -> None:
        if kind not in ("vp", "ve", "flow"):
            raise DiffsampError(f"kind: {kind!r} is not known; accepted: vp, ve, flow")
        log_s = None
        if alphas_cumprod is not None:
            bar = np.array(alphas_cumprod, dtype=np.float64).reshape(-1)
            if bar.size < 2 or not np.isfinite(bar).all() or (bar < 0).any() or (bar > 1).any():
                raise DiffsampError("alphas_cumprod: needs at least 2 finite values in [0, 1]")
            bar = np.maximum(bar, ZERO_SNR_FLOOR)
            log_s = 0.5 * (np.log1p(-bar) - np.log(bar))
            if not (np.diff(log_s) > 0).all():
                raise DiffsampError("alphas_cumprod: must fall strictly from one timestep to the next")
            log_s.setflags(write=False)
        elif clock == "discrete":
            raise DiffsampError("alphas_cumprod: is needed for a process with discrete time")
        digest = hashlib.sha256(b"" if log_s is None else log_s.tobytes()).hexdigest()
        fields = (kind, clock, int(num_train_timesteps), float(shift), float(sigma_data), sigma_range, digest)
        for name, value in zip(
            ("kind", "clock", "num_train_timesteps", "shift", "sigma_data", "_range", "_key", "_log_s"),
            (*fields[:5], sigma_range, fields, log_s),
            strict=True,
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Process is frozen: cannot set {name}")

    def __reduce__(self):
        return _rebuild, (self._state(),)

    def _state(self) -> dict[str, Any]:
        bar = None if self._log_s is None else 1 / (1 + np.exp(2 * self._log_s))
        return dict(
            kind=self.kind, clock=self.clock, num_train_timesteps=self.num_train_timesteps, alphas_cumprod=bar,
            sigma_range=self._range, shift=self.shift, sigma_data=self.sigma_data, log_s=self._log_s,
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Process) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        low, high = self.noise_to_signal_range
        return f"Process({self.kind}, clock={self.clock}, noise_to_signal={low:.4g}..{high:.4g})"

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that defines the process."""
        return hashlib.sha256(repr(self._key).encode()).hexdigest()[:16]

    # -- constructors ---------------------------------------------------------------------------------------------

    @classmethod
    def vp(
        cls,
        beta_schedule: str = "linear",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        num_train_timesteps: int = 1000,
        *,
        trained_betas: Iterable[float] | None = None,
        alphas_cumprod: Iterable[float] | None = None,
        rescale_betas_zero_snr: bool = False,
    ) -> Process:
        """Variance-preserving process with a table of N timesteps; between them log(sigma/alpha) is linear in t."""
        if alphas_cumprod is None:
            if trained_betas is None:
                betas = _betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
            else:
                betas = np.array(list(trained_betas), dtype=np.float64)
            bar = np.cumprod(1 - betas)
        else:
            bar = np.array(list(alphas_cumprod), dtype=np.float64)
        if rescale_betas_zero_snr:
            bar = rescale_zero_terminal_snr(bar)
        return cls("vp", "discrete", len(bar), alphas_cumprod=bar)

    @classmethod
    def vp_continuous(cls, sigma_min: float = 0.002, sigma_max: float = 700.0) -> Process:
        """Variance-preserving, any noise-to-signal ratio; the network is told log(ratio)/4 (Stable Video Diffusion)."""
        return cls("vp", "c_noise", sigma_range=(float(sigma_min), float(sigma_max)))

    @classmethod
    def ve(
        cls, sigma_min: float = 0.002, sigma_max: float = 80.0, *, sigma_data: float = 0.5, clock: str = "sigma"
    ) -> Process:
        """Variance-exploding process, alpha = 1 (EDM). ``clock="c_noise"`` tells the network log(sigma)/4."""
        if not 0 < sigma_min < sigma_max:
            raise DiffsampError(f"sigma_min, sigma_max: got {sigma_min}, {sigma_max}; needs 0 < sigma_min < sigma_max")
        return cls("ve", clock, sigma_range=(float(sigma_min), float(sigma_max)), sigma_data=sigma_data)

    @classmethod
    def flow(cls, shift: float = 1.0, num_train_timesteps: int = 1000, *, inverted: bool = False) -> Process:
        """Rectified flow, alpha = 1 − sigma; the network is told N·sigma. ``shift`` is what grids apply by default."""
        if not shift > 0:
            raise DiffsampError(f"shift: got {shift}; must be above 0")
        return cls("flow", "flow_inverted" if inverted else "flow", num_train_timesteps, shift=shift)

    # -- the schedule ---------------------------------------------------------------------------------------------

    @property
    def noise_to_signal_range(self) -> tuple[float, float]:
        """Smallest and largest noise-to-signal ratio that the process was trained on."""
        if self._log_s is not None:
            return math.exp(self._log_s[0]), math.exp(self._log_s[-1])
        if self._range is not None:
            return self._range
        low = 1.0 / self.num_train_timesteps
        return low / (1 - low), math.inf

    @property
    def table(self) -> np.ndarray | None:
        """Noise-to-signal ratio of every discrete timestep, rising; None for a process without a table."""
        return None if self._log_s is None else np.exp(self._log_s)

    def _log_ratio(self, t: np.ndarray) -> np.ndarray:
        if self.clock == "discrete":
            assert self._log_s is not None
            return np.interp(t, np.arange(len(self._log_s)), self._log_s)
        if self.clock == "c_noise":
            return 4.0 * t
        with np.errstate(divide="ignore"):
            if self.clock == "sigma":
                return np.log(t)
            sigma = t / self.num_train_timesteps
            sigma = 1 - sigma if self.clock == "flow_inverted" else sigma
            return np.log(sigma) - np.log1p(-sigma)

    def lambda_(self, t: Any) -> Any:
        """Half log-SNR at network time t (float or array), float64."""
        return -self._log_ratio(np.asarray(t, dtype=np.float64))

    def alpha(self, t: Any) -> Any:
        """Signal coefficient at network time t, float64."""
        if self.kind == "ve":
            return np.ones_like(np.asarray(t, dtype=np.float64))
        lam = self.lambda_(t)
        return np.sqrt(_sigmoid(2 * lam)) if self.kind == "vp" else _sigmoid(lam)

    def sigma(self, t: Any) -> Any:
        """Noise coefficient at network time t, float64."""
        lam = self.lambda_(t)
        if self.kind == "ve":
            return np.exp(-lam)
        return np.sqrt(_sigmoid(-2 * lam)) if self.kind == "vp" else _sigmoid(-lam)

    def time(self, noise_to_signal: float) -> float:
        """Network time of a noise-to-signal ratio (clipped to the table for a discrete clock)."""
        s = float(noise_to_signal)
        if self.clock == "discrete":
            assert self._log_s is not None
            log_s = -math.inf if s == 0 else math.log(s)
            return float(np.interp(log_s, self._log_s, np.arange(len(self._log_s))))
        if self.clock == "c_noise":
            # A network is never called at the data; the finite stand-in keeps printed tables readable.
            return 0.25 * math.log(s) if s > 0 else 0.25 * math.log(self.noise_to_signal_range[0])
        if self.clock == "sigma":
            return s
        sigma = 1.0 if math.isinf(s) else s / (1 + s)
        return float(self.num_train_timesteps) * (1 - sigma if self.clock == "flow_inverted" else sigma)

    def level(self, noise_to_signal: float, index: int = -1, t: float | None = None) -> Level:
        """Level of a noise-to-signal ratio >= 0; ``t`` overrides the network time derived from it."""
        s = float(noise_to_signal)
        if not s >= 0:
            raise DiffsampError(f"noise_to_signal: got {s}; must be 0 or above")
        time = self.time(s) if t is None else float(t)
        if self.kind == "ve":
            alpha, sigma = 1.0, s
        elif math.isinf(s):
            alpha, sigma = 0.0, 1.0
        elif self.kind == "vp":
            alpha = 1.0 / math.sqrt(1.0 + s * s)
            sigma = s * alpha
        else:
            alpha, sigma = 1.0 / (1.0 + s), s / (1.0 + s)
        return Level(time, alpha, sigma, index)

    def level_at(self, t: float, index: int = -1) -> Level:
        """Level of a network time."""
        log_s = float(self._log_ratio(np.array(float(t))))
        return self.level(math.exp(log_s), index, float(t))

    def level_at_lambda(self, lambda_: float, index: int = -1) -> Level:
        """Level of a half log-SNR (may be ±inf)."""
        return self.level(math.exp(-lambda_) if lambda_ != -math.inf else math.inf, index)

    # -- predictions ----------------------------------------------------------------------------------------------

    def x0_coefficients(self, level: Level, prediction: str) -> tuple[float, float]:
        """(p, q) with x0 = p·x + q·F for a raw prediction F of the given type at ``level``.

        ``prediction``: ``epsilon``, ``sample`` (x0), ``v_prediction`` (v = alpha·epsilon − sigma·x0),
        ``flow_prediction`` (velocity epsilon − x0) or ``edm`` (the network of EDM's preconditioning, fed c_in·x).
        Raises DiffsampError where the type does not determine x0 (epsilon at alpha = 0).
        """
        a, s = level.alpha, level.sigma
        if prediction == "sample":
            return 0.0, 1.0
        if prediction == "epsilon":
            if a == 0.0:
                raise DiffsampError(
                    "prediction: 'epsilon' says nothing of x0 at zero SNR; accepted there: v_prediction"
                )
            return 1.0 / a, -s / a
        if prediction == "v_prediction":
            norm = a * a + s * s
            return a / norm, -s / norm
        if prediction == "flow_prediction":
            sign = -1.0 if self.clock == "flow_inverted" else 1.0
            return 1.0 / (a + s), -sign * s / (a + s)
        if prediction == "edm":
            d, r = self.sigma_data, level.noise_to_signal
            return d * d / (r * r + d * d) / a, r * d / math.sqrt(r * r + d * d)
        raise DiffsampError(f"prediction: {prediction!r} is not known; accepted: {', '.join(PREDICTIONS)}")

    def epsilon_coefficients(self, level: Level, prediction: str) -> tuple[float, float]:
        """(p, q) with epsilon = p·x + q·F. Raises DiffsampError at sigma = 0."""
        if prediction == "epsilon":
            return 0.0, 1.0
        a, s = level.alpha, level.sigma
        if s == 0.0:
            raise DiffsampError("level: epsilon is not determined at sigma = 0")
        if prediction == "v_prediction":
            norm = a * a + s * s
            return s / norm, a / norm
        if prediction == "flow_prediction":
            sign = -1.0 if self.clock == "flow_inverted" else 1.0
            return 1.0 / (a + s), sign * a / (a + s)
        p, q = self.x0_coefficients(level, prediction)
        return (1.0 - a * p) / s, -a * q / s


def _sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def _rebuild(state: dict[str, Any]) -> Process:
    log_s = state.pop("log_s")
    process = Process(**state)
    if log_s is not None:
        # Bit-exact table: the way through alpha-bar rounds.
        log_s = np.array(log_s)
        log_s.setflags(write=False)
        object.__setattr__(process, "_log_s", log_s)
        key = process._key[:-1] + (hashlib.sha256(log_s.tobytes()).hexdigest(),)
        object.__setattr__(process, "_key", key)
    return process
