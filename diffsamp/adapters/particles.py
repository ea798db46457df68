"""A corrector in a diffusers pipeline: num_images_per_prompt are the particles of a prompt.

    diffsamp.use(pipe, "sde-dpmpp-2m", corrector="fkc:target=cfg,particles=8")
    pipe(prompt, num_images_per_prompt=8)          # one picture per prompt: a draw by weight
    diffsamp.adapters.particles.attached(pipe).result.weights

The scheduler sees only the guided prediction, and a mix cannot give |eps_c − eps_u|², so a forward hook on the denoiser
keeps the raw predictions of every step. ``scheduler.step`` then closes the weights, resamples, and applies the row; the
last step returns the chosen particles only (all of them with ``choose=all``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import engine, rng
from ..correctors import Corrector, Recipe, Result, State, parse
from ..correctors.corrector import _CHOICE_STREAM, _RESAMPLING_STREAM
from ..correctors.potentials import with_vae
from ..correctors.spans import require_noise
from ..correctors.targets import Target
from ..errors import DiffsampError

_ATTRIBUTE = "_diffsamp_particles"


def attach(pipe: Any, corrector: str | Corrector | Recipe) -> Particles:
    """Put a corrector into a pipeline, in place of one attached before.

    Raises:
        DiffsampError: the scheduler is not one of ours or is deterministic, another guidance is attached, the target
            needs predictions that the pipeline does not make, or the corrector's text is wrong.
    """
    from .cfg_form import DENOISERS, cfg_form
    from .diffusers import PlanScheduler
    from .guidance_hook import attached as guided

    recipe = parse(corrector)
    scheduler = pipe.scheduler
    if not isinstance(scheduler, PlanScheduler):
        raise DiffsampError(
            f"corrector: the scheduler is {type(scheduler).__name__}; give a solver too, as in "
            "diffsamp.use(pipe, 'sde-dpmpp-2m', corrector=...)"
        )
    if not scheduler.solver.info.stochastic:
        raise DiffsampError(
            f"solver: {scheduler.solver.name} is deterministic, so duplicated particles would stay identical; "
            "accepted: a stochastic solver, e.g. sde-dpmpp-2m"
        )
    if scheduler.config["clip_sample"] or scheduler.config["thresholding"]:
        raise DiffsampError("clip_sample, thresholding: change the prediction that is weighed; turn them off")
    if guided(pipe) is not None:
        raise DiffsampError("guidance: is the target of a corrector; leave it out, write target=cfg,scale=5")
    modules = [m for name in DENOISERS if isinstance(m := getattr(pipe, name, None), torch.nn.Module)]
    if not modules:
        raise DiffsampError(f"corrector: {type(pipe).__name__} has none of the components {', '.join(DENOISERS)}")
    wanted = 2 if isinstance(recipe, Recipe) and recipe.open is not None else _corrector(recipe).conditions
    if wanted > 2:
        raise DiffsampError(f"target: needs {wanted} predictions and a pipeline makes 2; use diffsamp.sample")
    form = cfg_form(type(pipe)) if wanted == 2 else None
    if form is not None and form.keeps_norm:
        raise DiffsampError(f"corrector: {type(pipe).__name__} rescales the guided prediction; use diffsamp.sample")
    detach(pipe)
    made = Particles(pipe, recipe, form, modules)
    object.__setattr__(pipe, _ATTRIBUTE, made)
    return made


def detach(pipe: Any) -> None:
    """Take an attached corrector out again. No error where there is none."""
    made = pipe.__dict__.pop(_ATTRIBUTE, None)
    if made is not None:
        made.remove()


def attached(pipe: Any) -> Particles | None:
    """The corrector of a pipeline, if it has one; its ``result`` is that of the latest run."""
    return pipe.__dict__.get(_ATTRIBUTE)


def _corrector(recipe: Corrector | Recipe) -> Corrector:
    return recipe.corrector if isinstance(recipe, Recipe) else recipe


class Particles:
    """The corrector of one pipeline. ``result`` is None until a run has ended."""

    def __init__(self, pipe: Any, recipe: Corrector | Recipe, form: Any, modules: Sequence[torch.nn.Module]) -> None:
        self.pipe, self.recipe, self.form = pipe, recipe, form
        self.scheduler = pipe.scheduler
        self.result: Result | None = None
        self._outputs: list[torch.Tensor] = []
        self._corrector: Corrector | None = None
        self._state: State | None = None
        self._handles: list[Any] = []
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after))
        self.scheduler.step = self.step

    def remove(self) -> None:
        """Unhook the denoiser and give the scheduler its own step back."""
        for handle in self._handles:
            handle.remove()
        self.scheduler.__dict__.pop("step", None)

    # -- the denoiser -------------------------------------------------------------------------------------------------

    def _before(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The first network input at the spread that the target has at high noise."""
        if self.scheduler._state is not None:
            return None
        target = _corrector(self.recipe).target
        total = self.recipe.open.beta if isinstance(self.recipe, Recipe) and self.recipe.open else (
            1.0 if target is None else target.total
        )
        if total == 1.0 or self.scheduler.begin_index:
            return None
        factor = total**-0.5
        for name in ("hidden_states", "sample"):
            if isinstance(kwargs.get(name), torch.Tensor):
                return args, {**kwargs, name: kwargs[name] * factor}
        return (args[0] * factor, *args[1:]), kwargs

    def _after(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        if self.scheduler._state is None and self.scheduler._step_index is None and self._state is not None:
            self._state, self._outputs = None, []
        self._outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    def _predictions(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The raw predictions of this step, (conditional, unconditional) or one."""
        found, self._outputs = self._outputs, []
        if not found:
            raise DiffsampError("corrector: scheduler.step was called without a call of the denoiser before it")
        batch, channels = sample.shape[0], sample.shape[1]
        if self.form is not None and self.form.calls == 1 and len(found) == 1 and found[0].shape[0] == 2 * batch:
            halves = found[0].chunk(2)
            found = list(halves if self.form.cond_first else halves[::-1])
        if len(found) > 2 or any(f.shape[0] != batch for f in found):
            raise DiffsampError(
                f"corrector: the denoiser made predictions of shapes {[tuple(f.shape) for f in found]} for a sample of "
                f"{tuple(sample.shape)}; accepted: one, or a conditional and an unconditional one"
            )
        sign = -1.0 if self.form is not None and self.form.sign < 0 else 1.0
        if self.scheduler.config["process"] == "edm" and self.scheduler.config["prediction_type"] == "v_prediction":
            sign = -sign
        cut = [f[:, :channels] for f in found]
        return tuple(cut if sign > 0 else [-f for f in cut])

    # -- the scheduler ------------------------------------------------------------------------------------------------

    def _begin(self, timestep: Any, sample: torch.Tensor, predictions: int, generator: Any) -> None:
        scheduler = self.scheduler
        if scheduler._step_index is None:
            scheduler._init_step_index(timestep)
        scheduler._start = min(scheduler._step_index or 0, len(scheduler.plan) - 1)
        recipe = self.recipe
        if isinstance(recipe, Recipe) and recipe.open is not None:
            if predictions == 1:  # the pipeline runs without guidance: w = 1
                made = replace(recipe.corrector, target=Target((recipe.open.beta,)))
            else:
                scale = getattr(self.pipe, "_guidance_scale", None)
                made = recipe.at(float(scale) if isinstance(scale, int | float) else None)
        else:
            made = _corrector(recipe)
            if made.conditions > predictions:
                raise DiffsampError(
                    f"guidance_scale: {type(self.pipe).__name__} made no unconditional prediction; call it with one "
                    "above 1 (the scale is the corrector's)"
                )
            if made.conditions < predictions:
                raise DiffsampError("guidance_scale: the target takes one prediction; call the pipeline with 1")
        if scheduler.begin_index:
            made = replace(made, scale_start=False)
        if sample.shape[0] % made.particles:
            raise DiffsampError(
                f"num_images_per_prompt: a batch of {sample.shape[0]} does not divide into groups of {made.particles} "
                f"particles; accepted: a multiple of {made.particles} per prompt"
            )
        plan = scheduler._plan_from(scheduler._start)
        require_noise(plan)
        made = replace(made, potential=with_vae(made.potential, getattr(self.pipe, "vae", None)))
        self._corrector, self.result = made, None
        self._state = made.init(plan, sample)
        self._heads = self._group_seeds(sample.shape[0], made.particles, generator)

    def _group_seeds(self, n: int, particles: int, generator: Any) -> list[int]:
        if isinstance(generator, list | tuple):
            seeds = [g.initial_seed() % 2**63 for g in generator]
            for at in range(0, n, particles):
                if len(set(seeds[at : at + particles])) < min(particles, len(seeds[at : at + particles])):
                    raise DiffsampError(
                        f"generator: two particles of group {at // particles} share a seed; duplicates would stay "
                        "identical"
                    )
            return seeds[::particles]
        if generator is not None:
            first = generator.initial_seed()
        elif self.scheduler.config["seed"] is not None:
            first = int(self.scheduler.config["seed"])
        else:
            first = int(torch.randint(0, 2**62, (1,)))
        return [(first + g) % 2**63 for g in range(n // particles)]

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """In place of the scheduler's step; ``model_output`` is not used, the raw predictions are."""
        from .diffusers import PlanSchedulerOutput

        scheduler = self.scheduler
        outputs = self._predictions(sample)
        if scheduler._state is None:
            self._begin(timestep, sample, len(outputs), generator)
        corrector, state = self._corrector, self._state
        assert corrector is not None and state is not None
        if scheduler._state is not None and sample is not scheduler._returned:
            edited = sample.to(engine.working_dtype(sample.dtype))  # by a callback or an inpainting pipeline
            base = edited if state.run.committed is state.run.input else state.run.base
            state = replace(state, run=replace(state.run, input=edited, committed=base))
        plan = scheduler._plan_from(scheduler._start)
        row, run = plan.rows[state.run.index], self._state
        assert run is not None
        state = corrector.step(
            plan, state, outputs, lambda i: scheduler._noise(run.run, row, generator),
            lambda i: rng.uniform(self._heads, (2 * corrector.particles,), i, stream=_RESAMPLING_STREAM),
            prediction=scheduler.prediction,
        )  # fmt: skip
        self._state, scheduler._state = state, state.run
        scheduler._step_index += 1
        following = state.run.input.to(sample.dtype)
        scheduler._returned = following
        if state.run.index == len(plan.rows):
            following = self._finish(plan, state, following)
        return PlanSchedulerOutput(following, None) if return_dict else (following,)

    def _finish(self, plan: Any, state: State, samples: torch.Tensor) -> torch.Tensor:
        corrector = self._corrector
        assert corrector is not None
        u = rng.uniform(self._heads, (1,), len(plan.rows), stream=_CHOICE_STREAM)[:, 0]
        self.result = corrector.result(plan, corrector.finish(plan, state), samples, u)
        if corrector.choose == "all":
            return samples
        return samples[torch.from_numpy(self.result.chosen).to(samples.device)]


def class_denoiser(pipe: Any, *labels: int | None) -> Callable[..., Any]:
    """``denoiser(x, level)`` of the embedded image model that gives one raw prediction per label (None: no class).

    The predictions come from one network call; their type is ``pipe.scheduler.config.prediction_type``.
    """
    numbers: list[int] = [int(pipe.config.null_class) if label is None else int(label) for label in labels]

    @torch.no_grad()
    def denoise(x: torch.Tensor, level: Any) -> tuple[torch.Tensor, ...]:
        n = x.shape[0]
        classes = torch.tensor(numbers, device=x.device).repeat_interleave(n)
        times = torch.full((n * len(numbers),), float(level), device=x.device)
        value = x.repeat(len(numbers), 1, 1, 1).to(pipe.unet.dtype)
        return pipe.unet(value, times, classes, return_dict=False)[0].chunk(len(numbers))

    return denoise
