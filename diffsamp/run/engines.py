"""How many processes work on a run, by tools that already exist.

local    this process alone.
torch    the ranks of `torchrun` or `accelerate launch` (any launcher that sets RANK and WORLD_SIZE); gloo or nccl.
shared   plain independent processes on one folder, such as a SLURM array: start the same command as often as you like.
ray      tasks of a Ray cluster (an optional extra), see ray_engine.py; the folder must be shared by its nodes.
auto     torch when WORLD_SIZE says that there are more ranks than one, else shared (which alone is local).

All use the same chunks and claims, so their result hash is the same and a lost process costs one chunk.
"""

from __future__ import annotations

import atexit
import os
import time
import uuid
from pathlib import Path
from typing import Any

from diffsamp.errors import DiffsampError
from diffsamp.files import write_whole
from diffsamp.run.folder import RunResult
from diffsamp.run.work import Generate, run_chunks

ENGINES = ("auto", "local", "torch", "shared", "ray")


def resolve(engine: str) -> str:
    """The engine that "auto" stands for here; DiffsampError for an unknown name, torch without a launcher, no ray."""
    if engine not in ENGINES:
        raise DiffsampError(f"engine={engine!r}; accepted: {', '.join(ENGINES)}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if engine == "auto":
        return "torch" if world > 1 else "shared"
    if engine == "ray":
        from diffsamp.run.ray_engine import load_ray

        load_ray()
    if engine == "torch" and "RANK" not in os.environ:
        raise DiffsampError("engine='torch' needs RANK and WORLD_SIZE; start it by torchrun or accelerate launch")
    return engine


def ranks(engine: str) -> tuple[int, int]:
    """(rank, world) for where a process starts to look."""
    if resolve(engine) == "torch":
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if engine == "ray":
        return 0, 1
    task, tasks = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("SLURM_ARRAY_TASK_COUNT")
    if task and tasks:
        return int(task), int(tasks)
    return 0, 1


def run_on(
    engine: str, root: str | Path, recipe: dict[str, Any], generate: Generate, n: int, **options: Any
) -> RunResult:
    """`run_chunks` by an engine; under torch every rank returns the result, and they are checked to agree."""
    rank, world = ranks(engine)
    if engine == "ray":
        from diffsamp.run.ray_engine import run_on_ray

        return run_on_ray(root, recipe, generate, n, **options)
    if resolve(engine) != "torch":
        return run_chunks(root, recipe, generate, n, rank=rank, world=world, **options)
    _join()
    _check_shared(Path(root), rank)
    result = run_chunks(root, recipe, generate, n, rank=rank, world=world, **options)
    _agree(result.sha256)
    return result


def _join() -> None:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        # Metrics may still need the group after the run; what is left of it at exit can abort the process.
        atexit.register(_leave)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _gather(value: Any) -> list[Any]:
    import torch.distributed as dist

    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _check_shared(root: Path, rank: int) -> None:
    """Raise on every rank when the folder of rank 0 is not the folder of the others."""
    name = f".shared-{uuid.uuid4().hex}"
    names = _gather(name)
    failure = None
    if rank == 0:
        try:
            write_whole(root / names[0], b"")
        except DiffsampError as error:
            failure = str(error)
    _gather(None)
    seen = failure is None and _appears(root / names[0])
    everyone = _gather((seen, failure))
    if rank == 0:
        (root / names[0]).unlink(missing_ok=True)
    if everyone[0][1]:
        raise DiffsampError(everyone[0][1])
    blind = [i for i, (sees, _) in enumerate(everyone) if not sees]
    if blind:
        raise DiffsampError(
            f"{root} is not shared: ranks {blind} do not see rank 0's files; name a folder on shared storage"
        )


def _appears(path: Path, patience: float = 5.0) -> bool:
    end = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)  # network file systems show new names late
    return True


def _agree(sha256: str) -> None:
    hashes = _gather(sha256)
    if len(set(hashes)) > 1:
        raise DiffsampError(
            f"ranks read different results ({', '.join(h[:8] for h in hashes)}); the folder is not coherent"
        )
