"""The written form of a corrector and the function behind it: ``fkc:target=cfg,scale=3,particles=8,ess=0.5``.

    fkc:target=cfg,particles=8,ess=0.5         the scale is the pipeline's own
    fkc:target=cfg,scale=4,beta=1.2            annealed guidance
    fkc:target=anneal,beta=1.5
    fkc:target=product,n=2,power=0.5           geometric average of two experts
    fkc:target=composed,scales=2+2             guidance on two conditions
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DiffsampError
from .corrector import Corrector
from .potentials import Potential
from .targets import Target, annealed, cfg, composed, product

TARGETS = ("cfg", "anneal", "product", "composed", "none")


@dataclass(frozen=True)
class Open:
    """A guidance target that still lacks its scale; the pipeline supplies it."""

    beta: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A corrector whose target takes its scale from the pipeline at every run."""

    corrector: Corrector
    open: Open | None = None

    def at(self, guidance_scale: float | None) -> Corrector:
        """The corrector for a guidance scale."""
        if self.open is None:
            return self.corrector
        if guidance_scale is None:
            raise DiffsampError("scale: the target cfg has none and the pipeline keeps none; write target=cfg,scale=5")
        return replace(self.corrector, target=cfg(float(guidance_scale), self.open.beta))

    def sample(self, plan: Any, denoiser: Any, x: Any, **options: Any) -> Any:
        """As :meth:`Corrector.sample`, if the target has its scale."""
        return self.at(None).sample(plan, denoiser, x, **options)


def fkc(
    target: str | Target | None = "cfg",
    *,
    particles: int = 8,
    ess: float = 0.5,
    scale: float | None = None,
    beta: float = 1.0,
    n: int = 2,
    power: float = 1.0,
    scales: Sequence[float] | None = None,
    potential: Potential | None = None,
    **options: Any,
) -> Corrector | Recipe:
    """A Feynman-Kac corrector.

    Args:
        target: ``"cfg"``, ``"anneal"``, ``"product"``, ``"composed"``, ``"none"`` (with a ``potential``) or a
            :class:`Target`.
        particles: K of 2 or above. One particle is the plain sampler: leave the corrector out.
        ess: threshold in (0, 1], a share of the particles.
        scale: guidance scale of ``cfg``; left out, a pipeline supplies its own (a :class:`Recipe` is returned).
        beta: power of the whole target (``anneal``, ``cfg``, ``composed``).
        n, power: of ``product``.
        scales: one guidance scale per condition of ``composed``.
        potential: a reward.
        options: the other fields of :class:`Corrector`.

    Raises:
        DiffsampError: one line that names the argument.
    """
    if isinstance(particles, bool) or not isinstance(particles, int) or particles < 2:
        raise DiffsampError(f"particles: got {particles!r}; must be a whole number of 2 or above")
    recipe = None
    if target == "cfg":
        if scale is None:
            recipe = Open(beta)
        made = None if scale is None else cfg(scale, beta)
    elif target == "anneal":
        made = annealed(beta)
    elif target == "product":
        made = product(n, power)
    elif target == "composed":
        if not scales:
            raise DiffsampError("scales: are needed for target=composed, e.g. scales=2+2")
        made = composed(scales, beta)
    elif target in ("none", None):
        made = None
    elif isinstance(target, Target):
        made = target
    else:
        near = difflib.get_close_matches(str(target), TARGETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(TARGETS)}"
        raise DiffsampError(f"target: {target!r} is not known; {hint}")
    if not math.isfinite(beta) or beta <= 0:
        raise DiffsampError(f"beta: got {beta}; must be a finite number above 0")
    unknown = [key for key in options if key not in _FIELDS]
    if unknown:
        raise DiffsampError(f"{unknown[0]}: is no option of fkc; accepted: {', '.join((*_KEYS, *_FIELDS))}")
    corrector = Corrector(made, particles, ess, potential=potential, **options)
    return corrector if recipe is None else Recipe(corrector, recipe)


_KEYS = ("target", "particles", "ess", "scale", "beta", "n", "power", "scales")
_FIELDS = ("resampling", "rule", "window", "clamp", "choose", "chunk", "scale_start", "shard")
_WHOLE = ("particles", "n", "chunk")
_REAL = ("ess", "scale", "beta", "power", "clamp")
_TEXT = ("target", "resampling", "rule", "choose")


def parse(text: str | Corrector | Recipe) -> Corrector | Recipe:
    """A corrector from ``fkc:key=value,...`` (lists are written with +); objects are returned as they are.

    Raises:
        DiffsampError: unknown name or key, or a value that is not accepted.
    """
    if isinstance(text, Corrector | Recipe):
        return text
    if not isinstance(text, str):
        raise DiffsampError(f"corrector: got {type(text).__name__}; accepted: text as 'fkc:target=cfg', or a corrector")
    name, _, body = text.partition(":")
    if name.strip() != "fkc":
        raise DiffsampError(f"corrector: {name.strip()!r} is not known; accepted: fkc:target=cfg,particles=8,ess=0.5")
    values: dict[str, Any] = {}
    for part in (p.strip() for p in body.split(",") if p.strip()):
        key, equals, value = (v.strip() for v in part.partition("="))
        if not equals or not value:
            raise DiffsampError(f"corrector: {part!r} in {text!r} is not key=value")
        if key in values:
            raise DiffsampError(f"{key}: given twice in {text!r}")
        if key in _WHOLE:
            values[key] = _number(key, value, int)
        elif key in _REAL:
            values[key] = _number(key, value, float)
        elif key in ("scales", "window"):
            values[key] = tuple(_number(key, v, float) for v in value.split("+"))
        elif key in _TEXT:
            values[key] = value
        else:
            raise DiffsampError(
                f"{key}: is no option of fkc; accepted: {', '.join((*_TEXT, *_WHOLE, *_REAL, 'scales', 'window'))}"
            )
    if "window" in values and len(values["window"]) != 2:
        raise DiffsampError(f"window: got {values['window']}; write lowest+highest, e.g. window=0.05+20")
    return fkc(**values)


def _number(key: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise DiffsampError(f"{key}: got {text!r}; must be {what}") from None
