"""The metrics as `torchmetrics.Metric` classes on features: correct for ranks with uneven and with no pictures.

torchmetrics' own FID, KID and MIFID fail or mislead there: list states are gathered element by element, so that all
ranks must make equally many updates, and FID's states are not centred. Here the Fréchet state is (n, mean, M2) merged
by Chan's formula, and lists of features are joined to one tensor per rank (of zero rows where there were none) before
a gather.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from diffsamp.errors import DiffsampError
from diffsamp.metrics.accuracy import class_accuracy
from diffsamp.metrics.frechet import frechet_distance
from diffsamp.metrics.kernel import kernel_distance
from diffsamp.metrics.manifold import precision_recall
from diffsamp.metrics.moments import FrechetStats
from diffsamp.metrics.score import inception_score
from diffsamp.metrics.trajectory import trajectory_error


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


class FrechetDistance(Metric):
    """Fréchet distance of features [n, d]; `update(features, real=...)`, as torchmetrics' FID has it, but on features.

    Args:
        num_features: d; a rank without pictures must know it.
        extractor: optional callable from pictures to features, applied in `update`.
        reset_real_features: False keeps the real side over `reset`.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    def __init__(
        self, num_features: int, extractor: Any = None, reset_real_features: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_features, self.extractor, self.reset_real_features = num_features, extractor, reset_real_features
        for side in ("real", "fake"):
            self.add_state(f"{side}_n", torch.zeros(1, dtype=torch.float64), dist_reduce_fx=None)
            self.add_state(f"{side}_mean", torch.zeros(1, num_features, dtype=torch.float64), dist_reduce_fx=None)
            square = torch.zeros(1, num_features, num_features, dtype=torch.float64)
            self.add_state(f"{side}_m2", square, dist_reduce_fx=None)

    def _stats(self, side: str) -> FrechetStats:
        d = self.num_features
        n = getattr(self, f"{side}_n").reshape(-1).cpu().numpy()
        mean = getattr(self, f"{side}_mean").reshape(-1, d).cpu().numpy()
        m2 = getattr(self, f"{side}_m2").reshape(-1, d, d).cpu().numpy()
        total = FrechetStats()
        for part in zip(n, mean, m2, strict=True):
            total.merge(FrechetStats(*part))
        return total

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Take in features [n, d] (or pictures, with an extractor) of real or generated pictures."""
        found = self.extractor(features) if self.extractor is not None else features
        found = found["features"] if isinstance(found, dict) else found
        if found.ndim != 2 or found.shape[1] != self.num_features:
            raise DiffsampError(f"features has shape {tuple(found.shape)}; accepted: [n, {self.num_features}]")
        side = "real" if real else "fake"
        stats = self._stats(side).update(found)
        if stats.n:
            like = getattr(self, f"{side}_n")
            for name, value in (("n", [stats.n]), ("mean", stats.mean[None]), ("m2", stats.m2[None])):
                setattr(self, f"{side}_{name}", torch.as_tensor(np.asarray(value, np.float64), device=like.device))

    def compute(self) -> torch.Tensor:
        """The distance, float64."""
        return _scalar(frechet_distance(self._stats("fake"), self._stats("real")))

    def reset(self) -> None:
        """Forget the pictures (of the generated side only, if so asked at the start)."""
        kept = None if self.reset_real_features else {k: getattr(self, f"real_{k}") for k in ("n", "mean", "m2")}
        super().reset()
        for name, value in (kept or {}).items():
            setattr(self, f"real_{name}", value)


class _Rows(Metric):
    """A metric whose states are rows, one per picture; `states` names them with their row shapes and dtypes."""

    full_state_update = False
    is_differentiable = False
    states: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def _declare(self, **states: tuple[tuple[int, ...], torch.dtype]) -> None:
        self.states = states
        for name in states:
            self.add_state(name, [], dist_reduce_fx="cat")

    def _rows(self, name: str) -> torch.Tensor:
        value = getattr(self, name)
        if isinstance(value, torch.Tensor):
            return value
        shape, dtype = self.states[name]
        return torch.cat(list(value)) if value else torch.empty((0, *shape), dtype=dtype, device=self.device)

    def _take(self, name: str, rows: Any) -> None:
        shape, dtype = self.states[name]
        rows = torch.as_tensor(rows).detach()
        if tuple(rows.shape[1:]) != shape or not rows.ndim:
            raise DiffsampError(
                f"{name} has shape {tuple(rows.shape)}; accepted: [n{''.join(f', {s}' for s in shape)}]"
            )
        getattr(self, name).append(rows.to(self.device, dtype))

    def _sync_dist(self, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        # One tensor per rank, whatever the number of updates: then a gather is one call on every rank.
        for name in self.states:
            setattr(self, name, [self._rows(name)])
        super()._sync_dist(dist_sync_fn, process_group)


class _Pair(_Rows):
    """Features of real and of generated pictures, [n, num_features] float32."""

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._declare(real=((num_features,), torch.float32), fake=((num_features,), torch.float32))

    def update(self, features: torch.Tensor, real: bool) -> None:
        """Take in features [n, d] of real or generated pictures."""
        self._take("real" if real else "fake", features)


class KernelDistance(_Pair):
    """Unbiased kernel distance (KID) from all pictures; see `kernel_distance`."""

    higher_is_better = False

    def compute(self) -> torch.Tensor:
        """The distance, float64."""
        return _scalar(kernel_distance(self._rows("fake"), self._rows("real")))


class PrecisionRecall(_Pair):
    """Precision and recall by k-nearest-neighbour balls; see `precision_recall`."""

    higher_is_better = True

    def __init__(self, num_features: int, k: int = 3, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.k = k

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(precision, recall), float64."""
        precision, recall = precision_recall(self._rows("fake"), self._rows("real"), k=self.k)
        return _scalar(precision), _scalar(recall)


class InceptionScore(_Rows):
    """Inception Score of logits [n, num_classes]; see `inception_score`."""

    higher_is_better = True

    def __init__(self, num_classes: int, splits: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.splits = splits
        self._declare(logits=((num_classes,), torch.float32))

    def update(self, logits: torch.Tensor) -> None:
        """Take in logits [n, num_classes]."""
        self._take("logits", logits)

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, standard deviation over splits), float64."""
        mean, spread = inception_score(self._rows("logits"), splits=self.splits)
        return _scalar(mean), _scalar(spread)


class ClassAccuracy(_Rows):
    """Share of pictures classified as the class asked for."""

    higher_is_better = True

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._declare(logits=((num_classes,), torch.float32), labels=((), torch.int64))

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take in logits [n, num_classes] and labels [n]."""
        self._take("logits", logits)
        self._take("labels", labels)

    def compute(self) -> torch.Tensor:
        """The share 0..1, float64."""
        return _scalar(class_accuracy(self._rows("logits"), self._rows("labels")))


class TrajectoryError(_Rows):
    """Mean over pictures of the root mean square distance to reference samples; see `trajectory_error`."""

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._declare(errors=((), torch.float64))

    def update(self, samples: torch.Tensor, reference: torch.Tensor) -> None:
        """Take in samples and reference samples of the same seeds, equal shapes [n, ...]."""
        self._take("errors", torch.from_numpy(trajectory_error(samples, reference)))

    def compute(self) -> torch.Tensor:
        """The mean error, float64."""
        errors = self._rows("errors")
        if not len(errors):
            raise DiffsampError("errors is empty; accepted: at least one update before compute")
        return errors.mean()
