"""The kernel behind `sample_categorical`, in Triton's interpreter: run with TRITON_INTERPRET=1 DIFFSAMP_BACKEND=triton.

Nothing is replaced here: with these two variables CPU tensors take the way that GPU tensors take.
"""

from __future__ import annotations

import torch
from diffsamp_kernels.categorical import sample_categorical as kernel

from diffsamp import masked
from diffsamp.masked import categorical
from diffsamp.masked.randomness import hashed_uniforms


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (torch.randn(5, 33, generator=generator) * 3).to(dtype)
        logits[:, 7] = 60.0  # the mask class, which the network likes
        assert categorical.kernel_backend(logits) == "triton"
        seeds = torch.arange(5) + 40
        got = masked.sample_categorical(logits, seeds=seeds, step=3, temperature=0.7, mask_id=7)
        keys = torch.from_numpy((hashed_uniforms(seeds.numpy(), 3, 2)[:, 0] * 2.0**53).astype("int64"))
        want = kernel(logits, seed=0, keys=keys, temperature=0.7, mask_id=7, backend="naive").tokens
        assert torch.equal(got, want), (dtype, got, want)
        assert not bool((got == 7).any())
        alone = masked.sample_categorical(logits[2:3], seeds=seeds[2:3], step=3, temperature=0.7, mask_id=7)
        assert torch.equal(alone, got[2:3])
    assert categorical.kernel_backend(logits.double()) is None
    logits = torch.randn(2, 301, generator=generator) * 2
    race = {"seed": 3, "keys": torch.tensor([8, 9]), "step": 1, "method": "race", "backend": "triton"}
    final, owner = torch.full_like(logits, -torch.inf), torch.arange(301) // 151
    for part in (0, 1):
        won = kernel(logits.masked_fill(owner != part, -torch.inf), **race).tokens[:, None]
        final.scatter_(1, won, logits.gather(1, won))
    assert torch.equal(kernel(final, **race).tokens, kernel(logits, **race).tokens)
    tokens, facts = masked.sample(
        lambda x, t: torch.zeros(*x.shape, 9), torch.full((2, 4), 8), mask_id=8, seeds=[0, 1], record_entropy=False
    )
    assert facts["calls"] == 4 and int(tokens.max()) < 8
    try:
        masked.sample_categorical(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), seeds=[0, 1])
    except masked.categorical.DiffsampError as error:
        assert "row 1 holds NaN" in str(error)
    else:
        raise AssertionError("a row with NaN was drawn")


if __name__ == "__main__":
    main()
    print("passed")
