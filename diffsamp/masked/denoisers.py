"""Networks as denoisers: `denoiser(x, t, positions=None, rows=None) -> logits`.

x is int64 (A, L) with mask ids, t float64 (A,) in [0, 1]. Without `positions` the logits are (A, L, V); with
`positions`, int64 (A, K), they are (A, K, V), the head being applied there only. `rows`, int64 (A,), says which rows
of the batch are in this call. A plain callable may take any subset of the last two arguments.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffsamp.errors import DiffsampError

Denoiser = Callable[..., Tensor]


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a callable names the parameter `name`; a `**kwargs` that would swallow it does not count."""
    target = function.forward if isinstance(function, torch.nn.Module) else function
    key = getattr(target, "__func__", target)  # a bound method is a new object each time
    try:
        known = _PARAMETERS.get(key)
    except TypeError:  # neither hashable nor weakly referable
        return name in _parameters(target)
    if known is None:
        known = _PARAMETERS[key] = _parameters(target)
    return name in known


# Reading a signature takes longer than drawing a token; it is read once for each function.
_PARAMETERS: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()


def _parameters(target: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return frozenset()


def call(denoiser: Denoiser, x: Tensor, t: Tensor, positions: Tensor | None, rows: Tensor) -> Tensor:
    """Logits at `positions` (A, K, V), or everywhere if that is None, from any form of denoiser; shape checked."""
    extra: dict[str, Any] = {"rows": rows} if accepts(denoiser, "rows") else {}
    only = positions is not None and accepts(denoiser, "positions")
    if only:
        extra["positions"] = positions
    logits = denoiser(x, t, **extra)
    expected = positions.shape if only and positions is not None else x.shape
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != expected:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DiffsampError(f"logits: the denoiser gave {found}; ({expected[0]}, {expected[1]}, V) is needed")
    return logits if positions is None or only else rows_at(logits, positions)


def rows_at(tensor: Tensor, positions: Tensor) -> Tensor:
    """Rows (A, K, V) of (A, L, V) at `positions` int64 (A, K); whole rows are copied, unlike in `gather`."""
    if len(tensor) == 1:
        return tensor[0].index_select(0, positions[0])[None]
    return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], positions]


