"""Grids: which noise levels a run visits.

A grid is n+1 levels in falling noise, the last one the data (sigma = 0) unless asked otherwise. The network is called
at the first n. Ratios are sigma/alpha for VP and VE processes and sigma itself for flow processes, as diffusers counts
them.

Sources: Song et al. 2021 (DDIM: uniform, quadratic; arXiv:2010.02502); Lin et al. 2024 (trailing; arXiv:2305.08891);
Karras et al. 2022 (Eq. 5; arXiv:2206.00364); Lu et al. 2022 (uniform log-SNR; arXiv:2206.00927); Lee et al. 2024
(beta; arXiv:2407.12173); Sabour et al. 2024 (AYS tables; arXiv:2404.14507); Esser et al. 2024 (flow shift;
arXiv:2403.03206).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import DiffsampError
from .process import Level, Process

# Published optimised schedules; other step counts are interpolated log-linearly in the ratio, as the paper advises.
AYS_TIMESTEPS = {
    "sd": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}
AYS_SIGMAS = {"svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034)}
# At sigma = 1 a flow has no signal and log-SNR is -inf; multistep coefficients need a finite one.
FLOW_START_GAP = 1e-6


@dataclass(frozen=True)
class Node(Level):
    """A level with its place in the grid: ``h`` is the step in lambda that leads to it (nan at the first)."""

    h: float = math.nan
    is_first: bool = False
    is_last: bool = False


@dataclass(frozen=True)
class Grid:
    """Noise levels of a run, in falling noise. ``levels`` has one more entry than there are network calls."""

    process: Process
    levels: tuple[Level, ...]
    name: str = "given"

    def __post_init__(self) -> None:
        levels = tuple(
            level if level.index == i else Level(level.t, level.alpha, level.sigma, i)
            for i, level in enumerate(self.levels)
        )
        object.__setattr__(self, "levels", levels)
        if len(levels) < 2:
            raise DiffsampError(f"grid {self.name!r}: needs at least 2 levels, got {len(levels)}")
        for a, b in zip(levels, levels[1:], strict=False):
            if not a.noise_to_signal > b.noise_to_signal:
                raise DiffsampError(
                    f"grid {self.name!r}: noise must fall from level to level, but level {b.index} has "
                    f"sigma/alpha {b.noise_to_signal:.6g} after {a.noise_to_signal:.6g}"
                )

    def __len__(self) -> int:
        """Number of intervals, which is the number of network calls of a one-evaluation solver."""
        return len(self.levels) - 1

    @property
    def nodes(self) -> tuple[Node, ...]:
        last = len(self.levels) - 1
        found = []
        for i, level in enumerate(self.levels):
            h = level.lambda_ - self.levels[i - 1].lambda_ if i else math.nan
            found.append(Node(level.t, level.alpha, level.sigma, i, h, i == 0, i == last))
        return tuple(found)

    def intervals(self) -> Iterator[tuple[Node, Node]]:
        """Pairs (s, t) of neighbouring levels, from noise to data."""
        nodes = self.nodes
        return zip(nodes[:-1], nodes[1:], strict=True)

    @property
    def sigmas(self) -> np.ndarray:
        """The levels as diffusers counts them: sigma for flow, sigma/alpha otherwise; length n+1."""
        flow = self.process.kind == "flow"
        return np.array([level.sigma if flow else level.noise_to_signal for level in self.levels])

    @property
    def times(self) -> np.ndarray:
        """Network time of the first n levels."""
        return np.array([level.t for level in self.levels[:-1]])

    def after(self, start: int) -> Grid:
        """The grid from level ``start`` on (image-to-image, teleportation)."""
        if not 0 <= start < len(self):
            raise DiffsampError(f"start: got {start}; accepted: 0 to {len(self) - 1}")
        return Grid(self.process, self.levels[start:], self.name)

    @classmethod
    def from_sigmas(
        cls,
        process: Process,
        sigmas: Sequence[float] | np.ndarray,
        times: Sequence[float] | np.ndarray | None = None,
        *,
        final: str = "zero",
        name: str = "sigmas",
    ) -> Grid:
        """Grid of given ratios in falling order (flow: sigma in [0, 1]). A zero is appended where the last is not 0.

        Args:
            times: network times to use in place of the process's own; one per ratio.
            final: ``"zero"`` appends the data level; ``"as-given"`` appends nothing.
        """
        values = np.asarray(sigmas, dtype=np.float64).reshape(-1)
        if values.size == 0 or not np.isfinite(values).all() or (values < 0).any():
            raise DiffsampError(f"sigmas: needs finite values of 0 or above, got {list(values)}")
        if process.kind == "flow" and (values > 1).any():
            raise DiffsampError(f"sigmas: a flow's are in [0, 1], got {values.max():.6g}")
        if times is not None and len(times) != len(values):
            raise DiffsampError(f"timesteps: got {len(times)} for {len(values)} sigmas; needs one each")
        levels = []
        for i, value in enumerate(values):
            t = None if times is None else float(times[i])
            if process.kind == "flow":
                t = flow_time(process, value) if t is None else t
                value = min(value, 1 - FLOW_START_GAP)
                value = value / (1 - value)
            levels.append(process.level(value, i, t))
        if final == "zero" and values[-1] > 0:
            levels.append(process.level(0.0, len(levels)))
        return cls(process, tuple(levels), name)

    @classmethod
    def from_times(
        cls, process: Process, times: Sequence[float] | np.ndarray, *, final: str = "zero", name: str = "timesteps"
    ) -> Grid:
        """Grid of given network times, in falling noise."""
        values = np.asarray(times, dtype=np.float64).reshape(-1)
        if values.size == 0 or not np.isfinite(values).all():
            raise DiffsampError(f"timesteps: needs finite values, got {list(values)}")
        if process.kind == "flow":
            sigmas = values / process.num_train_timesteps
            return cls.from_sigmas(process, sigmas, values, final=final, name=name)
        n = process.num_train_timesteps
        if process.clock == "discrete" and ((values < 0).any() or (values > n - 1).any()):
            raise DiffsampError(f"timesteps: must be in 0..{n - 1}, got {values.min():g}..{values.max():g}")
        levels = [process.level_at(t, i) for i, t in enumerate(values)]
        if final == "zero":
            levels.append(process.level(0.0, len(levels)))
        elif final == "sigma_min":
            levels.append(process.level(process.noise_to_signal_range[0], len(levels)))
        return cls(process, tuple(levels), name)


def flow_time(process: Process, sigma: float) -> float:
    """Network time of a flow sigma."""
    n = float(process.num_train_timesteps)
    return n * (1.0 - sigma) if process.clock == "flow_inverted" else n * sigma


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Static flow shift: shift·s / (1 + (shift − 1)·s)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_shift(sigmas: np.ndarray, mu: float, kind: str = "exponential") -> np.ndarray:
    """Resolution-dependent flow shift: w / (w + 1/s − 1) with w = e^mu (``exponential``) or mu (``linear``)."""
    if kind not in ("exponential", "linear"):
        raise DiffsampError(f"time_shift_type: got {kind!r}; accepted: exponential, linear")
    weight = math.exp(mu) if kind == "exponential" else mu
    with np.errstate(divide="ignore"):
        return weight / (weight + (1 / sigmas - 1))


def stretch_to_terminal(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """Scale 1 − s so that the last sigma becomes ``terminal``; a single step is left as it is."""
    gaps = 1 - sigmas
    if gaps[-1] == 0:
        return sigmas
    return 1 - gaps * (1 - terminal) / gaps[-1]


# -- spacings in time -------------------------------------------------------------------------------------------------


def _linspace(process: Process, n: int) -> np.ndarray:
    return np.linspace(0, process.num_train_timesteps - 1, n + 1).round()[::-1][:-1]


def _uniform(process: Process, n: int) -> np.ndarray:
    top = process.num_train_timesteps - 1
    return np.linspace(0, top, n)[::-1] if n > 1 else np.array([float(top)])


def _leading(process: Process, n: int, steps_offset: int = 0) -> np.ndarray:
    return np.minimum(
        (np.arange(n) * (process.num_train_timesteps // n))[::-1] + steps_offset, process.num_train_timesteps - 1
    ).astype(np.float64)


def _trailing(process: Process, n: int) -> np.ndarray:
    total = process.num_train_timesteps
    return np.round(total - np.arange(n) * (total / n)) - 1


def _quadratic(process: Process, n: int) -> np.ndarray:
    return (np.linspace(0, math.sqrt(0.8 * process.num_train_timesteps), n) ** 2)[::-1] + 1


# -- spacings in the ratio --------------------------------------------------------------------------------------------


def _karras(low: float, high: float, count: int, rho: float = 7.0) -> np.ndarray:
    ramp = np.linspace(0, 1, count)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def _exponential(low: float, high: float, count: int) -> np.ndarray:
    return np.exp(np.linspace(math.log(high), math.log(low), count))


def _beta(low: float, high: float, count: int, alpha: float = 0.6, beta: float = 0.6) -> np.ndarray:
    from scipy.stats import beta as beta_law

    return low + (high - low) * beta_law.ppf(1 - np.linspace(0, 1, count), alpha, beta)


_TIME: dict[str, Callable[..., np.ndarray]] = {
    "linspace": _linspace, "uniform": _uniform, "leading": _leading, "trailing": _trailing, "quadratic": _quadratic,
}  # fmt: skip
_RATIO: dict[str, Callable[..., np.ndarray]] = {
    "karras": _karras, "exponential": _exponential, "logsnr": _exponential, "beta": _beta,
}  # fmt: skip
_FLOW = ("flow", "linspace", "uniform", "trailing")
_FINAL = ("zero", "sigma_min")


def grids() -> list[str]:
    """Names that :func:`grid` accepts."""
    return sorted({*_TIME, *_RATIO, "ays", "flow"})


def grid(
    name: str,
    process: Process,
    steps: int,
    *,
    final: str = "zero",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shift: float | None = None,
    mu: float | None = None,
    time_shift_type: str = "exponential",
    shift_terminal: float | None = None,
    **options: Any,
) -> Grid:
    """A named grid of ``steps`` network calls.

    Args:
        name: ``linspace, uniform, leading, trailing, quadratic`` (in time), ``karras, exponential, logsnr, beta`` (in
            the ratio), ``ays``, or for flows ``flow`` (what FlowMatchEuler visits), ``uniform`` (1, 1−1/n, ..., 1/n),
            ``linspace``.
        process: the noise process.
        steps: number of network calls, 1 or above.
        final: ``"zero"`` ends at the data, ``"sigma_min"`` at the smallest level of the process.
        sigma_min, sigma_max: range of ratio-spaced grids; the process's own by default.
        shift, mu, time_shift_type, shift_terminal: flow shift; ``mu`` (dynamic) takes the place of ``shift``.
        options: ``steps_offset`` (leading), ``rho`` (karras), ``alpha``, ``beta`` (beta), ``table`` (ays: sd, sdxl,
        svd).

    Raises:
        DiffsampError: unknown name or option, steps below 1 or beyond what the grid can hold.
    """
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise DiffsampError(f"steps: got {steps!r}; must be a whole number of 1 or above")
    steps = int(steps)
    if final not in _FINAL:
        raise DiffsampError(f"final: got {final!r}; accepted: {', '.join(_FINAL)}")
    if name not in grids():
        near = difflib.get_close_matches(name, grids(), n=2)
        raise DiffsampError(
            f"grid: {name!r} is not known; "
            + (f"did you mean {' or '.join(near)}?" if near else f"accepted: {', '.join(grids())}")
        )
    try:
        if process.kind == "flow" and name != "ays":
            sigmas = _flow_sigmas(
                name, process, steps, sigma_min, sigma_max, shift, mu, time_shift_type, shift_terminal, options
            )
            return Grid.from_sigmas(process, sigmas, final=final if final == "zero" else "as-given", name=name)
        if name == "flow":
            here = ", ".join((*_TIME, *_RATIO, "ays"))
            raise DiffsampError(f"grid: 'flow' needs a flow process; accepted here: {here}")
        if name in _TIME:
            if process.clock != "discrete":
                raise DiffsampError(f"grid: {name!r} needs discrete time; accepted here: {', '.join(_RATIO)}, ays")
            n = process.num_train_timesteps
            if steps > n:
                raise DiffsampError(f"steps: got {steps}; grid {name!r} holds at most {n}")
            times = _TIME[name](process, steps, **options)
            if len(np.unique(times)) != len(times):
                raise DiffsampError(f"steps: got {steps}; grid {name!r} would visit a timestep twice")
            return Grid.from_times(process, times, final=final, name=name)
        low, high = process.noise_to_signal_range
        low = low if sigma_min is None else float(sigma_min)
        high = high if sigma_max is None else float(sigma_max)
        if not 0 < low < high:
            raise DiffsampError(f"sigma_min, sigma_max: got {low}, {high}; needs 0 < sigma_min < sigma_max")
        count = steps if final == "zero" else steps + 1
        if name == "ays":
            ratios = _ays(process, count, **options)
        elif count == 1:
            ratios = np.array([high])
        else:
            ratios = _RATIO[name](low, high, count, **options)
        return Grid.from_sigmas(process, ratios, final=final if final == "zero" else "as-given", name=name)
    except TypeError as error:
        raise DiffsampError(f"grid {name!r}: {error}") from None


def _flow_sigmas(
    name: str, process: Process, n: int, low: float | None, high: float | None, shift: float | None, mu: float | None,
    time_shift_type: str, shift_terminal: float | None, options: dict[str, Any],
) -> np.ndarray:  # fmt: skip
    shift = process.shift if shift is None else float(shift)
    total = process.num_train_timesteps

    def shifted(values: np.ndarray) -> np.ndarray:
        moved = shift_sigmas(values, shift) if mu is None else dynamic_shift(values, mu, time_shift_type)
        return moved if shift_terminal is None or not shift_terminal else stretch_to_terminal(moved, shift_terminal)

    # FlowMatchEuler shifts the ends of its range once at construction and the whole range again.
    ends = np.array([1.0, 1.0 / total])
    ends = ends if mu is not None else shift_sigmas(ends, shift)
    if name == "flow":
        return shifted(np.linspace(ends[0], ends[1], n))
    if name == "linspace":
        return shifted(np.linspace(1, 1 / total, n + 1)[:-1])
    if name in ("uniform", "trailing"):
        return shifted(np.linspace(1, 1 / n, n))
    if name in _RATIO:
        base = shifted(np.linspace(ends[0], ends[1], max(n, 2)))
        top = base[0] if high is None else high
        bottom = base[-1] if low is None else low
        return _RATIO[name](bottom, top, n, **options) if n > 1 else np.array([top])
    raise DiffsampError(f"grid: {name!r} is not defined for a flow; accepted: {', '.join((*_FLOW, *_RATIO))}")


def _ays(process: Process, n: int, table: str = "sd") -> np.ndarray:
    if table in AYS_TIMESTEPS:
        if process.clock != "discrete":
            raise DiffsampError(f"table: {table!r} needs a process with discrete time; accepted here: svd")
        scale = (process.num_train_timesteps - 1) / 999
        known = np.array([process.level_at(t * scale).noise_to_signal for t in AYS_TIMESTEPS[table]])
    elif table in AYS_SIGMAS:
        known = np.array(AYS_SIGMAS[table])
    else:
        raise DiffsampError(f"table: got {table!r}; accepted: {', '.join((*AYS_TIMESTEPS, *AYS_SIGMAS))}")
    if n == 1:
        return known[:1]
    return np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(known)), np.log(known)))
