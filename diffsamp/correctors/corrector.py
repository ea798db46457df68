"""Weighted simulation: ``init / step / finish`` around a stochastic plan, and a loop that runs them.

The batch holds groups of particles, sample = group·particles + slot. One row of the plan is: evaluate the network;
close the weights of the step before; resample groups that need it (every register of the solver, the fresh
predictions and the accounts of the potentials move with the ancestors); apply the row with the mixed prediction and
fresh noise per slot. Nothing costs a network call beyond particles × steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .. import engine, rng
from ..errors import DiffsampError
from ..plan import Plan
from . import weights as lw
from .distributed import Alone
from .potentials import Potential, Steering, Tilt, Twist, evaluate, seen
from .resampling import scheme
from .spans import power_gains, require_noise, spans
from .targets import Target

CHOICES = ("draw", "best", "all")
_RESAMPLING_STREAM = 2
_CHOICE_STREAM = 3


@dataclass(frozen=True)
class StepInfo:
    """What happened when the weights of a step were closed, per group.

    Attributes:
        row: row of the plan that was about to be applied; the number of rows at the end.
        noise_to_signal: where.
        ess: effective sample size before resampling, in 1..particles.
        resampled: which groups were resampled.
        ancestors: (groups, particles): the slot that each slot continues.
        log_z: log of the normalising constant so far, relative to the start.
        discarded: standard deviation over particles of the increments that the window or the clamp threw away.
    """

    row: int
    noise_to_signal: float
    ess: np.ndarray
    resampled: np.ndarray
    ancestors: np.ndarray
    log_z: np.ndarray
    discarded: np.ndarray


@dataclass(frozen=True)
class State:
    """Where a weighted run stands. Tensors hold this process's share, numpy arrays all particles.

    Attributes:
        run: the engine's state.
        log_weights: (groups, particles), since the last resampling of each group.
        log_z: (groups,), of the resamplings so far.
        roots: (groups, particles): the initial slot that each slot descends from.
        pending: increments of the open step that are known, float64 of shape (local,); None before the first.
        opened: (Q, span) of the open step for the closing by trapezoid; None elsewhere.
        paid: log-potential already in the weights, float64 of shape (local,).
        peak: largest reward on the path, float64 of shape (local,).
        since: noise-to-signal at which the open step began.
        below: Q at the lowest point of a churned step, until the way up from it is counted.
        info: one :class:`StepInfo` per closed step.
    """

    run: engine.State
    log_weights: np.ndarray
    log_z: np.ndarray
    roots: np.ndarray
    pending: torch.Tensor | None = None
    opened: tuple[torch.Tensor, float, float] | None = None
    paid: torch.Tensor | None = None
    peak: torch.Tensor | None = None
    since: float = math.inf
    below: torch.Tensor | None = None
    info: tuple[StepInfo, ...] = ()


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        samples: all particles, (groups·particles, ...).
        log_weights: (groups, particles).
        log_z: (groups,): log normalising constant relative to the start distribution.
        chosen: index into ``samples`` of the particle of each group that ``choose`` picks.
        info: per closed step; ``roots``: initial slot of each particle.
        nfe: network evaluations per group (particles × rows, times the number of predictions).
    """

    samples: torch.Tensor
    log_weights: np.ndarray
    log_z: np.ndarray
    chosen: np.ndarray
    info: tuple[StepInfo, ...]
    roots: np.ndarray
    nfe: int

    @property
    def weights(self) -> np.ndarray:
        """Normalised weights, (groups, particles)."""
        return lw.normalise(self.log_weights)

    @property
    def resamplings(self) -> np.ndarray:
        """How often each group was resampled."""
        return np.sum([i.resampled for i in self.info], axis=0)

    @property
    def unique_ancestors(self) -> np.ndarray:
        """Distinct initial slots among the particles of each group."""
        return lw.unique(self.roots)


