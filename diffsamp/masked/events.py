"""When tokens are revealed: hitting times and counts, drawn before the network is ever called.

In an absorbing process a masked token survives from t to s < t with probability m(s)/m(t), whatever the network says
and wherever the token is. So the times and the numbers of revelations can be drawn first, and positions and tokens
afterwards; a step in which nothing happens needs no call.

Source: Zheng et al. 2024, arXiv:2409.02908, proposition 4.1 and equation 11 (first hitting); the counts of ancestral
sampling follow from the same independence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.masked.randomness import LEVELS, TIMES, hashed_uniforms
from diffsamp.masked.schedules import MaskSchedule, schedule


@dataclass(frozen=True)
class Events:
    """The plan of a batch; entry (b, j) is event j of row b.

    sizes: int64 (B, S), tokens revealed; zeros after a row's last event.
    times: float64 (B, S), the time that the network is told, in [0, 1].
    token_times: float64 (B, n), the time of each single revelation in order, or None where only counts exist.
    """

    sizes: np.ndarray
    times: np.ndarray
    token_times: np.ndarray | None = None


def hitting_times(curve: MaskSchedule, masked: np.ndarray, uniforms: np.ndarray, start: float = 1.0) -> np.ndarray:
    """Times at which masks fall, latest noise first, in float64 and log form.

    g_{n-1} = g_n - E/n with g = log m and E ~ Exp(1): the log of equation 11, tau_{n-1} = m^{-1}(u^(1/n) m(tau_n)).

    Args:
        curve: the schedule. masked: (B,) masks of each row. uniforms: (B, n_max) in [0, 1), u of each event.
        start: the time at which sampling begins; only ratios of m are used, so m(start) < 1 is fine.

    Returns:
        (B, n_max), decreasing along a row; entries after a row's last mask are 0.
    """
    left = masked[:, None] - np.arange(uniforms.shape[1])
    with np.errstate(divide="ignore"):
        # u is in [0, 1) and log(1 - u) has the law of log u without its pole at zero.
        falls = np.where(left > 0, np.log1p(-uniforms) / np.maximum(left, 1), 0.0)
        level = np.exp(np.log(curve.m(start)) + falls.cumsum(1))
    return np.where(left > 0, curve.inverse(level), 0.0)


@dataclass(frozen=True)
class FirstHitting:
    """First-hitting sampler: exact token by token, or in groups.

    Args:
        tokens_per_step: K positions revealed by each call; 1 is exact.
        steps: number of calls instead: groups of ceil(left / steps left); never more calls than masks.
        schedule: name or `MaskSchedule`; matters only to a network that is told the time.
        extrapolate: second order: the j-th token of a group is drawn from the prediction extrapolated in time through
            this call and the one before, in the probability domain; no extra call. Needs order "random".
        start: time at which the given sequence sits; 1 unless it was partly noised, whatever share is frozen.
    """

    tokens_per_step: int = 1
    steps: int | None = None
    schedule: str | MaskSchedule = "linear"
    extrapolate: bool = False
    start: float = 1.0

    def __post_init__(self) -> None:
        schedule(self.schedule)
        positive("tokens_per_step", self.tokens_per_step)
        positive("steps", 1 if self.steps is None else self.steps)
        if self.steps is not None and self.tokens_per_step != 1:
            raise DiffsampError(f"tokens_per_step={self.tokens_per_step}, steps={self.steps}: give one of the two")
        if not 0 < self.start <= 1:
            raise DiffsampError(f"start={self.start} must be above 0 and at most 1")

    def events(self, masked: np.ndarray, seeds: np.ndarray) -> Events:
        """Events of rows that hold `masked` (B,) masks."""
        most = int(masked.max(initial=0))
        times = hitting_times(schedule(self.schedule), masked, hashed_uniforms(seeds, TIMES, most), self.start)
        sizes = self.sizes(masked)
        first = sizes.cumsum(1) - sizes
        # The network is told the new time, that of the first token of its group.
        told = np.take_along_axis(times, np.minimum(first, max(most - 1, 0)), 1) if most else np.zeros(sizes.shape)
        return Events(sizes, told, times)

    def sizes(self, masked: np.ndarray) -> np.ndarray:
        """Tokens revealed by each call, (B, S)."""
        if self.steps is None:
            calls = int(-(-masked.max(initial=0) // self.tokens_per_step))
            return np.clip(masked[:, None] - self.tokens_per_step * np.arange(calls), 0, self.tokens_per_step)
        calls = min(self.steps, int(masked.max(initial=0)))
        left, groups, sizes = masked.copy(), np.minimum(self.steps, masked), np.zeros((masked.size, calls), np.int64)
        for j in range(calls):
            sizes[:, j] = np.where(groups > j, -(-left // np.maximum(groups - j, 1)), 0)
            left = left - sizes[:, j]
        return sizes


@dataclass(frozen=True)
class CountFirst:
    """Ancestral sampling (the law of MDLM's and of tau-leaping), with counts drawn first.

    On the grid t_N > ... > t_0 each masked token is assigned the step in which it falls; steps without a token make no
    call, and only the tokens that are kept are drawn. What is left at time 0 (m(0) > 0) is decoded by the last step.

    Args:
        steps: N. schedule: name or `MaskSchedule`. start: time of the given sequence.
        grid: None for N + 1 evenly spaced times from `start` to 0, or the decreasing times themselves.
    """

    steps: int
    schedule: str | MaskSchedule = "linear"
    start: float = 1.0
    grid: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        positive("steps", self.steps)
        schedule(self.schedule)
        if self.grid is not None and (len(self.grid) != self.steps + 1 or any(np.diff(self.grid) >= 0)):
            raise DiffsampError(f"grid must be steps + 1 = {self.steps + 1} decreasing times; got {len(self.grid)}")

    @property
    def grid_times(self) -> np.ndarray:
        """The N + 1 times, from the start to 0."""
        return np.linspace(self.start, 0.0, self.steps + 1) if self.grid is None else np.asarray(self.grid, np.float64)

    def events(self, masked: np.ndarray, seeds: np.ndarray) -> Events:
        """Events of rows that hold `masked` (B,) masks."""
        most, rows = int(masked.max(initial=0)), masked.size
        times = self.grid_times
        m = schedule(self.schedule).m(times)
        level = hashed_uniforms(seeds, LEVELS, most) * m[0]
        # Token falls in the step (t_i -> t_{i+1}] with m(t_{i+1}) <= level < m(t_i).
        step = np.minimum(np.searchsorted(-m[1:], -level, side="left"), self.steps - 1)
        step = np.sort(np.where(np.arange(most) < masked[:, None], step, self.steps), axis=1)
        if most == 0:
            return Events(np.zeros((rows, 0), np.int64), np.zeros((rows, 0)))
        event = np.concatenate([np.zeros((rows, 1), np.int64), (np.diff(step, axis=1) > 0).cumsum(1)], axis=1)
        real = step < self.steps
        width = int(np.where(real, event, -1).max(initial=-1)) + 1
        flat = (np.arange(rows)[:, None] * width + event)[real]
        sizes = np.bincount(flat, minlength=rows * width).reshape(rows, width)
        told = np.zeros(rows * width)
        told[flat] = times[step[real]]
        return Events(sizes, told.reshape(rows, width))


def expected_calls(steps: int, tokens: int) -> float:
    """Mean number of steps in which something happens on the linear schedule, N (1 - (1 - 1/N)^tokens)."""
    return steps * -np.expm1(tokens * np.log1p(-1.0 / steps)) if steps > 1 else 1.0


def positive(name: str, value: int) -> None:
    """Raise `DiffsampError` unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise DiffsampError(f"{name}={value!r} must be an integer of at least 1")
