"""The means that a network believes in, in place of the data's.

At high noise an exact denoiser of data with mean mu answers  D = mu + A·(x/alpha − mu),  A = lam/(lam + s²): nearly mu
itself. A trained network answers nearly *a* mean, but not quite the data's, and a run that follows the network drifts
by the difference, which guidance multiplies. One call per noise at the start level shows the network's means; they are
averaged per class, and the closed form then follows the network. The covariance stays the data's: it hardly matters up
there. Not from the paper; this project's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..errors import DiffsampError
from ..process import Level
from .guided import implied_mean
from .statistics import Statistics

if TYPE_CHECKING:
    from ..calibrate.model import Model

NOISES_PER_CLASS = 64
BATCH = 64


def network_means(
    stats: Statistics, model: Model, level: Level | None = None, *, per_class: int | None = None
) -> Statistics:
    """``stats`` with the means that ``model`` shows at ``level``.

    With class statistics the class means are those of the conditional answers and the overall mean is that of the
    unconditional ones; without, the overall mean is that of the conditional answers over all classes.

    Args:
        stats: of the data, or of the model's own samples.
        model: to be asked; (1 or, with class statistics, 2) · per_class · classes samples pass through it.
        level: where the runs start; by default sigma/alpha 80 or as far as the process reaches.
        per_class: noises per class, 1 or above; 64 by default. Their seeds are used for nothing else.

    Raises:
        DiffsampError: ``per_class`` below 1, a level without signal, other numbers of classes, or answers that are not
            finite.
    """
    from ..calibrate.model import MEAN_SEED

    per_class = NOISES_PER_CLASS if per_class is None else per_class
    if per_class < 1:
        raise DiffsampError(f"per_class: got {per_class}; must be 1 or above")
    if level is None:
        level = model.process.level(min(80.0, model.process.noise_to_signal_range[1]))
    if level.alpha == 0.0 or level.sigma == 0.0:
        raise DiffsampError("level: the network's means need both signal and noise there (alpha, sigma above 0)")
    if stats.class_means is not None and len(stats.class_means) != model.classes:
        raise DiffsampError(f"stats: have {len(stats.class_means)} classes, the model has {model.classes}")
    p, q = model.process.x0_coefficients(level, model.prediction)
    count = per_class * model.classes
    own = torch.zeros(model.classes, stats.d, dtype=torch.float64)
    overall = torch.zeros(stats.d, dtype=torch.float64)
    for first in range(MEAN_SEED, MEAN_SEED + count, BATCH):
        noise, labels = model.points(range(first, min(first + BATCH, MEAN_SEED + count)))
        x = noise * level.sigma
        answer = model.guided(labels, 1.0)(x, level)
        conditional = implied_mean(_of(stats, labels), x, p * x + q * answer, level).double()
        own.index_add_(0, labels, conditional)
        if stats.class_means is None:
            continue
        # Guidance at scale 2 is twice the conditional answer less the unconditional one.
        unconditional = 2 * answer - model.guided(labels, 2.0)(x, level)
        overall += implied_mean(stats, x, p * x + q * unconditional, level).double().sum(0)
    own /= per_class
    overall = own.mean(0) if stats.class_means is None else overall / count
    if not (bool(torch.isfinite(own).all()) and bool(torch.isfinite(overall).all())):
        raise DiffsampError(f"model: its answers at sigma/alpha {level.noise_to_signal:.4g} are not finite")
    key = stats.key | {"means": f"network, sigma/alpha {level.noise_to_signal:.4g}, {count} noises"}
    return replace(stats, mean=overall, class_means=None if stats.class_means is None else own, key=key)


def _of(stats: Statistics, labels: torch.Tensor) -> Statistics:
    return stats if stats.class_means is None else stats.of_class(labels)