@dataclass(frozen=True)
class Corrector:
    """A Feynman-Kac corrector. Make one with :func:`diffsamp.correctors.fkc`; this class checks nothing twice.

    Attributes:
        target: what to sample; None: the denoiser's own density (with a ``potential``).
        particles: K, per group.
        ess: resample a group when its effective sample size is below ``ess``·K; 1 resamples at every step at which
            weights differ.
        resampling: systematic, stratified, residual, multinomial or ssp.
        rule: ``left``, ``trapezoid``, or ``auto``: trapezoid from 40 steps on, where it is the better one.
        window: (lowest, highest) noise-to-signal at which weights count.
        clamp: bound on the centred increment of one step, None for none. It biases; see the infos' ``discarded``.
        potential: a tilt, steering or twist by a reward.
        choose: ``draw`` one particle per group by weight, ``best`` by weight, or ``all``.
        chunk: most samples per network call; None for all at once.
        scale_start: scale the start noise by 1/√B in :meth:`init`.
        shard: particles spread over processes (:class:`diffsamp.correctors.Shared`).
    """

    target: Target | None = None
    particles: int = 8
    ess: float = 0.5
    resampling: str = "systematic"
    rule: str = "auto"
    window: tuple[float, float] = (0.0, math.inf)
    clamp: float | None = None
    potential: Potential | None = None
    choose: str = "draw"
    chunk: int | None = None
    scale_start: bool = True
    shard: Alone = field(default_factory=Alone, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.particles, bool) or not isinstance(self.particles, int) or self.particles < 1:
            raise DiffsampError(f"particles: got {self.particles!r}; must be a whole number of 1 or above")
        if not (isinstance(self.ess, int | float) and 0.0 < self.ess <= 1.0):
            raise DiffsampError(f"ess: got {self.ess!r}; must be in (0, 1], a share of the particles")
        if self.rule not in ("auto", "left", "trapezoid"):
            raise DiffsampError(f"rule: got {self.rule!r}; accepted: auto, left, trapezoid")
        if self.choose not in CHOICES:
            raise DiffsampError(f"choose: got {self.choose!r}; accepted: {', '.join(CHOICES)}")
        if not 0.0 <= self.window[0] < self.window[1]:
            raise DiffsampError(f"window: got {self.window}; needs 0 <= lowest < highest noise-to-signal")
        if self.window != (0.0, math.inf) and isinstance(self.potential, Steering | Twist):
            raise DiffsampError(f"window: got {self.window}; steering and twists need every step, leave it out")
        if self.clamp is not None and not self.clamp > 0:
            raise DiffsampError(f"clamp: got {self.clamp}; must be above 0, or None")
        if self.chunk is not None and not (isinstance(self.chunk, int) and self.chunk >= 1):
            raise DiffsampError(f"chunk: got {self.chunk!r}; must be a whole number of 1 or above")
        scheme(self.resampling)

    # -- facts --------------------------------------------------------------------------------------------------------

    @property
    def plain(self) -> bool:
        """Nothing to correct: one density to the power 1 and no reward."""
        return self.potential is None and (self.target is None or self.target.trivial)

    @property
    def conditions(self) -> int:
        """Predictions that the denoiser must return."""
        return 1 if self.target is None else self.target.conditions

    def _trapezoid(self, plan: Plan) -> bool:
        steps = sum(span.stop < span.start for span in spans(plan))
        return self.rule == "trapezoid" or (self.rule == "auto" and steps >= 40)

    def _groups(self, n: int) -> int:
        if n % self.particles:
            raise DiffsampError(f"x: a batch of {n} does not divide into groups of {self.particles} particles")
        return n // self.particles

    # -- init / step / finish -----------------------------------------------------------------------------------------

    def init(self, plan: Plan, x: torch.Tensor) -> State:
        """State before the first row.

        Args:
            x: the start of every particle of every process, alpha·x0 + sigma·epsilon at ``plan.first_level`` with unit
                epsilon; scaled here by 1/√B, the spread of the target at high noise (unless ``scale_start`` is off).
        """
        require_noise(plan)
        groups = self._groups(x.shape[0])
        share = self.shard.share(x.shape[0])
        total = 1.0 if self.target is None else self.target.total
        start = x[share]
        if total != 1.0 and self.scale_start:
            start = start / math.sqrt(total)
        shape = (groups, self.particles)
        roots = np.broadcast_to(np.arange(self.particles), shape).copy()
        zero = torch.zeros(start.shape[0], dtype=torch.float64, device=x.device)
        account = zero if isinstance(self.potential, Steering | Twist) else None
        peak = torch.full_like(zero, -math.inf) if account is not None else None
        return State(engine.init(plan, start), np.zeros(shape), np.zeros(groups), roots, paid=account, peak=peak)

    def step(
        self,
        plan: Plan,
        state: State,
        outputs: Sequence[torch.Tensor] | torch.Tensor,
        noise: torch.Tensor | Callable[[int], torch.Tensor] | None = None,
        uniforms: Callable[[int], np.ndarray] | None = None,
        *,
        prediction: str = "sample",
    ) -> State:
        """Close the step before, resample, and apply row ``state.run.index``.

        Args:
            outputs: the target's predictions at ``state.run.input``, each of the shape of the local particles.
            noise: fresh unit noise, or ``row -> noise``, used where the row draws it.
            uniforms: ``row -> (groups, 2·particles)`` uniforms in [0, 1), asked only when a group is resampled.
            prediction: type of the predictions.
        """
        index = state.run.index
        row, span = plan.rows[index], spans(plan)[index]
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
        extra: Any = None
        rate: torch.Tensor | None = None
        if len(outputs) != self.conditions:
            raise DiffsampError(
                f"denoiser: returned {len(outputs)} predictions; {self.target.name if self.target else 'this'} "
                f"needs {self.conditions}"
            )
        if not self.plain:
            outputs = self._x0(plan, state.run, row.level, outputs, prediction)
            prediction = "sample"
            state, outputs, extra, rate = self._close(plan, state, outputs, row, span, uniforms)
        fresh: Any = (noise(index) if callable(noise) else noise) if row.uses_noise else None
        x = state.run.input
        if self.plain:
            used = 0 if self.target is None else [b != 0.0 for b in self.target.powers].index(True)
            return replace(state, run=engine.step(plan, state.run, outputs[used], fresh, prediction=prediction))
        mixed = outputs[0] if self.target is None else self.target.mix(outputs, x, row.level)  # type: ignore
        pending, opened = state.pending, state.opened
        if span.opens:
            none = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
            pending, gained = none, rate
            if gained is None:
                gained = none if self.target is None else self.target.rate(outputs, x, row.level)  # type: ignore
            start, stop = self._whole_step(plan, index)
            s = row.level.noise_to_signal
            if isinstance(self.potential, Tilt):
                assert extra is not None
                value, slope = extra
                beta = self.potential.beta(start)
                gained = gained + beta * _dot(slope, mixed - x / row.level.alpha)
                pending = pending + (self.potential.beta(stop) - beta) * value
            opened = (gained, start, stop)
            if not (self._trapezoid(plan) and start < 3.0 * stop):
                # Left point on the net move: h/(2 s²)·Q, s the level at which Q was seen.
                part = 0.5 * (start - stop) / s * (start + stop) / s if math.isfinite(s) else 0.0
                pending = pending + part * gained
                opened = None
            state = replace(state, since=start)
        elif opened is not None and self.target is not None and not isinstance(self.potential, Tilt):
            up, seen_at = plan.rows[index - 1].level.noise_to_signal, row.level.noise_to_signal
            if up > opened[1] and seen_at == opened[2]:
                # The stage of a churned step at the end of the way down closes that way; the next way up is taken off.
                below = self.target.rate(outputs, x, row.level)  # type: ignore
                pending = pending + 0.5 * math.log(up / seen_at) * (opened[0] + below)  # type: ignore
                state, opened = replace(state, below=below), None
        shift, spread = None, 1.0
        if self.target is not None and self.target.total != 1.0 and span.churn > 0.0:
            drift, spread = power_gains(self.target.total, span.stop / span.start, span.churn)
            mixed = self.target.mix(outputs, x, row.level, drift)  # type: ignore
        if isinstance(self.potential, Tilt):
            if extra is None:
                extra = evaluate(self.potential.reward, x / row.level.alpha, True)
            z, s = span.churn, row.level.noise_to_signal
            mixed = mixed + (s * s * self.potential.beta(s) * z / (1.0 + z)) * extra[1]
        elif isinstance(self.potential, Twist) and row.advance.noise != 0.0:
            assert extra is not None and fresh is not None and pending is not None
            level, c = row.level, row.advance.noise * spread
            gain = self.potential.scale * level.alpha / (level.alpha**2 + level.sigma**2)
            shift = (c * c * gain) * extra[1].to(x.dtype)
            pending = pending - _dot(shift, fresh.to(x.dtype)) / c - _dot(shift, shift) / (2.0 * c * c)
        if spread != 1.0 and fresh is not None:
            fresh = fresh * spread
        run = engine.step(plan, state.run, mixed, fresh, prediction="sample")
        if shift is not None:
            # Beside the recurrence: the history holds the sampler's own outputs, so its law given the past is known.
            moved = run.input + shift
            run = replace(run, input=moved, committed=moved if run.committed is run.input else run.base)
        return replace(state, run=run, pending=pending, opened=opened)

    def finish(self, plan: Plan, state: State) -> State:
        """Close the last step at the final sample; no resampling."""
        if self.plain:
            return state
        inner = state.pending
        if state.opened is not None:
            rate, start, stop = state.opened
            inner = inner + 0.5 * (1.0 - (stop / start) ** 2) * rate  # type: ignore
        state = replace(state, pending=inner, opened=None)
        if isinstance(self.potential, Steering | Twist):
            level = plan.last_level
            value, _ = evaluate(seen(self.potential), state.run.input / level.alpha)
            state = self._charge(state, value, final=True)
        return self._settle(plan, state, len(plan.rows), plan.last_level.noise_to_signal, None)[0]

    # -- parts --------------------------------------------------------------------------------------------------------

    def _x0(self, plan, run, level, outputs, prediction):
        x = run.input
        p, q = plan.process.x0_coefficients(level, prediction)
        if prediction == "sample":
            return tuple(o.to(x.dtype) for o in outputs)
        return tuple(torch.mul(o.to(x.dtype), q).add_(x, alpha=p) for o in outputs)

    def _whole_step(self, plan: Plan, index: int) -> tuple[float, float]:
        """Net move of the step that row ``index`` opens, whatever stages it takes."""
        table = spans(plan)
        last = index
        while last + 1 < len(table) and not table[last + 1].opens:
            last += 1
        return table[index].start, table[last].stop

    def _close(
        self, plan: Plan, state: State, outputs: Any, row: Any, span: Any, uniforms: Any
    ) -> tuple[State, Any, Any, torch.Tensor | None]:
        """State after the closing, and what moved with the ancestors: predictions, reward and slope, Q where known."""
        x, level = state.run.input, row.level
        extra: Any = None
        rate: torch.Tensor | None = None
        if isinstance(self.potential, Tilt) and span.opens:
            extra = evaluate(self.potential.reward, x / level.alpha, True)
        elif isinstance(self.potential, Steering | Twist) and span.opens:
            mixed = outputs[0] if self.target is None else self.target.mix(outputs, x, level)
            extra = evaluate(seen(self.potential), mixed, isinstance(self.potential, Twist))
            state = self._charge(state, extra[0], final=False)
        if not span.opens or state.pending is None:
            return state, outputs, extra, None
        if state.below is not None and self.target is not None:
            up = math.log(level.noise_to_signal / span.start)
            rate = self.target.rate(outputs, x, level)
            rise = 0.5 * up * (state.below + rate)
            state = replace(state, pending=state.pending - rise, below=None)
        if state.opened is not None:
            before, start, stop = state.opened
            if rate is None and self.target is not None:
                rate = self.target.rate(outputs, x, level)
            now = torch.zeros_like(before) if rate is None else rate
            if isinstance(self.potential, Tilt):
                mixed = outputs[0] if self.target is None else self.target.mix(outputs, x, level)
                now = now + self.potential.beta(span.start) * _dot(extra[1], mixed - x / level.alpha)
            if math.isfinite(start):
                assert state.pending is not None
                state = replace(state, pending=state.pending + math.log(start / stop) / 2 * (before + now))
        moved = list(outputs) + ([] if extra is None else [e for e in extra if e is not None])
        moved += [] if rate is None else [rate]
        state, moved = self._settle(plan, state, state.run.index, level.noise_to_signal, uniforms, moved)
        rate = None if rate is None else moved.pop()
        if extra is not None:
            values = moved[len(outputs) :]
            extra = (values[0], values[1] if len(values) > 1 else None)
        return state, tuple(moved[: len(outputs)]), extra, rate

    def _charge(self, state: State, value: torch.Tensor, *, final: bool) -> State:
        """Bring the potential of rewards ``value`` into the open increments."""
        assert self.potential is not None and state.paid is not None and state.peak is not None
        worth = self.potential.scale * value
        kind = self.potential.kind if isinstance(self.potential, Steering) else "difference"
        peak = torch.maximum(state.peak, worth)
        if final or kind == "difference":
            due = worth - state.paid
        else:
            due = peak if kind == "maximum" else worth
        pending = state.pending if state.pending is not None else torch.zeros_like(due)
        return replace(state, pending=pending + due, paid=state.paid + due, peak=peak)

    def _settle(
        self, plan: Plan, state: State, row: int, where: float, uniforms: Any, moved: Any = ()
    ) -> tuple[State, list[torch.Tensor]]:
        """Add the open increments to the log-weights, and resample the groups that need it."""
        groups, particles = state.log_weights.shape
        assert state.pending is not None
        pending = self.shard.collect(state.pending).cpu().numpy().reshape(groups, particles)
        used = pending
        if not self.window[0] <= state.since <= self.window[1]:
            used = np.zeros_like(pending)
        elif self.clamp is not None:
            used = np.clip(pending - pending.mean(1, keepdims=True), -self.clamp, self.clamp)
        with np.errstate(invalid="ignore"):
            discarded = np.nan_to_num((pending - used).std(1))
        log_weights = lw.check(state.log_weights + used)
        sizes = lw.ess(log_weights)
        due = (sizes < self.ess * particles * (1 - 1e-9)) if uniforms is not None and particles > 1 else sizes < 0
        ancestors = np.broadcast_to(np.arange(particles), (groups, particles)).copy()
        log_z, roots, run = state.log_z, state.roots, state.run
        paid, peak, moved = state.paid, state.peak, list(moved)
        if due.any() and uniforms is not None:
            ancestors[due] = scheme(self.resampling)(lw.normalise(log_weights[due]), uniforms(row)[due])
            log_z = log_z + np.where(due, lw.log_mean(log_weights), 0.0)
            log_weights = np.where(due[:, None], 0.0, log_weights)
            roots = np.take_along_axis(roots, ancestors, 1)
            flat = (ancestors + particles * np.arange(groups)[:, None]).ravel()
            run, accounts, moved = self._gather(run, [t for t in (paid, peak) if t is not None], moved, flat)
            paid, peak = accounts if accounts else (None, None)
        seen = log_z + lw.log_mean(log_weights)
        info = StepInfo(row, where, sizes, due, ancestors, seen, discarded)
        made = State(run, log_weights, log_z, roots, None, None, paid, peak, state.since, None, (*state.info, info))
        return made, moved

    def _gather(self, run: engine.State, accounts: list, moved: list, flat: np.ndarray):
        if self.shard.world == 1:
            # The engine knows its registers.
            index = torch.from_numpy(flat).to(run.input.device)
            return run.gather(index), self.shard.exchange(accounts, flat), self.shard.exchange(moved, flat)
        same = run.committed is run.input
        optional = [t for t in (run.pin, run.noise) if t is not None]
        registers = [run.input, *([] if same else [run.base]), *run.history, *optional]
        got = self.shard.exchange([*registers, *accounts, *moved], flat)
        at = iter(got)
        x = next(at)
        base = x if same else next(at)
        history = tuple(next(at) for _ in run.history)
        pin = next(at) if run.pin is not None else None
        noise = next(at) if run.noise is not None else None
        rest = list(at)
        return engine.State(run.index, x, base, history, pin, noise), rest[: len(accounts)], rest[len(accounts) :]

    # -- a whole run --------------------------------------------------------------------------------------------------

    def run(
        self,
        plan: Plan,
        denoiser: Callable[..., Any],
        x: torch.Tensor,
        *,
        prediction: str = "sample",
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Callable[[int], torch.Tensor] | None = None,
        guidance: Any = None,
        callback: Callable[[int, Any], None] | None = None,
        check_finite: bool = False,
    ) -> Result:
        """Run a plan with weights.

        Args:
            denoiser: ``denoiser(x, level)`` gives the target's predictions (one tensor or a tuple). With ``chunk`` or
                several processes it is given ``rows=`` too, the slice of the batch that ``x`` is, if it takes that.
            x: starts of all particles, (groups·particles, ...).
            seeds: one per group (slots get their own, derived) or one per particle. The noise and the ancestry of a
                group then depend on its seed alone.
            generator: one torch generator in place of seeds.
            noise: ``row -> unit noise`` of the shape of ``x``, in place of what seeds or the generator would draw;
                resampling and the choice at the end still follow those.
            guidance: must be None: guidance is a target here.
            check_finite: stop at the first prediction that is not finite (one host sync per step).

        Raises:
            DiffsampError: the plan is deterministic, the batch is no whole number of groups, a reward, a weight or
                (with ``check_finite``) a prediction is not finite, or ``noise`` has another shape.
        """
        if guidance is not None:
            raise DiffsampError("guidance: is the target of a corrector; write target=cfg,scale=... and leave it out")
        n = x.shape[0]
        groups, share = self._groups(n), self.shard.share(n)
        draw, uniforms, pick = self._randomness(plan, x, groups, share, seeds, generator)
        if noise is not None:
            draw = _given(noise, x.shape, share)
        state = self.init(plan, x)
        while state.run.index < len(plan.rows):
            index = state.run.index
            level = plan.rows[index].level
            value = state.run.input if state.run.input.dtype == x.dtype else state.run.input.to(x.dtype)
            outputs = self._evaluate(denoiser, value, level, share.start)
            if check_finite:
                self._require_finite(outputs, index, level)
            state = self.step(plan, state, outputs, draw, uniforms, prediction=prediction)
            if callback is not None:
                callback(index, state)
        state = self.finish(plan, state)
        samples = self.shard.collect(state.run.input).to(x.dtype)
        return self.result(plan, state, samples, pick())

    def sample(self, plan: Plan, denoiser: Callable[..., Any], x: torch.Tensor, **options: Any) -> torch.Tensor:
        """:meth:`run`, and of its particles what ``choose`` says: one per group, or all."""
        result = self.run(plan, denoiser, x, **options)
        return result.samples if self.choose == "all" else result.samples[torch.from_numpy(result.chosen).to(x.device)]

    def result(self, plan: Plan, state: State, samples: torch.Tensor, u: np.ndarray) -> Result:
        """The result of a finished state; ``u``: one uniform per group, for the draw."""
        groups, particles = state.log_weights.shape
        weights = lw.normalise(state.log_weights)
        if self.choose == "best":
            slot = weights.argmax(1)
        else:
            slot = np.minimum((np.cumsum(weights, 1) <= u[:, None] * (1 - 1e-12)).sum(1), particles - 1)
        chosen = slot + particles * np.arange(groups)
        log_z = state.log_z + lw.log_mean(state.log_weights)
        nfe = plan.nfe * particles * self.conditions
        return Result(samples, state.log_weights, log_z, chosen, state.info, state.roots, nfe)

    def _evaluate(self, denoiser: Callable[..., Any], x: torch.Tensor, level: Any, offset: int) -> Any:
        placed = (self.chunk is not None or self.shard.world > 1) and _takes_rows(denoiser)
        size = self.chunk or max(x.shape[0], 1)
        parts = []
        for at in range(0, x.shape[0], size):
            piece = x[at : at + size]
            where = {"rows": slice(offset + at, offset + at + len(piece))} if placed else {}
            found = denoiser(piece, level, **where)
            parts.append((found,) if isinstance(found, torch.Tensor) else tuple(found))
        return parts[0] if len(parts) == 1 else tuple(torch.cat(same) for same in zip(*parts, strict=True))

    def _require_finite(self, outputs: Sequence[torch.Tensor], index: int, level: Any) -> None:
        fine = torch.stack([torch.isfinite(o.flatten(1)).all(1) for o in outputs]).all(0)
        # Of all processes, so that none is left waiting for one that has stopped.
        engine.require_finite(self.shard.collect(fine.to(torch.float64)) != 0, index, level)

    def _randomness(self, plan: Plan, x: torch.Tensor, groups: int, share: slice, seeds: Any, generator: Any) -> Any:
        shape, dtype = x.shape[1:], engine.working_dtype(x.dtype)
        if seeds is None and generator is None:
            seeds = torch.randint(0, 2**62, (groups,)).tolist()
        if seeds is not None:
            slots = slot_seeds(seeds, groups, self.particles)
            heads = slots[:: self.particles]
            mine = slots[share]
            return (
                lambda i: rng.normal(mine, shape, i, x.device, dtype),
                lambda i: rng.uniform(heads, (2 * self.particles,), i, stream=_RESAMPLING_STREAM),
                lambda: rng.uniform(heads, (1,), len(plan.rows), stream=_CHOICE_STREAM)[:, 0],
            )
        if not isinstance(generator, torch.Generator):
            raise DiffsampError("generator: a corrector takes one torch.Generator, or seeds")
        g: torch.Generator = generator
        return (
            lambda i: torch.randn(x.shape, generator=g, device=g.device, dtype=dtype).to(x.device)[share],
            lambda i: torch.rand((groups, 2 * self.particles), generator=g, device=g.device, dtype=torch.float64)
            .cpu()
            .numpy(),
            lambda: torch.rand(groups, generator=g, device=g.device, dtype=torch.float64).cpu().numpy(),
        )


