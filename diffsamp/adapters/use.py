"""The one-line front: a solver, a guidance, a teleport and a corrector in a diffusers pipeline, and back again."""

from __future__ import annotations

from typing import Any

from ..errors import DiffsampError

_ORIGINAL = "_diffsamp_original_scheduler"


def use(
    pipe: Any,
    solver: str | None = None,
    *,
    guidance: Any = None,
    guidance_scale: float | None = None,
    corrector: Any = None,
    teleport: Any = None,
    teleport_options: dict[str, Any] | None = None,
    grid: str | None = None,
    seed: int | None = None,
    scheduler_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Give a diffusers pipeline another solver (and guidance, teleport, corrector); the pipeline is returned.

    Args:
        pipe: any diffusers pipeline.
        solver: registry name, with options or composed: ``"unipc"``, ``"unipc:order=3"``, ``"dc(unipc)"``. None keeps
            the scheduler.
        guidance: ``"apg"``, ``"apg:7.5,norm=15"`` or a guidance object (classic pipelines).
        guidance_scale: its scale, where the pipeline does not keep one.
        corrector: a Feynman-Kac corrector, or its text (``"fkc:target=cfg,particles=8"``).
        teleport: Gaussian statistics, or the file that holds them.
        teleport_options: ``one_call`` and ``force`` of :func:`diffsamp.adapters.teleport.attach`.
        grid: name of a grid, in place of the spacing in the scheduler's config.
        seed: seed of a stochastic solver's own noise (flow pipelines pass no generator).
        scheduler_options: config values of the scheduler class, as its ``from_config`` takes them.
        options: options of the solver.

    Raises:
        DiffsampError: unknown solver or option, or something that the pipeline cannot do, with the reason.
    """
    if not hasattr(pipe, "scheduler"):
        raise DiffsampError(f"pipe: {type(pipe).__name__} has no scheduler")
    if solver is not None or grid is not None or options or scheduler_options or seed is not None:
        from ..registry import solver as make_solver
        from .diffusers import PlanScheduler, scheduler_class

        current = pipe.scheduler
        if solver is None:
            solver = current.solver.name if isinstance(current, PlanScheduler) else "unipc"
        made = make_solver(solver, **options)
        changes: dict[str, Any] = dict(scheduler_options or {})
        changes["solver"] = made.name
        if grid is not None:
            from ..grids import grids

            if grid not in grids():
                raise DiffsampError(f"grid: {grid!r} is not known; accepted: {', '.join(grids())}")
            changes["grid"] = grid
        if seed is not None:
            changes["seed"] = int(seed)
        if _ORIGINAL not in pipe.__dict__:
            object.__setattr__(pipe, _ORIGINAL, current)
        pipe.scheduler = scheduler_class(made.info.name).from_config(current.config, **changes)
    if teleport is not None:
        from .teleport import attach as attach_teleport

        attach_teleport(pipe, teleport, **(teleport_options or {}))
    if guidance is not None:
        from .guidance_hook import attach

        attach(pipe, guidance, guidance_scale)
    if corrector is not None:
        from .particles import attach as attach_corrector

        attach_corrector(pipe, corrector)
    return pipe


def restore(pipe: Any) -> Any:
    """Undo :func:`use`: the pipeline's own scheduler and guidance, bit for bit."""
    import importlib.util

    for module in ("guidance_hook", "particles", "teleport"):
        found = importlib.util.find_spec(f"diffsamp.adapters.{module}")
        if found is not None:
            importlib.import_module(f"diffsamp.adapters.{module}").detach(pipe)
    original = pipe.__dict__.pop(_ORIGINAL, None)
    if original is not None:
        pipe.scheduler = original
    return pipe


def register() -> None:
    """Let diffusers load saved pipelines that hold our schedulers in a process that has imported diffsamp alone."""
    from diffusers.pipelines import pipeline_loading_utils as loading

    loading.LOADABLE_CLASSES["diffsamp"] = {
        "SchedulerMixin": ["save_pretrained", "from_pretrained"],
        "BaseGuidance": ["save_pretrained", "from_pretrained"],
        "DiffusionPipeline": ["save_pretrained", "from_pretrained"],
    }
