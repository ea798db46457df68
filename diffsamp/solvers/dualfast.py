"""DualFast: the noise prediction of a step is pushed away from one made at more noise.

    e'_i = (1 + c_i)·e_i − c_i·e_tau       e: noise predictions;  tau: the first step, the previous one, or k back

What is the paper's: a mixing with a non-negative constant, a cached prediction at a higher noise level, no extra
network call, and (implied by its reviewers) that only the explicit first-order term is replaced. What is ours: the law
of c (the published one could not be recovered; none of the paper's figures is repeated here), the default tau, and the
calibrated constants of `diffsamp calibrate dualfast`.

In the mode ``first-order`` the change to a step from s to t is the same additive term for every solver, in either form:

    x_t += −(alpha_t·sigma_s/alpha_s − sigma_t)·c·(e_s − e_tau)

so DDIM with tau = previous and c = h/(2·h_prev) is noise-prediction DPM-Solver of order 2. In the mode ``all`` every
term sees e'. A noise prediction of an earlier step is a combination of what a run keeps (base, input, outputs); the
shortest such combination is found here, so the engine needs nothing new. With a plan in epsilon form and tau = first
the first output is kept in the ``pin`` register.

Source: Yu et al. 2025, DualFast, arXiv:2506.13058, abstract and introduction.

@article{yu2025dualfast,
  title={DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models},
  author={Yu, Hu and Luo, Hao and Wang, Fan and Zhao, Feng},
  journal={arXiv preprint arXiv:2506.13058},
  year={2025}
}
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np

from ..errors import DiffsampError
from ..plan import Mix, Plan, Row
from ..registry import register_solver
from .multistep import require_multistep

MODES = ("first-order", "all")
# Above these, second-order solvers were measured to blow up under strong guidance (class-Gaussian digits, scale 7.5).
STRONG_GUIDANCE = 5.0
LARGE_C = 0.1


def constants(plan: Plan, c: float | Sequence[float] | None, schedule: str) -> tuple[float, ...]:
    """One mixing constant per row; the first is 0, as nothing is cached yet.

    ``c`` None is this project's default: a ramp up to 0.3 for first-order solvers and 0.1 for the others.
    """
    n = plan.nfe
    if isinstance(c, Sequence):
        values = [float(v) for v in c]
        if len(values) != n:
            raise DiffsampError(f"c: got {len(values)} constants for a plan of {n} network calls; needs one for each")
    else:
        top = (0.3 if plan.order < 2 else 0.1) if c is None else float(c)
        if schedule == "constant":
            values = [top] * n
        elif schedule == "ramp":
            times = [row.level.noise_to_signal / (1 + row.level.noise_to_signal) for row in plan.rows]
            if plan.process.clock in ("discrete", "flow"):
                times = [row.level.t for row in plan.rows]
            values = [top * (1 - t / (times[0] or 1.0)) for t in times]
        else:
            raise DiffsampError(f"schedule: got {schedule!r}; accepted: ramp, constant")
    if not all(math.isfinite(v) for v in values):
        raise DiffsampError(f"c: must be finite, got {values}")
    return (0.0, *values[1:])


def _lag(tau: str | int, i: int) -> int:
    """The row whose noise prediction row i is mixed with."""
    if tau == "first":
        return 0
    if tau == "previous":
        return i - 1
    if isinstance(tau, int) and not isinstance(tau, bool) and tau >= 1:
        return max(i - tau, 0)
    raise DiffsampError(f"tau: got {tau!r}; accepted: first, previous, or how many steps back (1 or above)")


def pinned_noise(plan: Plan) -> bool | tuple[float, float]:
    """``keep_pin`` of the first row that keeps its noise prediction."""
    level = plan.first_level
    return True if plan.form == "epsilon" else (1.0 / level.sigma, -level.alpha / level.sigma)


class _Bank:
    """The registers of a run as vectors over (x_T, m of row 0, m of row 1, ...)."""

    def __init__(self, plan: Plan) -> None:
        self.unit = np.eye(1 + plan.nfe)
        self.form = plan.form
        self.base = self.input = self.unit[0]
        self.history: list[np.ndarray] = []
        self.pin = np.zeros_like(self.unit[0])
        self.noise: list[np.ndarray] = []

    def output(self, i: int, row: Row) -> None:
        """Take in the output of row i."""
        m = self.unit[1 + i]
        if row.keep_pin:
            self.pin = row.pinned(self.input, m)
        self.history.insert(0, m)
        self.noise.append(m if self.form == "epsilon" else (self.input - row.level.alpha * m) / row.level.sigma)

    def mixed(self, mix: Mix, history: Sequence[np.ndarray] | None = None) -> np.ndarray:
        total = mix.base * self.base + mix.input * self.input + mix.pin * self.pin
        for weight, m in zip(mix.m, self.history if history is None else history, strict=False):
            total = total + weight * m
        return total

    def as_mix(self, target: np.ndarray) -> Mix:
        """The combination of registers with the shortest history that equals ``target``."""
        scale = max(1.0, float(np.abs(target).max()))

        def over(depth: int) -> Mix | None:
            for use_base in (False, True):
                names = ["input", *(["base"] if use_base else []), *(["pin"] if self.pin.any() else [])]
                columns = np.stack([getattr(self, name) for name in names] + self.history[:depth], axis=1)
                solution, *_ = np.linalg.lstsq(columns, target, rcond=1e-14)
                if np.abs(columns @ solution - target).max() <= 1e-11 * scale:
                    solution[np.abs(solution) < 1e-15 * scale] = 0.0
                    return Mix(m=tuple(solution[len(names) :]), **dict(zip(names, solution, strict=False)))
            return None

        # What a history can say, a longer one can say too: the shortest is found by bisection.
        depths = range(1, len(self.history) + 1)
        shortest = bisect_left(depths, True, key=lambda depth: over(depth) is not None)
        if shortest == len(depths) or (found := over(depths[shortest])) is None:
            raise DiffsampError(
                "dualfast: a compensation ratio of 0 below drops the newest output, which the mixture needs"
            )
        return found


def _plus(a: Mix, b: Mix) -> Mix:
    def total(first: float, second: float) -> float:
        value = first + second
        # What cancels but for rounding is no term.
        return 0.0 if abs(value) < 1e-12 * abs(first) else value

    m = [total(u, v) for u, v in zip_longest(a.m, b.m, fillvalue=0.0)]
    return Mix(
        base=total(a.base, b.base), input=total(a.input, b.input), m=tuple(m), pin=total(a.pin, b.pin),
        noise=a.noise, old_noise=a.old_noise,
    )  # fmt: skip


@register_solver("dualfast", transform=True, base="dpmpp-2m")
def dualfast(
    plan: Plan,
    *,
    c: float | Sequence[float] | None = None,
    tau: str | int = "first",
    mode: str = "first-order",
    schedule: str = "ramp",
    guidance_scale: float = 1.0,
) -> Plan:
    """DualFast's mixing of noise predictions, on any deterministic multistep solver; the law of c is this project's.

    Args:
        plan: the base: ddim, dpmpp-2m, unipc, deis and the like.
        c: the constant (0: the base itself), one per network call, or None for this project's default: 0.3 for
            first-order solvers, 0.1 for the others.
        tau: which earlier prediction: ``first``, ``previous``, or how many steps back.
        mode: ``first-order`` (only the first-order term sees the mixture) or ``all``.
        schedule: how a single c is spread: ``ramp``, c·(1 − t/T), or ``constant``.
        guidance_scale: only used to warn where a blow-up was measured.

    Raises:
        DiffsampError: unknown option value, wrong number of constants, or a base that is stochastic or has several
            calls per step.

    Source: Yu et al. 2025, DualFast, arXiv:2506.13058.

    @article{yu2025dualfast,
      title={DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models},
      author={Yu, Hu and Luo, Hao and Wang, Fan and Zhao, Feng},
      journal={arXiv preprint arXiv:2506.13058},
      year={2025}
    }
    """
    if mode not in MODES:
        raise DiffsampError(f"mode: got {mode!r}; accepted: {', '.join(MODES)}")
    _lag(tau, 1)
    require_multistep(plan, "dualfast")
    values = constants(plan, c, schedule)
    if mode == "all" and any(row.rewrite is not None for row in plan.rows):
        raise DiffsampError(
            "mode: 'all' is not defined around dc(...); accepted there: first-order, or dc(dualfast(...))"
        )
    if not any(values):
        return plan
    if plan.order >= 2 and guidance_scale > STRONG_GUIDANCE and max(values) > LARGE_C:
        warnings.warn(
            f"dualfast: c up to {max(values):.2g} on a solver of order {plan.order} at guidance {guidance_scale:g} "
            f"was measured to blow up; use c <= {LARGE_C} or `diffsamp calibrate dualfast`",
            stacklevel=2,
        )
    pin_first = tau == "first" and not plan.rows[0].keep_pin
    bank, rows = _Bank(plan), []
    mixed_history: list[np.ndarray] = []
    shift = np.zeros(1 + plan.nfe)  # what the last step's first-order term gained
    for i, row in enumerate(plan.rows):
        if pin_first and i == 0:
            row = replace(row, keep_pin=pinned_noise(plan))
        bank.output(i, row)
        push = values[i] * (bank.noise[i] - bank.noise[_lag(tau, i)]) if values[i] else np.zeros_like(shift)
        ratio = row.level.sigma / row.level.alpha if row.level.alpha else 0.0
        if mode == "all":
            mixed = bank.history[0] + (push if plan.form == "epsilon" else -ratio * push)
            mixed_history.insert(0, mixed)
            row = _all_terms(row, bank, mixed_history)
        elif row.correct is not None and shift.any() and row.correct.m:
            row = replace(row, correct=_plus(row.correct, bank.as_mix(shift)))
        if row.correct is not None:
            bank.base = bank.mixed(row.correct)
        if row.rewrite is not None:
            bank.history[0] = bank.mixed(Mix(m=row.rewrite))
        shift = -(row.next_level.alpha * ratio - row.next_level.sigma) * push
        if mode == "first-order" and values[i]:
            row = replace(row, advance=_plus(row.advance, bank.as_mix(shift)))
        rows.append(row)
        bank.input = bank.mixed(row.advance)
        if row.correct is None:
            bank.base = bank.input
    return plan.with_rows(rows)


def _all_terms(row: Row, bank: _Bank, mixed: Sequence[np.ndarray]) -> Row:
    """The row with mixed outputs in place of raw ones, said in raw ones."""

    def changed(mix: Mix) -> Mix:
        target = bank.mixed(mix, mixed) - bank.mixed(mix)
        return _plus(mix, bank.as_mix(target)) if target.any() else mix

    if row.correct is not None:
        correct = changed(row.correct)
        row = replace(row, correct=correct)
        base, bank.base = bank.base, bank.mixed(correct)
        row = replace(row, advance=changed(row.advance))
        bank.base = base
        return row
    return replace(row, advance=changed(row.advance))