def slot_seeds(seeds: Sequence[int], groups: int, particles: int) -> list[int]:
    """One seed per particle: as given, or slot 0 with its group's and the others derived from it.

    Raises:
        DiffsampError: another number of seeds, or two particles of a group with one seed (their noise would be equal).
    """
    if len(seeds) == groups * particles:
        made = [int(s) for s in seeds]
    elif len(seeds) == groups:
        made = []
        for seed in seeds:
            derived = np.random.SeedSequence([int(seed), 0xFEC]).generate_state(particles, np.uint64)
            made += [int(seed), *(int(s) for s in derived[1:])]
    else:
        raise DiffsampError(f"seeds: got {len(seeds)}; needs {groups} (one per group) or {groups * particles}")
    for g in range(groups):
        mine = made[g * particles : (g + 1) * particles]
        if len(set(mine)) < particles:
            raise DiffsampError(f"seeds: two particles of group {g} share a seed; duplicates would stay identical")
    return made


def _given(
    noise: Callable[[int], torch.Tensor], shape: torch.Size, share: slice
) -> Callable[[int], torch.Tensor]:
    """This process's rows of a noise that the caller supplies for all particles."""

    def draw(row: int) -> torch.Tensor:
        found = noise(row)
        if found.shape != shape:
            raise DiffsampError(f"noise: got shape {tuple(found.shape)} at row {row}; needs {tuple(shape)}")
        return found[share]

    return draw


def _takes_rows(denoiser: Callable[..., Any]) -> bool:
    import inspect

    try:
        parameters = inspect.signature(denoiser).parameters
    except (TypeError, ValueError):
        return False
    return "rows" in parameters


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.flatten(1).to(torch.float64) * b.flatten(1).to(torch.float64)).sum(1)
