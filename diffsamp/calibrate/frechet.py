"""Fréchet distance of the pictures of a run as something to descend: its value and its slope by every feature."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import numpy as np
import torch

from ..errors import DiffsampError
from .model import Model

CHUNK = 64


class Distance:
    """Fréchet distance of features to real pictures' moments, and its slope.

    Args:
        extractor: uint8 pictures [n, c, h, w] → {"features": [n, d]}; see :mod:`diffsamp.metrics.extractors`.
        mean, covariance: of the real pictures' features, [d] and [d, d].
        pictures: final states → uint8 pictures.
    """

    def __init__(
        self,
        extractor: Callable[[torch.Tensor], dict[str, np.ndarray]],
        mean: np.ndarray,
        covariance: np.ndarray,
        pictures: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        from ..metrics.frechet import factor

        self.extractor, self.pictures, self.mean = extractor, pictures, mean
        self.factor, self.trace = factor(covariance), float(np.trace(covariance))

    def features(self, x: torch.Tensor) -> np.ndarray:
        """[n, d] in float64 of the final states x, [n, ...]."""
        parts = [self.extractor(self.pictures(part))["features"] for part in x.split(CHUNK)]
        found = np.concatenate(parts).astype(np.float64)
        if found.shape[1:] != self.mean.shape:
            raise DiffsampError(
                f"reference: has {self.mean.shape[0]} features, the extractor makes {found.shape[1]}; both must agree"
            )
        return found

    def value(self, features: np.ndarray) -> float:
        """FD with the unbiased covariance, as :func:`diffsamp.metrics.frechet.frechet_distance`."""
        return self.with_slope(features)[0]

    def with_slope(self, features: np.ndarray) -> tuple[float, np.ndarray]:
        """(FD, its derivative by every feature, [n, d]).

        With X the centred features and G G^T the real covariance, tr (A B)^(1/2) is the sum of the singular values of
        X G / sqrt(n - 1), whose derivative by X is X G (G^T X^T X G)^(-1/2) G^T / sqrt(n - 1).
        """
        n = len(features)
        mean = features.mean(0)
        centred, step = features - mean, mean - self.mean
        projected = centred @ self.factor
        values, vectors = np.linalg.eigh(projected.T @ projected)
        kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
        roots, vectors = np.sqrt(values[kept]), vectors[:, kept]
        share = (n - 1) ** -0.5
        distance = step @ step + np.square(centred).sum() * share**2 + self.trace - 2 * share * roots.sum()
        toward = ((projected @ vectors) / roots) @ (vectors.T @ self.factor.T)
        return float(distance), 2 * step / n + 2 * share**2 * centred - 2 * share * toward


def distance_of(
    model: Model, extractor: str, reference: str = "embedded", feature_weights: str | os.PathLike[str] | None = None
) -> tuple[Distance, dict[str, str]]:
    """(distance, what it was made of) by the names of extractor and reference.

    "embedded" is the training split here: distances are reported against the test split.

    Raises:
        DiffsampError: unknown names, or a model whose samples are no pictures.
    """
    from ..metrics.extractors import extractor as extractor_of
    from ..metrics.references import reference as reference_of

    made = extractor_of(extractor, feature_weights=None if feature_weights is None else str(feature_weights))
    if reference == "embedded":
        reference_of(reference, made)  # says what is wrong with another extractor
        name, mean, covariance, key = _training_pictures()
    else:
        real = reference_of(reference, made)
        name, mean, covariance, key = real.name, real.stats.mean, real.stats.covariance, real.fingerprint
    if model.pictures is None:
        raise DiffsampError(
            f"extractor: {extractor} needs pictures, and model {model.name} has samples of shape {model.shape}; "
            "give diffsamp.calibrate.Model its own pictures function"
        )
    facts = {
        "extractor": made.name, "extractor_sha256": made.fingerprint, "reference": name, "reference_fingerprint": key,
    }  # fmt: skip
    return Distance(made, mean, covariance, model.pictures), facts


def _training_pictures() -> tuple[str, np.ndarray, np.ndarray, str]:
    """(name, mean, covariance, fingerprint) of the embedded data's training split.

    A run is measured against the test split; what is fitted must not have seen it.
    """
    from .. import models

    tensors, facts = models.reference()
    mean, covariance = (tensors[name].double().numpy() for name in ("train_mean", "train_cov"))
    key = hashlib.sha256(mean.tobytes() + covariance.tobytes()).hexdigest()[:16]
    return f"Fashion-MNIST training, {facts['train_n']} pictures", mean, covariance, key
