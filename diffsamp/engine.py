"""The engine: applies a plan to tensors. The only place where solver arithmetic meets a tensor.

A row is compiled once, on the host, to lists of (register, float) terms with the network's prediction type folded in.
A step is then a handful of fused multiply-adds: no lookup by timestep, no scalar tensors, no host synchronisation.
State is passed in and out, so one plan serves any number of runs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import fused, rng
from .errors import DiffsampError
from .plan import Mix, Plan, Row
from .process import Level

Terms = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Program:
    """A row with the prediction type folded in: terms over the registers.

    ``correct``, ``rewrite`` and ``advance`` are the row as written. ``direct`` is the next input written over
    ``input``, ``raw`` and older outputs only: the conversion of the prediction and the new base are substituted on the
    host, in float64. That saves passes over the tensors, and in the epsilon form near alpha = 0 large coefficients
    cancel here and not in the tensors. ``one_pass`` is the same as (weights of ``input``, ``raw`` and the rest, where
    the rest stands), where a compiled loop can take it. ``commit`` is the new base over ``input`` and outputs, applied
    when asked for; ``restore`` is the same over the registers after the row, so that the old input need not be kept.
    They are None where the base cannot be expressed. ``retires`` says that the oldest output that the row reads is the
    run's own and is not read again, so that the new one may be written over it.
    """

    level: Level
    convert: tuple[float, float]
    correct: Terms | None
    rewrite: Terms | None
    advance: Terms
    direct: Terms | None
    commit: Terms | None
    restore: Terms | None
    one_pass: tuple[tuple[float, ...], tuple[int, ...]] | None
    keep_pin: bool | tuple[float, float]
    uses_noise: bool
    retires: bool = False


@dataclass(frozen=True)
class State:
    """Where a run stands: the bank of registers after ``index`` rows.

    Attributes:
        index: rows done; the next network call is row ``index``.
        input: what the network is to be evaluated at, in float32 or better, shape (batch, ...).
        committed: last committed sample, or the terms to combine to get it and the registers that they are over (None:
            this state's own); read it as ``base``.
        history: outputs m in the plan's form, newest first.
        pin: the output kept for good, or None.
        noise: the noise of the last row, or None.
    """

    index: int
    input: torch.Tensor
    committed: torch.Tensor | tuple[Terms, dict[str, torch.Tensor] | None]
    history: tuple[torch.Tensor, ...] = ()
    pin: torch.Tensor | None = None
    noise: torch.Tensor | None = None

    @property
    def base(self) -> torch.Tensor:
        """The last committed sample."""
        if not isinstance(self.committed, tuple):
            return self.committed
        terms, bank = self.committed
        if bank is None:
            bank = {"input": self.input, **{f"m{j}": m for j, m in enumerate(self.history)}}
        return combine(terms, bank)

    def gather(self, index: torch.Tensor) -> State:
        """The state of the samples ``index`` (resampling): every register is gathered along the batch axis."""

        def pick(value: torch.Tensor) -> torch.Tensor:
            return value.index_select(0, index)

        same = self.committed is self.input
        picked = pick(self.input)
        return State(
            self.index,
            picked,
            picked if same else pick(self.base),
            tuple(pick(m) for m in self.history),
            None if self.pin is None else pick(self.pin),
            None if self.noise is None else pick(self.noise),
        )


def programs(plan: Plan, prediction: str) -> tuple[Program, ...]:
    """The compiled rows of ``plan`` for a prediction type; kept on the plan."""
    cache: dict[str, tuple[Program, ...]] = plan.__dict__.setdefault("_programs", {})
    if prediction not in cache:
        made = []
        for i, row in enumerate(plan.rows):
            base, restore = _base_over_bank(plan, i), _restored(row, plan.depth)
            made.append(_compile(row, plan.conversion(i, prediction), base, restore))
        for i in range(plan.depth - 1, len(made)):
            made[i] = replace(made[i], retires=_retires(made[i], made[i - plan.depth + 1], plan.depth))
        cache[prediction] = tuple(made)
    return cache[prediction]


def _retires(program: Program, made_in: Program, depth: int) -> bool:
    """``made_in``: the row whose output is the oldest that a plan of this depth reads in ``program``."""
    if program.one_pass is None or program.one_pass[1][-1:] != (depth - 2,):
        return False
    # A conversion that is none keeps the network's own tensor, a rewriting may keep another register.
    if (0.0, 1.0) in (program.convert, made_in.convert) or made_in.rewrite is not None:
        return False
    reads = program.restore if program.commit is not None else ()
    return reads is not None and f"m{depth - 1}" not in dict(reads)


def _solved(row: Row, least: float) -> Mix | None:
    """The base after a row over ``input`` and outputs as they are then, newest ``m0``: ``advance`` solved for it. None
    where it is not solvable, or the base's weight is below ``least``, which would cost digits."""
    last = row.advance
    if row.correct is None or last.input or last.pin or last.noise or last.old_noise or abs(last.base) < least:
        return None
    return Mix(input=1.0 / last.base, m=tuple(-weight / last.base for weight in last.m))


def _restored(row: Row, depth: int) -> Terms | None:
    """The base after a row over the registers that its state keeps; None where it is not to be had from them."""
    mix = _solved(row, 0.1)
    if mix is None or (depth == 1 and any(mix.m)):  # no output is kept
        return None
    return tuple(mix.terms())


def committed_after(
    program: Program, following: torch.Tensor, bank: dict[str, torch.Tensor] | None
) -> torch.Tensor | tuple[Terms, dict[str, torch.Tensor] | None]:
    """``committed`` of the state after a row of direct terms; ``bank`` is kept where nothing else serves."""
    if program.commit is None:
        return following
    return (program.commit, bank) if program.restore is None else (program.restore, None)


def _base_over_bank(plan: Plan, i: int) -> Mix | None:
    """``base`` at the start of row i as a mix of ``input`` and older outputs (m1, ...); None where it is not one."""
    if i == 0 or plan.rows[i - 1].correct is None:
        return Mix(input=1.0)
    before = plan.rows[i - 1]
    mix = _solved(before, 1e-3)
    if mix is None or before.rewrite is not None or len(mix.m) + 1 > plan.depth:
        return None
    return Mix(input=mix.input, m=(0.0, *mix.m))


def _put_base(mix: Mix, base: Mix) -> Mix:
    """``mix`` with ``base`` substituted."""
    length = max(len(mix.m), len(base.m))
    m = [0.0] * length
    for source, factor in ((mix.m, 1.0), (base.m, mix.base)):
        for j, weight in enumerate(source):
            m[j] += factor * weight
    return Mix(
        base=mix.base * base.base, input=mix.input + mix.base * base.input, m=tuple(m),
        pin=mix.pin + mix.base * base.pin, noise=mix.noise + mix.base * base.noise,
        old_noise=mix.old_noise + mix.base * base.old_noise,
    )  # fmt: skip


_PLACES = {"pin": -1, "noise": -2, "old_noise": -3}


def _compile(row: Row, convert: tuple[float, float], base: Mix | None, restore: Terms | None) -> Program:
    """``base``: the base at the start of the row as a mix of the bank, where it is one."""
    direct = commit = one_pass = None
    if base is not None and row.rewrite is None:
        new = base if row.correct is None else _put_base(row.correct, base)
        mix = _put_base(row.advance, new)
        (p, q), first = convert, mix.m[0] if mix.m else 0.0
        rest = Mix(input=mix.input + first * p, m=(0.0, *mix.m[1:]), pin=mix.pin, noise=mix.noise,
                   old_noise=mix.old_noise)  # fmt: skip
        terms = rest.terms()
        # The prediction is read right after the input, so that both go in one pass.
        direct = (*terms[:1], ("raw", first * q), *terms[1:]) if first * q != 0.0 else tuple(terms)
        commit = None if row.correct is None else tuple(new.terms())
        weight = dict(direct)
        # A pin that is set in this row is the converted output, which the loop has not read.
        if len(weight) > 1 and not (row.keep_pin and "pin" in weight):
            near = (weight.pop("input", 0.0), weight.pop("raw", 0.0))
            places = tuple(_PLACES[name] if name in _PLACES else int(name[1:]) - 1 for name in weight)
            one_pass = ((*near, *weight.values()), places)
    return Program(
        row.level, convert, None if row.correct is None else tuple(row.correct.terms()),
        None if row.rewrite is None else tuple(Mix(m=row.rewrite).terms()), tuple(row.advance.terms()), direct, commit,
        restore, one_pass, row.keep_pin, row.uses_noise,
    )  # fmt: skip


_ONES: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def two(x: torch.Tensor, a: float, y: torch.Tensor, b: float) -> torch.Tensor:
    """a·x + b·y, in one pass where the tensors are large enough for passes to count."""
    if a == 1.0:
        return torch.add(x, y, alpha=b)
    if b == 1.0:
        return torch.add(y, x, alpha=a)
    if x.numel() > 65536 and x.is_contiguous() and y.is_contiguous() and x.shape == y.shape:
        one = _ONES.get((x.device, x.dtype))
        if one is None:
            one = _ONES[x.device, x.dtype] = torch.ones(1, device=x.device, dtype=x.dtype)
        # An outer product with a vector of one element: the only operation of torch with two free coefficients.
        return torch.addr(x.view(1, -1), one, y.view(-1), beta=a, alpha=b).view(x.shape)
    return torch.mul(x, a).add_(y, alpha=b)


def combine(terms: Terms, bank: dict[str, torch.Tensor]) -> torch.Tensor:
    """Σ coefficient·register. One term of coefficient 1 returns the register itself, which is never written to."""
    if not terms:
        return torch.zeros_like(bank["input"])
    name, first = terms[0]
    if len(terms) == 1 and first == 1.0:
        return bank[name]
    if len(terms) == 1:
        return torch.mul(bank[name], first)
    total = two(bank[name], first, bank[terms[1][0]], terms[1][1])
    for name, weight in terms[2:]:
        total.add_(bank[name], alpha=weight)
    return total


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Samples are kept in float32 or float64 whatever the network's dtype is."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def init(plan: Plan, x: torch.Tensor) -> State:
    """State before the first row. ``x`` is alpha·x0 + sigma·epsilon at ``plan.first_level``, shape (batch, ...)."""
    if not x.dtype.is_floating_point:
        raise DiffsampError(f"x: has dtype {x.dtype}; must be a floating-point tensor")
    start = x.to(working_dtype(x.dtype))
    return State(0, start, start)


def step(
    plan: Plan,
    state: State,
    output: torch.Tensor,
    noise: torch.Tensor | None = None,
    *,
    prediction: str = "sample",
    converted: bool = False,
    donate: bool = False,
) -> State:
    """Apply row ``state.index``.

    Args:
        output: the network's raw prediction at ``state.input``, of type ``prediction``.
        noise: fresh unit noise; needed in rows that use it.
        prediction: ``epsilon``, ``sample`` (x0), ``v_prediction``, ``flow_prediction`` or ``edm``.
        converted: ``output`` is already in the plan's form.
        donate: nobody reads ``state`` or an older one again; outputs that the run itself made and that the row retires
            may be written over.

    Raises:
        DiffsampError: the plan is at its end, or noise is missing.
    """
    index = state.index
    if index >= len(plan.rows):
        raise DiffsampError(f"state: the plan has {len(plan.rows)} rows and all are done")
    program = programs(plan, prediction)[index]
    x = state.input
    raw = output if output.dtype is x.dtype else output.to(x.dtype)
    # A base that somebody put in place of the run's own is not what the direct terms assume.
    direct = program.direct if not converted and (state.committed is x or type(state.committed) is tuple) else None
    fresh = None
    if program.uses_noise:
        if noise is None:
            raise DiffsampError(f"noise: row {index} of {plan.solver or 'the plan'} draws noise and got none")
        fresh = noise if noise.dtype is x.dtype else noise.to(x.dtype)
    depth = plan.depth
    older, pin, old_noise = state.history[: depth - 1], state.pin, state.noise
    p, q = (0.0, 1.0) if converted else program.convert
    # Without a history only the direct terms are read.
    unread = direct is not None and depth == 1 and not program.keep_pin and program.commit is None
    m0: torch.Tensor | None = raw if unread or (p == 0.0 and q == 1.0) else None
    following = None
    if direct is not None and program.one_pass is not None and fused.wanted(x, raw):
        # Where the caller has let go of the state, its retired outputs are freed here and their memory, still in the
        # cache, is what the new ones are written to.
        del state
        weights, places = program.one_pass
        others: list[Any] = [older[j] if j >= 0 else (old_noise, fresh, pin)[j] for j in places]
        over = donate and program.retires and m0 is None and others[-1] is not pin
        done = fused.advance(x, raw, others, weights, None if m0 is not None else (p, q), over)
        if done is not None:
            m0, following = done[0] if m0 is None else m0, done[1]
            if over and m0 is others[-1]:
                older = older[:-1]
    if m0 is None:
        m0 = raw * q if p == 0.0 else two(x, p, raw, q)
    history = (m0, *older)
    kept = history if depth > 1 else ()
    if program.keep_pin:
        pin = m0 if program.keep_pin is True else two(x, program.keep_pin[0], m0, program.keep_pin[1])
    if following is not None and (program.commit is None or program.restore is not None):
        return State(index + 1, following, committed_after(program, following, None), kept, pin, fresh)
    bank = {"input": x, "raw": raw}
    for j, m in enumerate(history):
        bank[f"m{j}"] = m
    for name, value in (("pin", pin), ("old_noise", old_noise), ("noise", fresh)):
        if value is not None:
            bank[name] = value
    if direct is not None:
        following = combine(direct, bank) if following is None else following
        return State(index + 1, following, committed_after(program, following, bank), kept, pin, fresh)
    bank["base"] = state.base
    if program.correct is not None:
        bank["base"] = combine(program.correct, bank)
    if program.rewrite is not None:
        bank["m0"] = combine(program.rewrite, bank)
        history = (bank["m0"], *history[1:])
        kept = history if depth > 1 else ()
    following = combine(program.advance, bank)
    committed = following if program.correct is None else bank["base"]
    return State(index + 1, following, committed, kept, pin, fresh)


def require_finite(fine: torch.Tensor, index: int, level: Level) -> None:
    """Refuse step ``index`` if a sample's prediction is not finite; ``fine``: (B,) booleans. One host sync."""
    bad = (~fine).nonzero().flatten().tolist()
    if bad:
        raise DiffsampError(
            f"denoiser: prediction of sample {bad} at step {index} (sigma {level.sigma:.4g}) is not finite"
        )


def sample(
    plan: Plan,
    denoiser: Callable[..., Any],
    x: torch.Tensor,
    *,
    prediction: str = "sample",
    seeds: Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise: Callable[[int], torch.Tensor] | None = None,
    guidance: Any = None,
    corrector: Any = None,
    callback: Callable[[int, State], None] | None = None,
    check_finite: bool = False,
) -> torch.Tensor:
    """Run a plan.

    Args:
        plan: from a solver, or :meth:`Plan.from_scheduler`.
        denoiser: ``denoiser(x, level) -> prediction``; ``float(level)`` is the network's time. With ``guidance`` it
            returns ``(conditional, unconditional, ...)``.
        x: start, alpha·x0 + sigma·epsilon at ``plan.first_level``, shape (batch, ...); not changed.
        prediction: type of the prediction (``sample`` is x0).
        seeds: one per sample; the noise of step i then depends on (seed, i) alone.
        generator: torch generator(s), in place of seeds.
        noise: ``i -> unit noise`` in place of both (a corrector's resampling still follows those).
        guidance: a guidance of :mod:`diffsamp.guidance`, or a text such as ``"apg:7.5"``.
        corrector: of :mod:`diffsamp.correctors`, or a text such as ``"fkc:target=cfg,scale=5,particles=8"``; the batch
            axis then holds its particles.
        callback: called after each row with ``(row number, state)``.
        check_finite: stop at the first prediction that is not finite (one host sync per step).

    Returns:
        the final sample, dtype of ``x``.
    """
    if corrector is not None:
        from .correctors import parse as corrector_of

        return corrector_of(corrector).sample(
            plan, denoiser, x, prediction=prediction, seeds=seeds, generator=generator, noise=noise, guidance=guidance,
            callback=callback, check_finite=check_finite,
        )  # fmt: skip
    if isinstance(guidance, str):
        from .guidance import parse

        guidance = parse(guidance)
    draw = noise if noise is not None else noise_source(plan, x, seeds, generator)
    state = init(plan, x)
    memory = None if guidance is None else guidance.init(x.shape[0], plan.nfe)
    while state.index < len(plan.rows):
        i = state.index
        row = plan.rows[i]
        output = denoiser(state.input if state.input.dtype == x.dtype else state.input.to(x.dtype), row.level)
        kind = prediction
        if guidance is not None:
            output, memory = _guided(plan, guidance, memory, output, state, row, prediction)
            kind = "sample"
        if check_finite:
            require_finite(torch.isfinite(output.flatten(1)).all(1), i, row.level)
        handed = [state]
        del state
        state = step(
            plan, handed.pop(), output, draw(i) if row.uses_noise else None, prediction=kind, donate=callback is None
        )
        if callback is not None:
            callback(i, state)
    return state.input.to(x.dtype)


def _guided(
    plan: Plan, guidance: Any, memory: Any, outputs: Any, state: State, row: Row, prediction: str
) -> tuple[torch.Tensor, Any]:
    if not isinstance(outputs, tuple | list) or len(outputs) < guidance.conditions:
        raise DiffsampError(
            f"denoiser: must return {guidance.conditions} predictions (conditional, unconditional, ...) with guidance"
        )
    p, q = plan.process.x0_coefficients(row.level, prediction)
    x = state.input
    x0 = [torch.mul(o.to(x.dtype), q).add_(x, alpha=p) if p else o.to(x.dtype) * q for o in outputs]
    return guidance(memory, x0[0], x0[1], x, row.level, *x0[2:])


def noise_source(
    plan: Plan,
    x: torch.Tensor,
    seeds: Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Callable[[int], torch.Tensor]:
    """``i -> unit noise`` of the shape of ``x``; without seeds and generator, seeds come from torch's global one."""
    shape, dtype = x.shape[1:], working_dtype(x.dtype)
    if seeds is not None and len(seeds) != x.shape[0]:
        raise DiffsampError(f"seeds: got {len(seeds)} for a batch of {x.shape[0]}; needs one per sample")
    if seeds is None and generator is None and plan.stochastic:
        seeds = torch.randint(0, 2**62, (x.shape[0],)).tolist()
    if seeds is not None:
        fixed = tuple(int(s) for s in seeds)
        return lambda i: rng.normal(fixed, shape, i, x.device, dtype)
    if isinstance(generator, torch.Generator):
        one = generator
        return lambda i: torch.randn(x.shape, generator=one, device=one.device, dtype=dtype).to(x.device)
    if generator is not None and len(generator) != x.shape[0]:
        raise DiffsampError(f"generator: got {len(generator)} for a batch of {x.shape[0]}; needs one per sample")
    many = list(generator or [])
    return lambda i: torch.stack(
        [torch.randn(shape, generator=g, device=g.device, dtype=dtype).to(x.device) for g in many]
    )
