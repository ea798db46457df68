"""Particles spread over processes: every process holds a contiguous share of the batch.

Log-weights are gathered once per step, so every process takes the same decision from the same uniforms; then only the
particles that change process travel. Results do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import DiffsampError


class Alone:
    """One process with all the particles."""

    rank, world = 0, 1

    def share(self, n: int) -> slice:
        """The rows of the batch that this process holds."""
        return slice(0, n)

    def collect(self, local: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, in order."""
        return local

    def exchange(self, tensors: Sequence[torch.Tensor], ancestors: np.ndarray) -> list[torch.Tensor]:
        """Rows ``ancestors`` (global, one per row of the batch) of every tensor; this process's share of them."""
        index = torch.from_numpy(np.ascontiguousarray(ancestors))
        return [t.index_select(0, index.to(t.device)) for t in tensors]


class Shared(Alone):
    """A share per process of a ``torch.distributed`` group (gloo or nccl), which must be initialised."""

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise DiffsampError("distributed: torch.distributed is not initialised; call init_process_group first")
        self.dist, self.group = dist, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def share(self, n: int) -> slice:
        if n % self.world:
            raise DiffsampError(f"particles: {n} particles do not divide among {self.world} processes")
        size = n // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def collect(self, local: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(local) for _ in range(self.world)]
        self.dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.cat(parts)

    def exchange(self, tensors: Sequence[torch.Tensor], ancestors: np.ndarray) -> list[torch.Tensor]:
        size = len(ancestors) // self.world
        mine = ancestors[self.rank * size : (self.rank + 1) * size]
        packed = torch.cat([t.reshape(size, -1).to(torch.float64) for t in tensors], 1)
        made = torch.empty_like(packed)
        requests, arrivals = [], []
        for other in range(self.world):
            theirs = ancestors[other * size : (other + 1) * size]
            out = theirs[theirs // size == self.rank] - self.rank * size
            slots = torch.from_numpy(np.nonzero(mine // size == other)[0])
            if other == self.rank:
                made[slots] = packed[torch.from_numpy(out)]
                continue
            if len(out):
                rows = packed[torch.from_numpy(out)].contiguous()
                requests.append(self.dist.P2POp(self.dist.isend, rows, other, group=self.group))
            if len(slots):
                landing = torch.empty(len(slots), packed.shape[1], dtype=packed.dtype, device=packed.device)
                requests.append(self.dist.P2POp(self.dist.irecv, landing, other, group=self.group))
                arrivals.append((slots, landing))
        if requests:
            for request in self.dist.batch_isend_irecv(requests):
                request.wait()
        for slots, landing in arrivals:
            made[slots] = landing
        widths = [t[0].numel() for t in tensors]
        return [p.reshape(t.shape).to(t.dtype) for p, t in zip(made.split(widths, 1), tensors, strict=True)]