class MaskedLM:
    """A Hugging Face masked language model, called as `model(input_ids).logits`, as a denoiser.

    Where only some positions are asked for, the output head runs there only: by the model's own argument (`positions`,
    or `logits_to_keep` where all rows ask for the same ones), else by handing its output embedding these rows alone,
    if the first such call shows that the logits are the same (one more evaluation, once).

    Args:
        model: the network (MDLM, LLaDA, Dream, DiffuCoder, any `*ForMaskedLM`), or one that returns the logits itself.
        shift: the logits of position i predict token i + 1 (Dream, DiffuCoder); they are moved right by one.
        pad_id: positions that hold it are hidden from attention. It need not be a token of the model.
        time_argument: keyword under which the model takes the time, e.g. "timesteps" of MDLM; None for a time-free one.
        vocab_size: expected width of the logits; None accepts any.
    """

    def __init__(
        self,
        model: Any,
        *,
        shift: bool = False,
        pad_id: int | None = None,
        time_argument: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.model = model
        self.shift = shift
        self.pad_id = pad_id
        self.time_argument = time_argument
        self.vocab_size = vocab_size
        self._native_positions = accepts(model, "positions")
        self._keeps_rows = accepts(model, "logits_to_keep")
        self._head = _output_head(model)
        self._head_checked = False

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, positions: Tensor | None = None) -> Tensor:
        inputs: dict[str, Any] = {}
        if self.pad_id is None and bool((x < 0).any()):
            raise DiffsampError("x holds -1, the padding of shorter rows; hide it with MaskedLM(model, pad_id=-1)")
        if self.pad_id is not None:
            inputs["attention_mask"] = (x != self.pad_id).long()
            x = x.masked_fill(x == self.pad_id, 0) if self.pad_id < 0 else x
        if self.time_argument is not None:
            inputs[self.time_argument] = t.to(torch.float32)
        # Where position i is predicted by row i - 1, row 0 stands for itself.
        wanted = positions if positions is None or not self.shift else (positions - 1).clamp_min(0)
        if wanted is not None and self._native_positions:
            return self._checked(self.model(x, positions=wanted, **inputs))
        if wanted is not None and self._keeps_rows and bool((wanted == wanted[:1]).all()):
            return self._checked(self.model(x, logits_to_keep=wanted[0], **inputs))
        if wanted is not None and self._head is not None and self._head_checked:
            return self._checked(self._at_head(self._head, x, wanted, inputs))
        logits = self._checked(self.model(x, **inputs))
        if wanted is not None:
            logits = rows_at(logits, wanted)
            return logits if self._head is None else self._check_head(self._head, logits, x, wanted, inputs)
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if self.shift else logits

    def _at_head(self, head: torch.nn.Module, x: Tensor, wanted: Tensor, inputs: dict[str, Any]) -> Any:
        """The model's output with only the hidden states at `wanted` (A, K) given to its output embedding."""

        def keep(module: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            return (rows_at(given[0], wanted), *given[1:])

        hook = head.register_forward_pre_hook(keep)
        try:
            return self.model(x, **inputs)
        finally:
            hook.remove()

    def _check_head(
        self, head: torch.nn.Module, logits: Tensor, x: Tensor, wanted: Tensor, inputs: dict[str, Any]
    ) -> Tensor:
        """Logits at `wanted` by the head there alone if these are the same; else the given ones, and no more tries."""
        try:
            found = self._checked(self._at_head(head, x, wanted, inputs))
            if found.shape == logits.shape:
                tolerance = 0.02 * float(logits.abs().nan_to_num(posinf=0.0).amax())  # that of half precision
                near = torch.isclose(found.float(), logits.float(), rtol=0.0, atol=tolerance, equal_nan=True)
                self._head_checked = bool(near.all())
        except (RuntimeError, IndexError, TypeError, ValueError):
            pass  # the model does more with its logits, and counts on those of every position
        if self._head_checked:
            return found
        self._head = None
        return logits

    def _checked(self, output: Any) -> Tensor:
        logits = output if isinstance(output, Tensor) else output.logits
        if self.vocab_size is not None and logits.shape[-1] != self.vocab_size:
            raise DiffsampError(f"logits are {logits.shape[-1]} wide; the tokenizer has {self.vocab_size} tokens")
        return logits


def _output_head(model: Any) -> torch.nn.Module | None:
    """The model's output embedding if it has one of its own."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, torch.nn.Module) and not isinstance(head, torch.nn.Embedding) else None


class ClassifierFreeGuidance:
    """log p = (1 - g) log p_u + g log p_c, renormalised: guidance on tokens that leaves the rate of unmasking alone.

    Args:
        denoiser: the conditional one.
        scale: g; 1 is the conditional network itself, untouched and without a second call. LLaDA's cfg_scale s is
            g = s + 1, and Amused's guidance_scale is g.
        unconditional: another denoiser; None calls the same one with the prompt masked.
        prompt: bool (B, L), the positions to mask for it, and `mask_id`, the token to put there.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float,
        *,
        unconditional: Denoiser | None = None,
        prompt: Tensor | None = None,
        mask_id: int | None = None,
    ) -> None:
        if unconditional is None and (prompt is None or mask_id is None):
            raise DiffsampError("guidance needs `unconditional`, or `prompt` and `mask_id` to mask the prompt with")
        self.denoiser, self.scale, self.unconditional = denoiser, float(scale), unconditional
        self.prompt, self.mask_id = prompt, mask_id
        if prompt is not None and (prompt.dtype != torch.bool or prompt.ndim != 2):
            raise DiffsampError(f"prompt must be bool (B, L); got {prompt.dtype}, shape {tuple(prompt.shape)}")

    def __call__(self, x: Tensor, t: Tensor, positions: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        rows = torch.arange(x.shape[0], device=x.device) if rows is None else rows
        conditional = call(self.denoiser, x, t, positions, rows)
        if self.scale == 1.0:
            return conditional
        if self.unconditional is not None:
            other = call(self.unconditional, x, t, positions, rows)
        else:
            assert self.prompt is not None and self.mask_id is not None
            if self.prompt.shape[1] != x.shape[1] or int(rows.max()) >= len(self.prompt):
                raise DiffsampError(
                    f"prompt is {tuple(self.prompt.shape)}; one row for each sequence of {x.shape[1]} tokens is needed"
                )
            other = call(self.denoiser, x.masked_fill(self.prompt.to(x.device)[rows], self.mask_id), t, positions, rows)
        c, u = (logits.log_softmax(-1, dtype=torch.float32) for logits in (conditional, other))
        guided = torch.where(c == -torch.inf, c, u + self.scale * (c - u))  # a class the model excludes stays out
        return guided.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).log_softmax(-1)
