"""The written form of a guidance: ``name[:scale][,key=value]...``, as the command line and ``diffsamp.use`` take it.

    cfg:5                                    apg:7.5,eta=0,norm=15,momentum=-0.5
    apg:7.5,preset=sdxl                      cfg-rescale:7.5,rescale=0.7,space=epsilon
    interval:4,sigma_min=0.3,sigma_max=5     apg:7.5,stop=0.8          (the four interval keys go with any method)
    autoguidance:2,skip_layers=7+8           fdg:10,low_scale=4

A name without a scale takes the pipeline's own.
"""

from __future__ import annotations

import difflib
from dataclasses import MISSING, fields
from typing import Any

from ..errors import DiffsampError
from .apg import APG
from .autoguidance import AutoGuidance
from .base import Guidance, GuidanceBase
from .cfg import CFG
from .cfg_zero import CFGZeroStar
from .fdg import FrequencyDecoupled
from .interval import Interval
from .perp_neg import PerpNeg
from .presets import PRESETS
from .rescale import RescaledCFG

METHODS: dict[str, type[GuidanceBase]] = {
    "cfg": CFG,
    "cfg-rescale": RescaledCFG,
    "apg": APG,
    "cfg-zero": CFGZeroStar,
    "autoguidance": AutoGuidance,
    "fdg": FrequencyDecoupled,
    "perp-neg": PerpNeg,
}
_INTERVAL_KEYS = ("sigma_min", "sigma_max", "start", "stop")
_PYTHON_ONLY = ("weak",)


def names() -> list[str]:
    """Names that :func:`parse` accepts."""
    return sorted((*METHODS, "interval"))


def parse(text: str | Guidance, /, guidance_scale: float | None = None, **options: Any) -> Guidance:
    """A guidance from its written form.

    Args:
        text: ``name[:scale][,key=value]...``; a guidance object is returned as it is (with the scale, if given).
        guidance_scale: scale, where ``text`` has none.
        options: further options, as in ``key=value``.

    Raises:
        DiffsampError: unknown name or key, or a value that is not accepted.
    """
    if not isinstance(text, str):
        if not isinstance(text, GuidanceBase):
            raise DiffsampError(f"guidance: got {type(text).__name__}; accepted: text as 'apg:7.5', or a guidance")
        if options:
            raise DiffsampError(f"guidance: options {', '.join(options)} go with a name, not with an object")
        return text if guidance_scale is None else text.with_scale(guidance_scale)
    head, *parts = (part.strip() for part in text.split(","))
    name, colon, scale = head.partition(":")
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(names())}"
        raise DiffsampError(f"guidance: {name!r} is not known; {hint}")
    if colon:
        guidance_scale = _number(scale, "guidance_scale")
    values = dict(options)
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise DiffsampError(f"guidance: {part!r} in {text!r} is not key=value")
        if key in values:
            raise DiffsampError(f"{key}: given twice in {text!r}")
        values[key] = value
    window = {key: values.pop(key) for key in _INTERVAL_KEYS if key in values}
    window = {key: _number(value, key) if isinstance(value, str) else value for key, value in window.items()}
    if name == "interval" and not window:
        raise DiffsampError(f"guidance: {text!r} has no interval; accepted: {', '.join(_INTERVAL_KEYS)}")
    method = _method("cfg" if name == "interval" else name, guidance_scale, values)
    return Interval(method, **window) if window else method


def written(guidance: Guidance) -> str:
    """The written form of a guidance: ``parse(written(g)) == g``. DiffsampError where an option has none."""
    window: dict[str, Any] = {}
    if isinstance(guidance, Interval):
        window = {key: getattr(guidance, key) for key in _INTERVAL_KEYS}
        window = {key: value for key, value in window.items() if value != Interval.__dataclass_fields__[key].default}
        guidance = guidance.inner
    name = next((name for name, kind in METHODS.items() if type(guidance) is kind), None)
    if name is None:
        raise DiffsampError(f"guidance: {type(guidance).__name__} has no written form")
    parts = [name if guidance.guidance_scale is None else f"{name}:{float(guidance.guidance_scale)!r}"]
    for entry in fields(guidance):  # type: ignore[arg-type]
        value = getattr(guidance, entry.name)
        if entry.name == "guidance_scale" or value == entry.default:
            continue
        if entry.name in _PYTHON_ONLY:
            raise DiffsampError(f"{entry.name}: cannot be written as text")
        parts.append(f"{entry.name}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}")
    return ",".join([*parts, *(f"{key}={value!r}" for key, value in window.items())])


def _method(name: str, guidance_scale: float | None, values: dict[str, Any]) -> GuidanceBase:
    kind = METHODS[name]
    known = {field.name: field for field in fields(kind) if field.name != "guidance_scale"}  # type: ignore[arg-type]
    chosen: dict[str, Any] = {}
    if name == "apg" and "preset" in values:
        family = values.pop("preset")
        if family not in PRESETS:
            raise DiffsampError(f"preset: {family!r} is not known; accepted: {', '.join(sorted(PRESETS))}")
        chosen = {key: getattr(PRESETS[family], key) for key in known}
    for key, value in values.items():
        if key not in known:
            accepted = [*(k for k in known if k not in _PYTHON_ONLY), *(("preset",) if name == "apg" else ())]
            raise DiffsampError(f"{key}: is no option of {name}; accepted: {', '.join((*accepted, *_INTERVAL_KEYS))}")
        chosen[key] = _convert(key, value, known[key].default) if isinstance(value, str) else value
    return kind(guidance_scale=guidance_scale, **chosen)  # type: ignore[call-arg]


def _convert(key: str, text: str, default: Any) -> Any:
    if key in _PYTHON_ONLY:
        raise DiffsampError(f"{key}: cannot be written as text; pass it from Python")
    if isinstance(default, str):
        return text
    if isinstance(default, tuple):
        return tuple(_whole(item, key) for item in text.split("+"))
    return _whole(text, key) if isinstance(default, int) and default is not MISSING else _number(text, key)


def _number(text: str, key: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DiffsampError(f"{key}: got {text!r}; must be a number") from None


def _whole(text: str, key: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DiffsampError(f"{key}: got {text!r}; must be a whole number") from None
