"""The cached ancestral sampler in the form in which it was published: the peer of `benchmarks/masked.py`.

It makes the operations of MDLM (Sahoo et al. 2024, arXiv:2406.07524; `_ddpm_caching_update` and `_sample_categorical`
of its code) one by one, each with a result of its own: log-probabilities with the mask class at -1e6 and given tokens
one-hot, their exponential kept while x stands still, and in every step q = p (t - s), q[mask] = s, a race of q against
1e-10 - log(rand + 1e-10) at every position and class, and a mix with the tokens that are there. `dtype` is that of p
and q: float32 in MDLM, float64 in later codes (BD3-LM, ReMDM). The grid ends at 0, so the last step leaves no mask and
MDLM's closing argmax, one more call, is not needed; the loop, like its own, makes all its steps.

With `keep="logits"` the loop is the naive cached one: it skips the network while x stands still and forms the
probabilities again in every step, as samplers do that take logits and return a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

LOWEST = -1e6


def probabilities(logits: Tensor, x: Tensor, mask_id: int, dtype: torch.dtype) -> Tensor:
    """p(x0 | x), (B, L, V), from logits (B, L, V) that may be written to."""
    logits[:, :, mask_id] += LOWEST
    logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    given = x != mask_id
    logits[given] = LOWEST
    logits[given, x[given]] = 0.0
    return logits.to(dtype).exp()


def draw(p: Tensor, t: float, s: float, mask_id: int) -> Tensor:
    """A class or the mask at every position, int64 (B, L)."""
    q = p * (t - s)
    q[:, :, mask_id] = s
    noise = 1e-10 - (torch.rand_like(q) + 1e-10).log()
    return (q / noise).argmax(dim=-1)


def mix(x: Tensor, drawn: Tensor, mask_id: int) -> Tensor:
    """The draws where x is masked."""
    keep = (x != mask_id).to(x.dtype)
    return keep * x + (1 - keep) * drawn


@torch.no_grad()
def sample(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    mask_id: int,
    steps: int,
    dtype: torch.dtype,
    *,
    keep: str = "probabilities",
    stop: int | None = None,
    spent: dict[str, list[float]] | None = None,
) -> tuple[Tensor, int]:
    """Tokens (B, L) and network calls, on the linear schedule.

    `keep` is what is kept while x stands still, "probabilities" or "logits"; `stop` ends the loop after that many
    steps; `spent` receives the CPU seconds of each "probabilities" and "draw".
    """

    def timed(name: str, function: Callable[[], Tensor]) -> Tensor:
        start = time.thread_time()
        result = function()
        if spent is not None:
            spent.setdefault(name, []).append(time.thread_time() - start)
        return result

    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()
    logits, p, calls = None, None, 0
    for t, s in list(zip(times, times[1:], strict=False))[:stop]:
        if logits is None:
            logits, p, calls = network(x), None, calls + 1
        if p is None or keep == "logits":
            p = timed("probabilities", partial(probabilities, logits, x, mask_id, dtype))
        after = mix(x, timed("draw", partial(draw, p, t, s, mask_id)), mask_id)
        if not torch.equal(after, x):
            logits = None
        x = after
    return x, calls
