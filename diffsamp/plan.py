"""A plan: the compiled table of a solver on a grid, frozen, float64 and validated when it is built.

Every fast sampler is a linear recurrence over a small bank of tensors. One row of a plan is one network call:

1.  m[0] = p·input + q·F         F: the raw prediction at ``input``; m in x0 or epsilon form
2.  base = correct(bank)         only where a row commits another point than the next input (UniPC, Heun, singlestep)
3.  m[0] = rewrite(m)            only for solvers that change their history in place (DC-Solver)
4.  input = advance(bank)        the next network input; it is the new ``base`` too where step 2 is absent

The bank: ``base`` (last committed sample), ``input`` (where the network was evaluated), ``m[0..k]`` (outputs, newest
first), ``pin`` (an output kept for good), ``noise`` (fresh unit noise), ``old_noise`` (the noise of the row before).

The point-mass invariant: with the exact denoiser of a constant x0, every committed sample must be
alpha·x0 + sigma·(unit noise). It holds for every consistent solver of order >= 1, so it catches index, sign and
alpha/sigma mistakes; it says nothing of the order of accuracy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DiffsampError
from .grids import Grid
from .process import Level, Process

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

REGISTERS = ("base", "input", "pin", "noise", "old_noise")


@dataclass(frozen=True)
class Mix:
    """A linear combination of the bank. ``m`` holds the coefficients of the outputs, newest first."""

    base: float = 0.0
    input: float = 0.0
    m: tuple[float, ...] = ()
    pin: float = 0.0
    noise: float = 0.0
    old_noise: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "m", tuple(float(v) for v in _trim(self.m)))
        for name in REGISTERS:
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def values(self) -> tuple[float, ...]:
        return (self.base, self.input, *self.m, self.pin, self.noise, self.old_noise)

    def terms(self) -> list[tuple[str, float]]:
        """Nonzero terms as (register name, coefficient)."""
        named = [("base", self.base), ("input", self.input)]
        named += [(f"m{j}", v) for j, v in enumerate(self.m)]
        named += [("pin", self.pin), ("noise", self.noise), ("old_noise", self.old_noise)]
        return [(name, value) for name, value in named if value != 0.0]

    def __str__(self) -> str:
        return " ".join(f"{value:+.6g}·{name}" for name, value in self.terms()) or "0"


def _trim(values: Iterable[float]) -> tuple[float, ...]:
    kept = list(values)
    while kept and kept[-1] == 0.0:
        kept.pop()
    return tuple(kept)


@dataclass(frozen=True)
class Row:
    """One network call and what follows from it.

    Attributes:
        level: where the network is evaluated (the level of ``input``).
        advance: the next network input, at ``next_level``.
        next_level: the level of the next input.
        correct: the new ``base``, at ``base_level``; None where the next input is the new base.
        base_level: the level of ``base`` after this row.
        rewrite: weights over (m0, m1, ...) that replace m0 after ``correct`` and before ``advance``; None to keep it.
        keep_pin: store this row's output m0 (before ``rewrite``) in the ``pin`` register; (a, b) stores a·input + b·m0,
            such as the noise prediction in a plan of the x0 form.
        committed: whether the next input is a point of the trajectory, not a stage inside a step (Heun).
    """

    level: Level
    next_level: Level
    advance: Mix
    correct: Mix | None = None
    base_level: Level | None = None
    rewrite: tuple[float, ...] | None = None
    keep_pin: bool | tuple[float, float] = False
    committed: bool = True

    def __post_init__(self) -> None:
        if self.base_level is None:
            object.__setattr__(self, "base_level", self.next_level)
        if self.rewrite is not None:
            object.__setattr__(self, "rewrite", tuple(float(v) for v in self.rewrite))

    def pinned(self, x: Any, m: Any) -> Any:
        """What ``keep_pin`` stores, from the row's input and output."""
        if not isinstance(self.keep_pin, tuple):
            return m
        a, b = self.keep_pin
        return a * x + b * m

    @property
    def uses_noise(self) -> bool:
        """Whether fresh noise is drawn in this row."""
        return self.advance.noise != 0.0 or (self.correct is not None and self.correct.noise != 0.0)

    @property
    def depth(self) -> int:
        """How many outputs, this row's included, the row reads."""
        lengths = [len(self.advance.m), len(self.rewrite or ())]
        if self.correct is not None:
            lengths.append(len(self.correct.m))
        return max(1, *lengths)

    def values(self) -> tuple[float, ...]:
        numbers = [*self.advance.values, *(self.rewrite or ())]
        if self.correct is not None:
            numbers += self.correct.values
        return tuple(numbers)


