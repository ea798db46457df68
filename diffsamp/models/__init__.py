"""Models that travel inside the package, trained by the scripts in `benchmarks/training/`.

`load` gives a model by name; nothing is downloaded. See README.md in this folder for files, keys and conventions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffsamp.models.registry import FASHION_CLASSES, classifier, config, fingerprint, load, names, reference

if TYPE_CHECKING:
    from diffsamp.models.fashion_cnn import FashionClassifier
    from diffsamp.models.pipeline import ClassConditionalPipeline

__all__ = [
    "FASHION_CLASSES",
    "ClassConditionalPipeline",
    "FashionClassifier",
    "classifier",
    "config",
    "fingerprint",
    "load",
    "names",
    "reference",
]


def __getattr__(name: str) -> Any:
    # The pipeline class needs diffusers, which `import diffsamp` must not load.
    if name == "ClassConditionalPipeline":
        from diffsamp.models.pipeline import ClassConditionalPipeline

        return ClassConditionalPipeline
    if name == "FashionClassifier":
        from diffsamp.models.fashion_cnn import FashionClassifier

        return FashionClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
