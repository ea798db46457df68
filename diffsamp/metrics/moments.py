"""Mean and covariance of features in float64, merged by Chan's formula.

Each batch is centred on its own mean first, so nothing is lost to cancellation however far the mean is from zero, and
two parts merge exactly as if they had been one set:

    n = n_a + n_b,   d = mean_b - mean_a,   mean = mean_a + d n_b / n,   M2 = M2_a + M2_b + d d^T n_a n_b / n

Source: Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from diffsamp.errors import DiffsampError
from diffsamp.files import write_whole
from diffsamp.metrics.arrays import as_features, check_same_width


class FrechetStats:
    """Count, mean [d] and centred second moment M2 [d, d] of features, all float64.

    `facts` is what is known of them (extractor and its sha256, resize, data set); it travels with the file.
    """

    def __init__(
        self, n: int = 0, mean: np.ndarray | None = None, m2: np.ndarray | None = None, facts: dict[str, Any] | None =
        None
    ) -> None:
        self.n = int(n)
        # None while empty; Any spares every use that is past a check of n the same question.
        self.mean: Any = None if mean is None else np.asarray(mean, np.float64)
        self.m2: Any = None if m2 is None else np.asarray(m2, np.float64)
        self.facts = dict(facts or {})

    @classmethod
    def of(cls, features: Any, facts: dict[str, Any] | None = None) -> FrechetStats:
        """The statistics of one feature array [n, d]."""
        stats = cls(facts=facts)
        stats.update(features)
        return stats

    @classmethod
    def from_covariance(cls, n: int, mean: Any, cov: Any, facts: dict[str, Any] | None = None) -> FrechetStats:
        """From a mean [d] and an unbiased covariance [d, d] (divided by n - 1) that someone else computed."""
        mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise DiffsampError(f"mean has shape {mean.shape} and cov {cov.shape}; accepted: [d] and [d, d]")
        if n < 2:
            raise DiffsampError(f"n={n}; accepted: at least 2 pictures for a covariance")
        return cls(n, mean, cov * (n - 1), facts)

    @property
    def width(self) -> int | None:
        """The number of features d, or None while empty."""
        return None if self.mean is None else len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance [d, d]; raises DiffsampError with fewer than two pictures."""
        if self.n < 2:
            raise DiffsampError(f"n={self.n} pictures; accepted: at least 2 for a covariance")
        return self.m2 / (self.n - 1)

    @property
    def warning(self) -> str | None:
        """What to say when there are too few pictures for a covariance of full rank, else None."""
        if self.width is None or self.n > self.width:
            return None
        return (
            f"{self.n} pictures give a covariance of rank {max(self.n - 1, 0)} for {self.width} features: the "
            "distance is "
            f"dominated by its bias; at least {self.width + 1} pictures are needed, {10 * self.width} are advised"
        )

    def update(self, features: Any) -> FrechetStats:
        """Take in a batch [n, d]; an empty batch is fine."""
        found = as_features(features)
        if not len(found):
            return self
        mean = found.mean(0)
        centred = found - mean
        return self.merge(FrechetStats(len(found), mean, centred.T @ centred))

    def merge(self, other: FrechetStats) -> FrechetStats:
        """Take in the statistics of another part, in place."""
        if not other.n:
            return self
        if not self.n:
            self.n, self.mean, self.m2 = other.n, other.mean.copy(), other.m2.copy()
            return self
        check_same_width(self.mean, other.mean)
        n, step = self.n + other.n, other.mean - self.mean
        self.m2 = self.m2 + other.m2 + np.outer(step, step) * (self.n * other.n / n)
        self.mean = self.mean + step * (other.n / n)
        self.n = n
        return self

    def all_reduce(self, width: int, group: Any = None) -> FrechetStats:
        """The merged statistics of all ranks of torch.distributed, in rank order, on every rank.

        `width` is d: a rank without pictures does not know it. Uneven and empty ranks are fine.
        """
        import torch
        import torch.distributed as dist

        if self.width not in (None, width):
            raise DiffsampError(f"width={width}, but this rank holds {self.width} features per picture")
        own = np.concatenate(
            [[float(self.n)], np.zeros(width) if self.mean is None else self.mean]
            + [np.zeros(width * width) if self.m2 is None else self.m2.ravel()]
        )
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        sent = torch.from_numpy(own).to(device)
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, sent, group=group)
        total = FrechetStats(facts=self.facts)
        for part in parts:
            row = part.cpu().numpy()
            total.merge(FrechetStats(int(row[0]), row[1 : 1 + width], row[1 + width :].reshape(width, width)))
        return total

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file, whole, with the facts in its header; one that is there is replaced."""
        from safetensors.numpy import save

        path = Path(path)
        tensors = {"n": np.array([self.n], np.int64), "mean": self.mean, "cov": self.covariance}
        write_whole(path, save(tensors, {"facts": json.dumps(self.facts, sort_keys=True)}), overwrite=True)

    @classmethod
    def load(cls, path: str | Path) -> FrechetStats:
        """Read a file that `save` wrote."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "numpy") as file:
                facts = json.loads((file.metadata() or {}).get("facts", "{}"))
                found = {key: file.get_tensor(key) for key in ("n", "mean", "cov")}
        except FileNotFoundError:
            raise DiffsampError(f"statistics: no file {path}") from None
        except SafetensorError as error:
            raise DiffsampError(f"statistics: {path} is not a statistics file with n, mean and cov ({error})") from None
        return cls.from_covariance(int(found["n"][0]), found["mean"], found["cov"], facts)
