"""A guided solver step in one kernel of `diffsamp_kernels`, where the guidance and the plan's row allow it.

Plain CFG and adaptive projected guidance with an l2 norm, and rows that are a sum over the input, the guided x0 and up
to three older outputs. It is taken on a GPU with Triton, and where ``DIFFSAMP_BACKEND`` names ``triton``, ``compiled``
or ``naive``.
"""

from __future__ import annotations

import torch
from diffsamp_kernels import guided_coefficients
from diffsamp_kernels import guided_step as kernel
from diffsamp_kernels.dispatch import choose

from .. import engine
from ..plan import Plan
from .apg import APG
from .base import Guidance, GuidanceState
from .cfg import CFG

OLDER = ("m1", "m2", "m3")


def fused_step(
    plan: Plan,
    state: engine.State,
    guidance: Guidance,
    memory: GuidanceState,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    convert: tuple[float, float],
) -> tuple[engine.State, GuidanceState] | None:
    """The next states as :func:`diffsamp.guidance.step.guided_step` gives them, or None where the kernel cannot.

    Args:
        convert: (p, q) of the raw predictions, x0 = p·x + q·prediction.
    """
    x = state.input
    if state.index >= len(plan.rows) or choose(None, x) == "torch":
        return None
    momentum, options = 0.0, {}
    if type(guidance) is APG and guidance.norm_kind == "l2":
        momentum = guidance.momentum
        options = {"eta": guidance.eta, "norm_threshold": guidance.norm, "momentum": momentum}
    elif type(guidance) is not CFG:
        return None
    program = engine.programs(plan, "sample")[state.index]
    own = isinstance(state.committed, tuple) or state.committed is x
    if program.direct is None or program.uses_noise or program.keep_pin or not own:
        return None
    weights, older = dict(program.direct), state.history[:3]
    known = ("input", "raw", *OLDER[: len(older)])
    if not weights.keys() <= set(known) or (x.dtype == torch.float64 and choose(None, x) == "triton"):
        return None
    coef = guided_coefficients(
        [weights.get(name, 0.0) for name in known], program.convert, x0=convert, scale=guidance.scale, **options
    )
    buffer = memory.buffer
    if momentum != 0.0 and buffer is None:
        buffer = torch.zeros_like(x)
    made = kernel(
        cond, uncond, x, older, coef=coef[None].to(x.device), guidance="apg" if options else "cfg",
        momentum=buffer if momentum != 0.0 else None, second=True,
    )  # fmt: skip
    # The second row is the output in the plan's form; x0 stands for the prediction.
    assert made.second is not None
    history = (made.second, *state.history[: plan.depth - 1])
    bank = {"input": x, "raw": made.x0} | {f"m{j}": m for j, m in enumerate(history)}
    committed = engine.committed_after(program, made.next_input, bank)
    kept = history if plan.depth > 1 else ()
    following = engine.State(state.index + 1, made.next_input, committed, kept, state.pin)
    return following, memory.advance(made.momentum)
