"""The published search of one compensation ratio: AdamW through the network.

From ratio 1, ``iterations`` steps of AdamW with learning rate 0.1 and the optimiser's own weight decay (0.01) on the
mean squared distance to the reference state after the next corrector; the last iterate is kept, whatever its loss. Each
iteration is a network call with a backward pass where the next row corrects, and none where it does not.

It is here for comparison: the scalar search finds the same ratios with about a sixth of the calls and no gradients.

Source: Zhao et al. 2024, DC-Solver, arXiv:2409.03755, Section 3.3; 40 iterations in the paper, 20 in the authors' code.
"""

from __future__ import annotations

import torch

from .. import engine
from ..errors import DiffsampError
from ..plan import Mix, Plan
from .reference import Denoiser

LEARNING_RATE = 0.1


def _mixed(mix: Mix, bank: dict[str, torch.Tensor]) -> torch.Tensor:
    """Out of place throughout, so that gradients flow."""
    return torch.stack([weight * bank[name] for name, weight in mix.terms()]).sum(0)


def _weights(nodes: list[float], at: torch.Tensor) -> list[torch.Tensor]:
    """Lagrange weights at ``at``, differentiable."""
    return [
        torch.stack([(at - other) / (node - other) for q, other in enumerate(nodes) if q != j]).prod()
        for j, node in enumerate(nodes)
    ]


def adamw_ratio(
    plan: Plan,
    state: engine.State,
    output: torch.Tensor,
    goal: torch.Tensor,
    denoiser: Denoiser,
    *,
    k: int,
    prediction: str,
    iterations: int = 40,
) -> tuple[float, float, float, int]:
    """The ratio of row ``state.index``.

    Args:
        plan: the base with ratio 1 from this row on.
        state: before the row; output: the network's raw prediction there; goal: the reference at the next level.
        denoiser: differentiable with respect to its input.
        k: degree of the interpolation.

    Returns:
        (ratio, loss at the ratio, loss at ratio 1, network calls made).

    Raises:
        DiffsampError: the network gives no gradient, or a loss is not finite.
    """
    i = state.index
    row = plan.rows[i]
    times = [plan.rows[i - j].level.t for j in range(k + 1)]
    following = plan.rows[i + 1] if i + 1 < plan.nfe else None
    corrector = following.correct if following is not None and following.correct is not None else None
    calls = 0

    def converted(index: int, raw: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        p, q = plan.conversion(index, prediction)
        return q * raw.to(x.dtype) if p == 0.0 else p * x + q * raw.to(x.dtype)

    history = [converted(i, output, state.input), *state.history]
    bank = {"input": state.input, "base": state.base} | {f"m{j}": m for j, m in enumerate(history)}
    if row.keep_pin:
        bank["pin"] = row.pinned(state.input, history[0])
    elif state.pin is not None:
        bank["pin"] = state.pin
    if row.correct is not None:
        bank["base"] = _mixed(row.correct, bank)

    def loss(ratio: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        weights = _weights(times, times[1] + ratio * (times[0] - times[1]))
        m0 = torch.stack([w * m for w, m in zip(weights, history, strict=False)]).sum(0)
        point = _mixed(row.advance, bank | {"m0": m0})
        if corrector is not None and corrector.m:
            assert following is not None
            calls += 1
            raw = denoiser(point, following.level)
            if not raw.requires_grad:
                raise DiffsampError("denoiser: gives no gradient; method adamw needs one, method search does not")
            fresh = converted(i + 1, raw, point)
            newer = {f"m{j}": m for j, m in enumerate([fresh, m0, *history[1:]])}
            base = bank["base"] if row.correct is not None else point
            point = _mixed(corrector, bank | newer | {"input": point, "base": base})
        return (point.double() - goal.double()).square().mean()

    ratio = torch.ones((), dtype=torch.float64, device=state.input.device, requires_grad=True)
    optimizer = torch.optim.AdamW([ratio], lr=LEARNING_RATE)
    first = last = float("nan")
    with torch.enable_grad():
        for step in range(iterations):
            value = loss(ratio)
            last = float(value.detach())
            first = last if step == 0 else first
            if not torch.isfinite(value):
                raise DiffsampError(f"denoiser: the prediction at step {i + 1} is not finite; check the model")
            (ratio.grad,) = torch.autograd.grad(value, [ratio])
            optimizer.step()
    return float(ratio.detach()), last, first, calls
