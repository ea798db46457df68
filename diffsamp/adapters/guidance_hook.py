"""Guidance in a classic diffusers pipeline, by a forward hook on its denoiser; the pipeline's code is not touched.

A batched pipeline computes u + w·(c − u) from the two halves of one output: when both halves are the guided prediction
g, that sum is g to the bit. A pipeline of two calls gets g written into the first result and returned as the second.
The prediction is moved to x0 and back with the level at which the network was called.

    hook = attach(pipe, "apg:7.5,preset=sdxl")     # or diffsamp.use(pipe, guidance=...)
    pipe(prompt, guidance_scale=7.5)               # the pipeline's scale must be above 1, or it makes no pair
    detach(pipe)

State (momentum) is reset at every run, advances once per solver step, and is dropped when shape, device or dtype
change.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import DiffsampError
from ..guidance import AutoGuidance, Guidance, Interval, parse, written
from ..guidance.base import GuidanceState
from .cfg_form import DENOISERS, CFGForm, cfg_form
from .current_level import Here, LevelReader
from .skip_layers import skipping
from .x0_space import denoiser_input, denoiser_timestep, guided_prediction, noisy_part

_ATTRIBUTE = "_diffsamp_guidance"


def attach(pipe: Any, guidance: str | Guidance, guidance_scale: float | None = None, **options: Any) -> Any:
    """Put a guidance into a pipeline, in place of its own and of one attached before; the hook is returned.

    A modular pipeline gets a guider (which is returned) in place of its own.

    Args:
        pipe: a diffusers pipeline.
        guidance: ``"apg"``, ``"apg:7.5,norm=15"``, or a guidance object.
        guidance_scale: the scale, where ``guidance`` has none; without either, the pipeline's own is read at every
            step.
        options: options of the method, as in the text.

    Raises:
        DiffsampError: the pipeline's CFG is not recognised, its model is guidance-distilled or unconditional, it does
            not keep its scale and none is given, or the method needs more than two predictions.
    """
    chosen = parse(guidance, guidance_scale, **options)
    if hasattr(pipe, "update_components"):
        return _attach_guider(pipe, chosen)
    if chosen.conditions != 2:
        raise DiffsampError(
            f"guidance: this method takes {chosen.conditions} predictions and a pipeline makes 2; use diffsamp.sample"
        )
    modules = {
        name: module
        for name in DENOISERS
        if isinstance(module := getattr(pipe, name, None), torch.nn.Module)
    }
    name = type(pipe).__name__
    for module in modules.values():
        if _config(module, "time_cond_proj_dim") is not None:
            raise DiffsampError(f"guidance: the model of {name} is guidance-distilled (it is told the scale); no CFG")
    try:
        form = cfg_form(type(pipe))
    except DiffsampError:
        if any(_config(module, "guidance_embeds") for module in modules.values()):
            raise DiffsampError(
                f"guidance: the model of {name} is guidance-distilled: one call per step, no unconditional prediction"
            ) from None
        raise
    if not modules:
        raise DiffsampError(f"guidance: {name} has none of the components {', '.join(DENOISERS)}")
    if _config(pipe, "expand_timesteps"):
        raise DiffsampError(f"guidance: {name} gives every frame its own noise level here (expand_timesteps)")
    if chosen.guidance_scale is None and not form.scale_stored:
        raise DiffsampError(
            f"guidance_scale: {name} does not keep its {form.scale_name}; give the scale, as in guidance='apg:7.5'"
        )
    method = _innermost(chosen)
    if isinstance(method, AutoGuidance) and method.weak is None and not method.skip_layers:
        raise DiffsampError("weak, skip_layers: autoguidance in a pipeline needs one of them")
    detach(pipe)
    hook = GuidanceHook(pipe, chosen, form, modules)
    object.__setattr__(pipe, _ATTRIBUTE, hook)
    return hook


def _attach_guider(pipe: Any, chosen: Guidance) -> Any:
    """A modular pipeline: its guider is replaced, and kept for :func:`detach`."""
    from .guiders import MethodGuidance

    if getattr(pipe, "guider", None) is None:
        raise DiffsampError(f"guidance: {type(pipe).__name__} has no guider to replace")
    guider = MethodGuidance(guidance=written(chosen)).bind(pipe)
    detach(pipe)
    object.__setattr__(pipe, _ATTRIBUTE, pipe.guider)
    pipe.update_components(guider=guider)
    return guider


def detach(pipe: Any) -> None:
    """Take an attached guidance out again; nothing is left behind. No error where there is none."""
    hook = pipe.__dict__.pop(_ATTRIBUTE, None)
    if isinstance(hook, GuidanceHook):
        hook.remove()
    elif hook is not None:
        pipe.update_components(guider=hook)


def attached(pipe: Any) -> GuidanceHook | None:
    """The hook of a classic pipeline, if it has one."""
    hook = pipe.__dict__.get(_ATTRIBUTE)
    return hook if isinstance(hook, GuidanceHook) else None


class GuidanceHook:
    """The hook of one pipeline. ``state`` is the guidance's, for inspection."""

    def __init__(self, pipe: Any, guidance: Guidance, form: CFGForm, modules: dict[str, torch.nn.Module]) -> None:
        self.pipe, self.guidance, self.form = pipe, guidance, form
        self.state: GuidanceState | None = None
        self._handles = [
            module.register_forward_hook(_Call(self, name), with_kwargs=True) for name, module in modules.items()
        ]
        self._inside = False
        self._forget(None)

    def remove(self) -> None:
        """Unhook every denoiser and drop the state."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget(None)

    # -- one run ------------------------------------------------------------------------------------------------------

    def _forget(self, timesteps: torch.Tensor | None) -> None:
        self._timesteps = timesteps
        self._reader: LevelReader | None = None
        self._like: tuple | None = None
        self._key: Any = None
        self._before: GuidanceState | None = None
        self._held: tuple[torch.Tensor, torch.Tensor | None, Any] | None = None
        self.state = None

    def _place(self, timestep: Any, like: torch.Tensor, batch: int) -> tuple[Here, bool]:
        """Where the run stands, and whether it has just begun; forgets the run before."""
        scheduler = self.pipe.scheduler
        # set_timesteps makes a new tensor, so identity tells runs apart (an aborted one too). Holding the tensor keeps
        # its identity from being reused.
        if self._timesteps is not scheduler.timesteps:
            self._forget(scheduler.timesteps)
        signature = (tuple(like.shape[1:]), batch, like.device, like.dtype)
        if self._like is not None and self._like != signature:
            self._forget(scheduler.timesteps)
        begun = self._reader is None or self._reader.scheduler is not scheduler
        if begun:
            self._reader = LevelReader(scheduler, sign=self.form.sign, img2img=self.form.img2img)
            self._like = signature
        assert self._reader is not None
        here = self._reader.here(timestep)
        counted = isinstance(here.key, int) and isinstance(self._key, int) and self._reader.sigmas is not None
        if not begun and counted and here.key < self._key:
            self._forget(scheduler.timesteps)  # went back: another run on the same schedule
            return self._place(timestep, like, batch)
        return here, begun

    def _enter(self, here: Here, batch: int) -> GuidanceState:
        """The state to start this evaluation from: one advance per step, however many evaluations it takes."""
        if self.state is None:
            steps = getattr(self.pipe, "_num_timesteps", None) or len(self.pipe.scheduler.timesteps)
            self.state = self.guidance.init(batch, steps)
        again = here.midway or here.key == self._key
        if again and self._before is not None:
            return self._before
        self._before = self.state
        return self.state

    def _leave(self, here: Here, state: GuidanceState) -> None:
        if not here.midway:
            self.state = state
        self._key = here.key

    # -- one call -----------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def call(self, name: str, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook: None leaves the output as it is."""
        if self._inside:
            return None
        self._check_run(kwargs)
        if self.form.calls == 1:
            return self._batched(name, module, args, kwargs, output)
        return self._two_calls(name, module, args, kwargs, output)

    def _check_run(self, kwargs: dict[str, Any]) -> None:
        lost = getattr(self.pipe, "_guidance_rescale", 0.0)
        if isinstance(lost, int | float) and lost > 0:
            raise DiffsampError(
                f"guidance_rescale: the pipeline was called with {lost:g}, which an attached guidance makes void; "
                f"use guidance='cfg-rescale:7.5,rescale={lost:g}' or leave it out"
            )
        if kwargs.get("skip_layers") is not None:
            raise DiffsampError("skip_guidance_layers: is not supported together with an attached guidance")

    def _batched(self, name: str, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        prediction = _tensor_of(output)
        x = denoiser_input(args, kwargs)
        doubled = getattr(self.pipe, "do_classifier_free_guidance", None)
        timestep = denoiser_timestep(args, kwargs)
        here, begun = self._place(timestep, prediction, prediction.shape[0] // 2)
        if doubled is None and begun:
            # The pipeline does not say whether it doubled its batch; two equal halves are the sign.
            halves = x.chunk(2)
            doubled = x.shape[0] % 2 == 0 and torch.equal(halves[0], halves[-1])
        if doubled is False:
            raise DiffsampError(
                f"{self.form.scale_name}: the pipeline made no unconditional prediction; call it with a value above 1 "
                "(the strength is the attached guidance's)"
            )
        first, second = prediction.chunk(2)
        cond, uncond = (first, second) if self.form.cond_first else (second, first)
        noisy = x.chunk(2)[0]
        if isinstance(_innermost(self.guidance), AutoGuidance):
            half = slice(0, cond.shape[0]) if self.form.cond_first else slice(cond.shape[0], None)
            uncond = self._weak(module, *_cut((args, kwargs), prediction.shape[0], half))
        noisy, channels = noisy_part(noisy, cond, type(self.pipe).__name__)
        guided = self._guide(name, cond[:, :channels], uncond[:, :channels], noisy, here)
        parts = []
        for half in (first, second):
            parts.append(guided if channels == half.shape[1] else torch.cat((guided, half[:, channels:]), 1))
        return _with_tensor(output, torch.cat(parts))

    def _two_calls(self, name: str, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        prediction = _tensor_of(output)
        here, _ = self._place(denoiser_timestep(args, kwargs), prediction, prediction.shape[0])
        if self._held is None:
            weak = None
            if isinstance(_innermost(self.guidance), AutoGuidance):
                weak = self._weak(module, args, kwargs)
            self._held = (prediction, weak, (here.key, here.midway))
            return None
        cond, weak, key = self._held
        if key != (here.key, here.midway):
            self._held = None
            raise DiffsampError(
                f"{self.form.scale_name}: {type(self.pipe).__name__} made no unconditional prediction; give it a "
                f"negative_prompt and a {self.form.scale_name} above 1"
            )
        self._held = None
        noisy, channels = noisy_part(denoiser_input(args, kwargs), prediction, type(self.pipe).__name__)
        if channels != prediction.shape[1]:
            raise DiffsampError(f"guidance: {type(self.pipe).__name__} predicts more than it denoises; not supported")
        guided = self._guide(name, cond, prediction if weak is None else weak, noisy, here)
        if self.form.keeps_norm and self.guidance.linear:
            # The pipeline's own rescaling becomes a factor of 1 on two equal results, so it is done here. Methods
            # that govern the norm themselves go without.
            guided = guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        # Into the tensor that the pipeline already holds: u' + w (c' - u') is then the guided prediction to the bit.
        cond.copy_(guided)
        return _with_tensor(output, guided.clone())

    def _guide(self, name: str, cond: torch.Tensor, uncond: torch.Tensor, x: torch.Tensor, here: Here) -> torch.Tensor:
        """The guided prediction, in the network's own space and dtype."""
        guidance = self.guidance if self.guidance.guidance_scale is not None else self._with_pipeline_scale(name)
        before = self._enter(here, cond.shape[0])
        guided, after = guided_prediction(guidance, before, cond, uncond, x, here)
        self._leave(here, after)
        return guided

    def _with_pipeline_scale(self, name: str) -> Guidance:
        scale = getattr(self.pipe, "_guidance_scale", None)
        if name == "transformer_2":
            scale = getattr(self.pipe, "_guidance_scale_2", None) or scale
        if isinstance(scale, torch.Tensor) or scale is None:
            raise DiffsampError("guidance_scale: the pipeline's is not one number; give it, as in guidance='apg:7.5'")
        return self.guidance.with_scale(float(scale))

    def _weak(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        method = _innermost(self.guidance)
        self._inside = True
        try:
            if method.weak is not None:
                return _tensor_of(method.weak(*args, **kwargs))
            with skipping(module, method.skip_layers):
                return _tensor_of(module(*args, **kwargs))
        finally:
            self._inside = False


class _Call:
    """The hook as an object, so that a pipeline that holds one can be deep-copied with its module."""

    def __init__(self, hook: GuidanceHook, name: str) -> None:
        self.hook, self.name = hook, name

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return self.hook.call(self.name, module, args, kwargs, output)  # type: ignore[attr-defined]


def _innermost(guidance: Guidance) -> Any:
    return _innermost(guidance.inner) if isinstance(guidance, Interval) else guidance


def _config(owner: Any, name: str) -> Any:
    config = getattr(owner, "config", None)
    return getattr(config, name, None) if config is None or not hasattr(config, "get") else config.get(name)


def _tensor_of(output: Any) -> torch.Tensor:
    found = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(found, torch.Tensor):
        raise DiffsampError("guidance: the denoiser's prediction is not one tensor")
    return found


def _with_tensor(output: Any, tensor: torch.Tensor) -> Any:
    if isinstance(output, torch.Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    changed = type(output)(**dict(output))
    changed[next(iter(output))] = tensor
    return changed


def _cut(tree: Any, batch: int, half: slice) -> Any:
    """Every tensor with a doubled batch axis, halved."""
    if isinstance(tree, torch.Tensor):
        return tree[half] if tree.ndim and tree.shape[0] == batch else tree
    if isinstance(tree, dict):
        return {key: _cut(value, batch, half) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_cut(value, batch, half) for value in tree)
    return tree
