"""Mean and covariance of data: exact or low-rank with a residual, with class means; streamed; kept in safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibrate.artifact import FORMAT, _digest, read, versions
from ..errors import DiffsampError
from ..files import write_whole

EXACT_LIMIT = 3072  # largest dimension whose covariance is decomposed in full


@dataclass(frozen=True)
class Statistics:
    """Gaussian statistics: Sigma = U diag(eigenvalues) U^T + residual·(I − U U^T).

    Attributes:
        mean: float64, (d,).
        basis: orthonormal columns, (d, k), float64.
        eigenvalues: (k,), 0 or above, falling.
        residual: variance along every direction outside the basis.
        shape: of one sample; d is its product.
        count: number of samples behind it.
        class_means: (classes, d), or None.
        within: the pooled covariance within classes as (basis, eigenvalues, residual), or None.
        key: what the statistics depend on: data set, scaling, resolution, VAE.
        start: noise-to-signal ratio down to which the Gaussian was measured to hold, or None.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    eigenvalues: torch.Tensor
    residual: float
    shape: tuple[int, ...]
    count: int
    class_means: torch.Tensor | None = None
    within: tuple[torch.Tensor, torch.Tensor, float] | None = None
    key: dict[str, Any] = field(default_factory=dict)
    start: float | None = None

    @property
    def d(self) -> int:
        return self.mean.numel()

    @property
    def std(self) -> float:
        """Root mean variance per coordinate."""
        total = float(self.eigenvalues.sum()) + self.residual * (self.d - self.eigenvalues.numel())
        return (total / self.d) ** 0.5

    def of_class(self, labels: torch.Tensor) -> Statistics:
        """Class-conditional statistics, one mean per sample: ``mean`` becomes (batch, d), the covariance is pooled."""
        if self.class_means is None or self.within is None:
            raise DiffsampError("labels: these statistics have no classes; gather them with labels")
        basis, eigenvalues, residual = self.within
        means = self.class_means[labels.cpu()]
        return Statistics(means, basis, eigenvalues, residual, self.shape, self.count, key=self.key)

    def truncated(self, rank: int) -> Statistics:
        """With the ``rank`` largest directions; the variance of the others goes into the residual."""

        def cut(basis: torch.Tensor, values: torch.Tensor, residual: float) -> tuple[torch.Tensor, torch.Tensor, float]:
            keep = min(rank, len(values))
            if keep == self.d:
                return basis, values, residual
            rest = float(values[keep:].sum()) + residual * (self.d - len(values))
            return basis[:, :keep].contiguous(), values[:keep].contiguous(), rest / (self.d - keep)

        basis, values, residual = cut(self.basis, self.eigenvalues, self.residual)
        within = None if self.within is None else cut(*self.within)
        return replace(self, basis=basis, eigenvalues=values, residual=residual, within=within)

    def check_key(self, **wanted: Any) -> None:
        """Refuse statistics of other data: every given item must equal the stored one."""
        for name, value in wanted.items():
            if self.key.get(name) != value:
                raise DiffsampError(
                    f"statistics: were gathered with {name}={self.key.get(name)!r}, this run has {value!r}"
                )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, whole."""
        from safetensors.numpy import save

        tensors = {"mean": self.mean, "basis": self.basis.float(), "eigenvalues": self.eigenvalues}
        if self.class_means is not None and self.within is not None:
            tensors |= {"class_means": self.class_means.float(), "within_basis": self.within[0].float()}
            tensors["within_eigenvalues"] = self.within[1]
        arrays = {name: np.ascontiguousarray(t.numpy()) for name, t in tensors.items()}
        facts = {
            "format": FORMAT, "method": "gaussian", "residual": self.residual, "shape": list(self.shape),
            "count": self.count, "within_residual": None if self.within is None else self.within[2], "key": self.key,
            "start": self.start, "digest": _digest(arrays), "versions": versions(),
        }  # fmt: skip
        content = save(arrays, metadata={"diffsamp": json.dumps(facts, sort_keys=True)})
        write_whole(Path(path), content, overwrite=True)
        return Path(path)


def load(path: str | os.PathLike[str]) -> Statistics:
    """Read statistics; raises DiffsampError for a missing, truncated, changed or foreign file."""
    arrays, facts = read(path)
    if facts.get("method") != "gaussian":
        raise DiffsampError(f"statistics {path}: holds a {facts.get('method')} artifact, not Gaussian statistics")
    t = {name: torch.from_numpy(array.astype(np.float64)) for name, array in arrays.items()}
    try:
        within = None
        if "within_basis" in t:
            within = (t["within_basis"], t["within_eigenvalues"], float(facts["within_residual"]))
        return Statistics(
            t["mean"], t["basis"], t["eigenvalues"], float(facts["residual"]), tuple(facts["shape"]), facts["count"],
            t.get("class_means"), within, facts["key"], facts["start"],
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise DiffsampError(f"statistics {path}: the file is incomplete ({error})") from None


def gather(
    batches: Iterable[torch.Tensor] | Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    rank: int | None = None,
    key: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Statistics:
    """Statistics of a stream of samples, or of (samples, labels).

    Args:
        batches: tensors (n, *shape), in the space the network sees (latents: after scaling and shifting).
        rank: number of directions kept; None keeps all (exact). Needs at least 2·rank samples.
        key: what they depend on: data set, VAE, scaling factor, resolution.
        seed: of the randomised decomposition, which is used above 3072 dimensions (rank is then needed, and the
            centred data are held in float32).

    Raises:
        DiffsampError: no samples, values that are not finite, too few samples for the rank, rank missing where d is
            large.
    """
    count = 0
    total = square = None
    shape: tuple[int, ...] = ()
    rows: list[torch.Tensor] = []
    class_sum: dict[int, torch.Tensor] = {}
    class_count: dict[int, int] = {}
    for batch in batches:
        x, labels = batch if isinstance(batch, tuple | list) else (batch, None)
        shape = tuple(x.shape[1:])
        flat = x.detach().cpu().reshape(len(x), -1)
        if not bool(torch.isfinite(flat).all()):
            raise DiffsampError("batches: hold values that are not finite")
        d = flat.shape[1]
        wide = flat.double()
        total = wide.sum(0) if total is None else total + wide.sum(0)
        if d <= EXACT_LIMIT:
            square = wide.T @ wide if square is None else square + wide.T @ wide
        else:
            rows.append(flat.float())
        count += len(flat)
        if labels is not None:
            for label in labels.unique().tolist():
                chosen = wide[labels == label]
                class_sum[label] = class_sum.get(label, 0) + chosen.sum(0)
                class_count[label] = class_count.get(label, 0) + len(chosen)
    if total is None or count < 2:
        raise DiffsampError(f"batches: got {count} samples; statistics need at least 2")
    d = total.numel()
    if rank is None and d > EXACT_LIMIT:
        raise DiffsampError(f"rank: is needed above {EXACT_LIMIT} dimensions, got {d}; 64 to 512 serves")
    if rank is not None and not 1 <= rank <= d:
        raise DiffsampError(f"rank: got {rank}; accepted: 1 to {d}")
    if count < 2 * (rank or 1):
        raise DiffsampError(f"batches: got {count} samples for rank {rank}; at least {2 * (rank or 1)} are needed")
    mean = total / count
    keep = rank or d
    if square is None:
        basis, eigenvalues, residual = _randomised(torch.cat(rows), mean, keep, seed)
        return Statistics(mean, basis, eigenvalues, residual, shape, count, key=dict(key or {}))
    covariance = (square - count * torch.outer(mean, mean)) / (count - 1)
    basis, eigenvalues, residual = _decompose(covariance, keep)
    class_means = within = None
    if class_sum:
        labels = sorted(class_sum)
        if labels != list(range(len(labels))):
            raise DiffsampError(f"labels: must be 0 to classes − 1 without gaps, got {labels}")
        class_means = torch.stack([class_sum[c] / class_count[c] for c in labels])
        weight = torch.tensor([class_count[c] for c in labels], dtype=torch.float64)
        pooled = (square - (class_means.T * weight) @ class_means) / max(count - len(labels), 1)
        within = _decompose(pooled, keep)
    return Statistics(mean, basis, eigenvalues, residual, shape, count, class_means, within, dict(key or {}))


def _decompose(covariance: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    d = len(values)
    residual = float(values[keep:].sum()) / (d - keep) if keep < d else 0.0
    return vectors[:, :keep].contiguous(), values[:keep].contiguous(), residual


def _randomised(
    rows: torch.Tensor, mean: torch.Tensor, keep: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Top directions by a randomised range finder with 4 power iterations (Halko et al. 2011, Algorithm 4.4)."""
    centred = rows - mean.float()
    n, d = centred.shape
    generator = torch.Generator().manual_seed(seed)
    width = min(keep + 16, n, d)
    span = torch.linalg.qr(centred @ torch.randn(d, width, generator=generator))[0]
    for _ in range(4):
        span = torch.linalg.qr(centred @ torch.linalg.qr(centred.T @ span)[0])[0]
    _, singular, vectors = torch.linalg.svd((span.T @ centred).double(), full_matrices=False)
    eigenvalues = singular.square()[:keep] / (n - 1)
    variance = float(centred.double().square().sum()) / (n - 1)
    residual = max(variance - float(eigenvalues.sum()), 0.0) / max(d - keep, 1)
    return vectors[:keep].T.contiguous(), eigenvalues, residual
