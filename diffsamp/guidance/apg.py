"""Adaptive projected guidance: CFG without its parallel part, with a clamp and reverse momentum.

    d = c − u
    m = d + beta·m                                  momentum; the buffer keeps the unclamped sum
    d = s·m,   s = min(1, r/‖m‖)                    clamp, where r > 0
    d∥ = <d, c>·c/‖c‖²,   d⊥ = d − d∥
    out = c + (w − 1)·(d⊥ + eta·d∥)                 per sample, over all but the batch axis, on x0

Written out, out is a combination of c and m with two numbers per sample,

    out = (1 − (w − 1)(1 − eta)·s·<m, c>/‖c‖²)·c + (w − 1)·s·m,

so a step is three inner products (accurate to float64, as the paper projects) and one pass over the tensors.

Source: Sadat, Hilliges, Weber 2025, arXiv:2410.02416, Algorithm 1. Twin: diffusers ``normalized_guidance`` with
``use_original_formulation=True`` and ``guidance_scale = w − 1``. Not linear in the predictions: another space gives
another method, and the parallel part is large in x0 and small in epsilon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import DiffsampError
from .base import GuidanceBase, GuidanceState, LevelLike, check_number, check_pair, check_scale, per_sample

NORM_KINDS = ("l2", "rms")


def apg(
    cond: torch.Tensor,
    uncond: torch.Tensor,
    guidance_scale: float,
    *,
    eta: float = 0.0,
    norm: float = 0.0,
    momentum: float = -0.5,
    norm_kind: str = "l2",
    buffer: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One evaluation of adaptive projected guidance.

    Args:
        cond, uncond: denoised predictions (x0), shape (batch, ...).
        guidance_scale: w; 1 returns ``cond`` itself.
        eta: share of the parallel part that is kept; 0 drops it, 1 is CFG.
        norm: threshold r on the norm of the direction, 0 for none.
        momentum: beta; 0 for none, negative in the paper.
        norm_kind: ``"l2"`` (the paper; grows with the latent's size) or ``"rms"`` (r = norm·sqrt(elements)).
        buffer: the sum returned by the last call of the run, None at its start.

    Returns:
        The guided x0 in the dtype of ``cond``, and the new buffer (float32 or wider; None without momentum).
    """
    if cond.dtype in (torch.float16, torch.bfloat16):
        c, m = cond.float(), cond.float() - uncond.float()
    else:
        c, m = cond, cond - uncond
    if momentum != 0.0 and buffer is not None:
        m = m.add_(buffer, alpha=momentum)
    kept = m if momentum != 0.0 else None
    strength = guidance_scale - 1.0
    if strength == 0.0:
        return cond, kept
    if eta == 1.0 and norm == 0.0:
        return torch.add(c, m, alpha=strength).to(cond.dtype), kept

    mm, mc, cc = _inner_products(m, c)
    scale = torch.full_like(mm, strength)
    if norm > 0.0:
        limit = norm * math.sqrt(m[0].numel()) if norm_kind == "rms" else norm
        scale = scale * (limit / mm.sqrt()).clamp(max=1.0)  # 0/0 cannot arise: limit > 0, and limit/0 = inf -> 1
    if eta == 1.0:
        return torch.addcmul(c, m, per_sample(scale, m).to(m.dtype)).to(cond.dtype), kept
    # c = 0 has no direction: everything is orthogonal to it.
    parallel = torch.where(cc > 0, mc / cc.clamp(min=torch.finfo(cc.dtype).tiny), 0.0)
    along = 1.0 - (1.0 - eta) * scale * parallel
    out = torch.mul(c, per_sample(along, c).to(c.dtype))
    return out.addcmul_(m, per_sample(scale, m).to(m.dtype)).to(cond.dtype), kept


def _inner_products(m: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """<m, m>, <m, c>, <c, c> per sample, in float64 (float32 on devices without it).

    On a CPU, float32 is summed in runs of at most 1024 products and the runs in float64: the error is below 1e-8 of
    the norms, far under the rounding of the float32 result, at a third of the cost of widening the tensors.
    """
    m, c = m.flatten(1), c.flatten(1)
    run = math.gcd(m.shape[1], 1024)
    if m.dtype == torch.float32 and m.device.type == "cpu" and run >= 256:
        rows_m, rows_c = (t.unflatten(1, (-1, run)) for t in (m, c))
        dot = torch.linalg.vecdot
        sums = dot(rows_m, rows_m), dot(rows_m, rows_c), dot(rows_c, rows_c)
        return tuple(part.sum(1, dtype=torch.float64) for part in sums)  # type: ignore[return-value]
    wide = torch.float32 if m.device.type == "mps" else torch.float64
    both = torch.stack((m.to(wide), c.to(wide)), 1)
    gram = both @ both.mT
    return gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]


@dataclass(frozen=True)
class APG(GuidanceBase):
    """Adaptive projected guidance; the arguments are those of :func:`apg`.

    ``norm`` has no default clamp because the paper's thresholds belong to a latent size: see
    :data:`diffsamp.guidance.presets.PRESETS`. Momentum depends on the number of steps and is best left out (0) with
    few steps of a multistep solver.
    """

    guidance_scale: float | None = None
    eta: float = 0.0
    norm: float = 0.0
    momentum: float = -0.5
    norm_kind: str = "l2"

    def __post_init__(self) -> None:
        check_scale(self.guidance_scale, optional=True)
        check_number(self.eta, "eta")
        check_number(self.norm, "norm", 0.0)
        check_number(self.momentum, "momentum", -1.0, 1.0)
        if self.norm_kind not in NORM_KINDS:
            raise DiffsampError(f"norm_kind: got {self.norm_kind!r}; accepted: {', '.join(NORM_KINDS)}")

    def __call__(
        self,
        state: GuidanceState,
        cond_x0: torch.Tensor,
        uncond_x0: torch.Tensor,
        x: torch.Tensor,
        level: LevelLike,
        *extra_x0: torch.Tensor,
    ) -> tuple[torch.Tensor, GuidanceState]:
        check_pair(cond_x0, uncond_x0)
        out, buffer = apg(
            cond_x0,
            uncond_x0,
            self.scale,
            eta=self.eta,
            norm=self.norm,
            momentum=self.momentum,
            norm_kind=self.norm_kind,
            buffer=state.buffer,
        )
        return out, state.advance(buffer)
