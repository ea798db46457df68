"""How a pipeline does classifier-free guidance, read from the source of its ``__call__``.

Every classic pipeline writes ``u + w * (c - u)``. Where c and u come from decides how a hook can take their place:
both from one batched call (``u, c = pred.chunk(2)``) or from two calls of the denoiser, the conditional one first.
Anything else (three branches, post-processing between the call and the sum) is not recognised, and refused.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

from ..errors import DiffsampError

DENOISERS = ("unet", "transformer", "transformer_2")
_STORED_SCALES = ("self.guidance_scale", "self._guidance_scale", "current_guidance_scale")


@dataclass(frozen=True)
class CFGForm:
    """A recognised form.

    Attributes:
        calls: denoiser calls per step, 1 (batched) or 2.
        cond_first: whether the first half of a batched call is the conditional one (always so for two calls).
        sign: −1 where the pipeline negates the prediction before the scheduler sees it.
        scale_stored: whether the pipeline keeps its scale, so that a hook can read it.
        keeps_norm: whether the pipeline rescales the guided prediction to the conditional one's norm (Qwen-Image).
        scale_name: the pipeline's own name for the scale, for messages.
        img2img: whether a run can start in the middle of the schedule.
    """

    calls: int
    cond_first: bool
    sign: float
    scale_stored: bool
    keeps_norm: bool
    scale_name: str
    img2img: bool


@functools.cache
def cfg_form(kind: type) -> CFGForm:
    """The form of a pipeline class; DiffsampError names why there is none."""
    name = kind.__name__
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.__call__)))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        raise DiffsampError(f"guidance: the source of {name}.__call__ cannot be read, so its CFG is unknown") from None
    if "self.guider" in source:
        raise DiffsampError(f"guidance: {name} takes a guider; set pipe.guider = diffsamp.APGGuidance(...) instead")
    refuse = functools.partial(_refuse, name)
    sums = _guided_sums(tree)
    if not sums:
        raise refuse("it makes no pair of conditional and unconditional predictions")
    if len({(u, c) for u, c, _ in sums}) > 1:
        raise refuse("it guides more than one prediction")
    uncond, cond, scale = sums[0]
    if any(word in source for word in ("chunk(3)", "chunk(4)", "_perturbed_attention_guidance", "diffusion_forcing")):
        raise refuse("it has more than two branches")
    if "max_guidance_scale" in source:
        raise refuse("every frame has a scale of its own")
    if "c_skip" in source or "c_out" in source:
        raise refuse("it preconditions the prediction itself")
    values = _assignments(tree, {uncond, cond})
    split = [(names, value) for names, value in values if isinstance(names, tuple) and {uncond, cond} <= set(names)]
    common: dict[str, Any] = dict(
        sign=-1.0 if _negates(tree) else 1.0,
        scale_stored=scale in _STORED_SCALES,
        keeps_norm="cond_norm / noise_norm" in source,
        scale_name=scale.rpartition(".")[2].removeprefix("_").replace("current_", ""),
        img2img="strength" in inspect.signature(inspect.unwrap(kind.__call__)).parameters,
    )
    if split:
        names, value = split[0]
        if len(split) > 1 or len(names) != 2 or not _halves(value):
            raise refuse("its halves are not two equal parts of one batch")
        return CFGForm(calls=1, cond_first=names[0] == cond, **common)
    calls = [(node.lineno, target, node) for target, node in values if target in (uncond, cond) and _denoises(node)]
    calls.sort(key=lambda item: item[0])
    if [target for _, target, _ in calls] != [cond, uncond]:
        raise refuse("its conditional and unconditional calls are not one each, in that order")
    if any(isinstance(node, ast.Subscript) and not _denoises(node) for _, node in values):
        raise refuse("it cuts the prediction before guiding")
    return CFGForm(calls=2, cond_first=True, **common)


def _refuse(name: str, why: str) -> DiffsampError:
    return DiffsampError(f"guidance: the CFG of {name} is not recognised: {why}")


def _guided_sums(tree: ast.AST) -> list[tuple[str, str, str]]:
    """(u, c, w) of every  u + w * (c - u)  in the source."""
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and isinstance(node.right, ast.BinOp)):
            continue
        product = node.right
        if not isinstance(product.op, ast.Mult):
            continue
        for scale, difference in ((product.left, product.right), (product.right, product.left)):
            if isinstance(difference, ast.BinOp) and isinstance(difference.op, ast.Sub):
                u = ast.unparse(node.left)
                if ast.unparse(difference.right) == u:
                    found.append((u, ast.unparse(difference.left), ast.unparse(scale)))
    return found


def _assignments(tree: ast.AST, wanted: set[str]) -> list[tuple[str | tuple[str, ...], ast.expr]]:
    found: list[tuple[str | tuple[str, ...], ast.expr]] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        names = tuple(map(ast.unparse, target.elts)) if isinstance(target, ast.Tuple) else ast.unparse(target)
        if (wanted & set(names)) if isinstance(names, tuple) else names in wanted:
            found.append((names, node.value))
    return found


def _halves(value: ast.AST) -> bool:
    text = ast.unparse(value).replace(" ", "")
    return text.endswith((".chunk(2)", ".chunk(2,dim=0)")) or (text.startswith("torch.split(") and "//2" in text)


def _denoises(node: ast.AST) -> bool:
    while isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node, ast.Name):
        node = node.value
    if not isinstance(node, ast.Call):
        return False
    return ast.unparse(node.func) in {*(f"self.{name}" for name in DENOISERS), "current_model"}


def _negates(tree: ast.AST) -> bool:
    return any(
        isinstance(node, ast.Assign) and isinstance(node.value, ast.UnaryOp) and isinstance(node.value.op, ast.USub)
        and "pred" in ast.unparse(node.targets[0]) and "pred" in ast.unparse(node.value)
        for node in ast.walk(tree)
    )  # fmt: skip
