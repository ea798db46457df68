"""A protocol: everything that a figure depends on besides the model, by name, written into every result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from diffsamp.errors import DiffsampError
from diffsamp.metrics.resize import RESIZES

# name: (extractor, resize). What other programs print, by the program.
PROTOCOLS = {
    "embedded": ("fashion-cnn", "tf1"),
    "torch-fidelity": ("inception-fid", "tf1"),
    "torchmetrics": ("inception-fid", "antialias"),
    "clean-fid": ("inception-fid", "pil-bicubic"),
}


@dataclass(frozen=True)
class Protocol:
    """Extractor, resize, arithmetic and picture count of a figure. `dtype` is the statistics' own: float64."""

    name: str
    extractor: str
    resize: str
    n: int
    dtype: str = "float64"

    @classmethod
    def named(cls, name: str, n: int, *, extractor: str | None = None, resize: str | None = None) -> Protocol:
        """A named protocol, with parts replaced where given; raises DiffsampError for unknown names."""
        if name not in PROTOCOLS:
            raise DiffsampError(f"protocol={name!r}; accepted: {', '.join(PROTOCOLS)}")
        if resize is not None and resize not in RESIZES:
            raise DiffsampError(f"resize={resize!r}; accepted: {', '.join(RESIZES)}")
        given = PROTOCOLS[name]
        changed = (extractor or given[0], resize or given[1])
        return cls(name if changed == given else "custom", *changed, n)

    def facts(self) -> dict[str, Any]:
        """As a dictionary for results."""
        return asdict(self)
