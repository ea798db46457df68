"""Two ranks of a launcher: a run on a shared folder, then metrics of uneven and empty ranks, as JSON by rank 0."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fake_run import generator

torch.set_num_threads(1)


def features(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(seed)) + 3


def metric_values(rank: int, split: tuple[int, int], updates: int) -> dict[str, float]:
    """Real and generated features split over the ranks unevenly; the values of every metric after the sync."""
    from diffsamp import metrics

    real, fake = features(60, 0), features(50, 1) * 1.1
    logits, labels = features(50, 2)[:, :10] * 2, torch.arange(50) % 10
    rows = slice(0, split[0]) if rank == 0 else slice(split[0], None)
    made = {
        "fd": metrics.FrechetDistance(12),
        "kid": metrics.KernelDistance(12),
        "pr": metrics.PrecisionRecall(12),
        "is": metrics.InceptionScore(10, splits=1),
        "accuracy": metrics.ClassAccuracy(10),
        "trajectory": metrics.TrajectoryError(),
    }
    for part in torch.arange(60)[rows].chunk(updates if rank == 0 else 1):
        if not len(part):
            continue
        for name in ("fd", "kid", "pr"):
            made[name].update(real[part], real=True)
            if len(kept := part[part < 50]):
                made[name].update(fake[kept], real=False)
        if len(kept := part[part < 50]):
            made["is"].update(logits[kept])
            made["accuracy"].update(logits[kept], labels[kept])
            made["trajectory"].update(fake[kept], real[kept])
    found = {}
    for name, metric in made.items():
        value = metric.compute()
        found[name] = [float(v) for v in value] if isinstance(value, tuple) else float(value)
    stats = metrics.FrechetStats()
    stats.update(fake[rows][: max(0, 50 - (0 if rank == 0 else split[0]))] if split[rank] else fake[:0])
    if dist.is_initialized():
        stats = stats.all_reduce(12)
    found["n"] = stats.n
    found["trace"] = float(stats.covariance.trace())
    return found


def main() -> None:
    from diffsamp.run import run_on

    result = run_on("auto", sys.argv[1], {"fake": 1}, generator(0.005), 300, chunk=10)
    rank = dist.get_rank()
    found = {"sha256": result.sha256}
    for name, split in (("uneven", (45, 15)), ("empty", (60, 0))):
        found[name] = metric_values(rank, split, 5)
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