@dataclass(frozen=True)
class Plan:
    """The table of a solver on a grid. Frozen, hashable, printable; finite and consistent by construction.

    Attributes:
        rows: one :class:`Row` per network call.
        process: the noise process.
        form: what the outputs m are: ``"x0"`` or ``"epsilon"``.
        solver: the registry name (with options) of the solver that made it.
        order: nominal order of accuracy.
        check: whether the point-mass invariant is verified (off only for tables of foreign schedulers).

    Raises:
        DiffsampError: a coefficient is not finite, the noise does not fall from row to row, or the point-mass
            invariant fails. The message names the row.
    """

    rows: tuple[Row, ...]
    process: Process
    grid: Grid
    form: str = "x0"
    solver: str = ""
    order: int = 1
    check: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        if self.form not in ("x0", "epsilon"):
            raise DiffsampError(f"form: got {self.form!r}; accepted: x0, epsilon")
        if not self.rows:
            raise DiffsampError("rows: a plan needs at least one row")
        for i, row in enumerate(self.rows):
            if not all(math.isfinite(v) for v in row.values()):
                raise DiffsampError(
                    f"plan {self.solver or '?'}: row {i} has a coefficient that is not finite: {row.advance}"
                )
            if row.depth > i + 1:
                raise DiffsampError(
                    f"plan {self.solver or '?'}: row {i} reads {row.depth} outputs, but only {i + 1} exist"
                )
        if self.check:
            self._check_point_mass()

    # -- facts ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nfe(self) -> int:
        """Network calls of one run."""
        return len(self.rows)

    @cached_property
    def depth(self) -> int:
        """Length of the history of outputs that a run keeps."""
        return max(row.depth for row in self.rows)

    @property
    def stochastic(self) -> bool:
        """Whether a run draws noise after the start."""
        return any(row.uses_noise for row in self.rows)

    @property
    def first_level(self) -> Level:
        """Where a run starts: x_T = alpha·x0 + sigma·epsilon there."""
        return self.rows[0].level

    @property
    def last_level(self) -> Level:
        """Where a run ends."""
        return self.rows[-1].next_level

    def conversion(self, index: int, prediction: str) -> tuple[float, float]:
        """(p, q) with m[0] = p·input + q·F in row ``index`` for a network of type ``prediction``."""
        level = self.rows[index].level
        if self.form == "x0":
            return self.process.x0_coefficients(level, prediction)
        return self.process.epsilon_coefficients(level, prediction)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the process, the form and every coefficient."""
        digest = hashlib.sha256(f"{self.process.fingerprint} {self.form}".encode())
        for row in self.rows:
            levels = (row.level, row.next_level, row.base_level)
            numbers = [v for level in levels if level is not None for v in (level.t, level.alpha, level.sigma)]
            for part in (row.advance, row.correct):
                numbers += [math.inf] if part is None else [len(part.m), *part.values]
            numbers += row.rewrite or ()
            numbers += row.keep_pin if isinstance(row.keep_pin, tuple) else (float(row.keep_pin),)
            digest.update(np.array(numbers, dtype=np.float64).tobytes())
        return digest.hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.fingerprint == other.fingerprint

    def __str__(self) -> str:
        head = f"{self.solver or 'plan'}: {self.nfe} network calls, form {self.form}, {self.process}"
        lines = [head, "  i         t      alpha      sigma   table"]
        for i, row in enumerate(self.rows):
            level = row.level
            lines.append(f"{i:3d} {level.t:9.3f} {level.alpha:10.6f} {level.sigma:10.6f}   input = {row.advance}")
            if row.correct is not None:
                lines.append(f"{'':36s}base  = {row.correct}")
            if row.rewrite is not None:
                lines.append(f"{'':36s}m0    = {Mix(m=row.rewrite)}")
        return "\n".join(lines)

    def with_rows(self, rows: Sequence[Row], **changes: Any) -> Plan:
        """The same plan with other rows (and other fields), validated again."""
        return replace(self, rows=tuple(rows), **changes)

    # -- running the table on numpy arrays -------------------------------------------------------------------------

    def simulate(
        self,
        x: np.ndarray,
        output: Callable[[int, Row, np.ndarray], np.ndarray],
        noise: Callable[[int], np.ndarray] | None = None,
        visit: Callable[[int, Row, np.ndarray, np.ndarray], Any] | None = None,
    ) -> np.ndarray:
        """Run the table in float64 on numpy arrays: the definition that the engine is tested against.

        Args:
            x: the start, any shape.
            output: ``(i, row, input) -> m`` in the plan's form.
            noise: ``i -> fresh unit noise``.
            visit: called after each row with ``(i, row, next input, base)``; a pair that it returns takes their place.

        Returns:
            the final sample, shape of ``x``.
        """
        base = current = np.asarray(x, dtype=np.float64)
        zero = np.zeros_like(current)
        history: list[np.ndarray] = []
        pin = fresh = old = zero
        for i, row in enumerate(self.rows):
            m0 = output(i, row, current)
            if row.keep_pin:
                pin = row.pinned(current, m0)
            history = [m0, *history[: self.depth - 1]]
            old, fresh = fresh, (noise(i) if noise is not None and row.uses_noise else zero)

            def mixed(mix: Mix, base: np.ndarray) -> np.ndarray:
                total = mix.base * base + mix.input * current + mix.pin * pin  # noqa: B023 - used at once
                total = total + mix.noise * fresh + mix.old_noise * old  # noqa: B023
                for weight, m in zip(mix.m, history, strict=False):  # noqa: B023
                    total = total + weight * m
                return total

            if row.correct is not None:
                base = mixed(row.correct, base)
            if row.rewrite is not None:
                history[0] = sum((w * m for w, m in zip(row.rewrite, history, strict=False)), zero)
            current = mixed(row.advance, base)
            if row.correct is None:
                base = current
            if visit is not None:
                current, base = visit(i, row, current, base) or (current, base)
        return current

    def response(self, prediction: str = "sample") -> np.ndarray:
        """Every network input and the final sample as combinations of x_T, the raw predictions and the noises.

        This is canonical: it does not depend on how a solver names its registers, so two implementations of one
        sampler have equal responses. Shape ``(nfe + 1, 1 + 2·nfe)``: columns x_T, F_0.., noise_0..
        """
        n = self.nfe
        unit = np.eye(1 + 2 * n)
        rows = [unit[0]]

        def output(i: int, row: Row, current: np.ndarray) -> np.ndarray:
            p, q = self.conversion(i, prediction)
            return p * current + q * unit[1 + i]

        self.simulate(unit[0], output, lambda i: unit[1 + n + i], lambda i, row, current, base: rows.append(current))
        return np.stack(rows)

    def _check_point_mass(self) -> None:
        # Symbols: x0, the initial noise, one fresh noise per row.
        n = self.nfe
        unit = np.eye(2 + n)
        start = self.rows[0].level

        def output(i: int, row: Row, current: np.ndarray) -> np.ndarray:
            if self.form == "x0":
                return unit[0]
            return (current - row.level.alpha * unit[0]) / row.level.sigma

        def visit(i: int, row: Row, current: np.ndarray, base: np.ndarray) -> None:
            assert row.base_level is not None
            for what, value, level in (("input", current, row.next_level), ("base", base, row.base_level)):
                signal, spread = value[0], float(np.sqrt((value[1:] ** 2).sum()))
                scale = max(level.alpha, level.sigma, 1e-12)
                if abs(signal - level.alpha) > 1e-7 * scale or abs(spread - level.sigma) > 1e-7 * scale:
                    raise DiffsampError(
                        f"plan {self.solver or '?'}: row {i} breaks the point-mass invariant: {what} is "
                        f"{signal:.9g}·x0 + {spread:.9g}·noise, should be {level.alpha:.9g} and {level.sigma:.9g}"
                    )

        self.simulate(start.alpha * unit[0] + start.sigma * unit[1], output, lambda i: unit[2 + i], visit)

    # -- the table of somebody else's scheduler --------------------------------------------------------------------

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin, num_inference_steps: int | None = None, **options: Any) -> Plan:
        """The plan of any diffusers scheduler, found by its impulse response. See :mod:`diffsamp.impulse`."""
        from .impulse import from_scheduler

        return from_scheduler(scheduler, num_inference_steps, **options)
