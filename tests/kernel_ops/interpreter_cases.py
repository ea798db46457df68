"""Cases for Triton's interpreter, one function each; run as ``TRITON_INTERPRET=1 python interpreter_cases.py
<case>``."""

from __future__ import annotations

import math
import sys

import torch
from diffsamp_kernels import guided_coefficients, guided_step, linear_step, resample_gather, sample_categorical
from diffsamp_kernels.categorical import triton as cat
from hypothesis import given, seed, settings
from hypothesis import strategies as st

torch.set_num_threads(1)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
QUICK = settings(max_examples=12, deadline=None, database=None)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within two units of the dtype at the scale of the tensor."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.numel() == 0:
        return
    error = (got.double() - want.double()).abs().max()
    scale = want.double().abs().max()
    limit = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[want.dtype]
    assert error <= limit * scale + 1e-6, f"error {float(error):.3g} at scale {float(scale):.3g}, {want.dtype}"


def draw(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, strided: bool) -> torch.Tensor:
    """Normal numbers; ``strided`` gives every second element of a buffer whose other elements are NaN."""
    values = torch.randn(shape, generator=generator).to(dtype)
    if not strided:
        return values
    wide = torch.full((*shape, 2), math.nan, dtype=dtype)
    wide[..., 0] = values
    return wide[..., 0]


@seed(1)
@QUICK
@given(
    st.integers(1, 3),
    st.integers(0, 2500),
    st.integers(1, 6),
    st.integers(1, 3),
    DTYPES,
    st.booleans(),
    st.integers(0, 99),
)
def linear(batch, n, k, m, dtype, strided, key):
    g = torch.Generator().manual_seed(key)
    bank = [draw(g, (batch, n), dtype, strided) for _ in range(k)]
    table = torch.randn(3, m, k, generator=g, dtype=torch.float64)
    # The output lies in a larger buffer of NaN: nothing beyond its end may change, nothing of it may stay.
    buffers = [torch.full((batch * n + 64,), math.nan, dtype=dtype) for _ in range(m)]
    out = [b[: batch * n].view(batch, n) for b in buffers]
    got = linear_step(bank, table, torch.tensor([2]), out, backend="triton")
    for y, want, buffer in zip(got, linear_step(bank, table, 2, backend="naive"), buffers, strict=True):
        close(y, want)
        assert buffer[batch * n :].isnan().all()


@seed(2)
@QUICK
@given(st.integers(1, 3), st.integers(2, 9000), st.sampled_from(["cfg", "rescale", "apg"]), st.booleans(), st.integers(0, 3),  # noqa: E501
       DTYPES, st.booleans(), st.integers(0, 99))  # fmt: skip
def guided(batch, n, guidance, second, length, dtype, strided, key):
    g = torch.Generator().manual_seed(key)
    c, u, x, m, *history = (draw(g, (batch, n), dtype, strided) for _ in range(4 + length))
    coef = guided_coefficients(
        torch.randn(5, generator=g).tolist(), torch.randn(5, generator=g).tolist(), x0=(1.1, -0.7), scale=5.0, eta=0.3,
        norm_threshold=7.0, momentum=-0.5, rescale=0.7,
    )[None]  # fmt: skip
    kept = m if guidance == "apg" and key % 2 else None
    got, want = (
        guided_step(c, u, x, history, coef=coef, guidance=guidance, momentum=kept, second=second, backend=b)
        for b in ("triton", "naive")
    )
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            close(a, b)


@seed(3)
@QUICK
@given(st.integers(1, 5), st.integers(0, 2100), st.integers(1, 6), DTYPES, st.integers(0, 99))
def gather(particles, n, k, dtype, key):
    g = torch.Generator().manual_seed(key)
    bank = [draw(g, (particles, n), dtype, False) for _ in range(k)]
    ancestors = torch.randint(0, particles, (particles,), generator=g)
    for a, b in zip(resample_gather(bank, ancestors, backend="triton"), bank, strict=True):
        assert torch.equal(a, b[ancestors])


@seed(4)
@QUICK
@given(st.integers(1, 3), st.integers(1, 9500), st.sampled_from(["tile", "race"]), DTYPES, st.booleans(), st.booleans(),
       st.integers(0, 99))  # fmt: skip
def categorical(rows, width, method, dtype, cfg, some, key):
    g = torch.Generator().manual_seed(key)
    logits, uncond = (draw(g, (rows + 1, width), dtype, False) * 3 for _ in range(2))
    logits[:, 1:-1:3] = -math.inf
    options = {"uncond": uncond, "cfg_scale": 2.0} if cfg else {}
    if some:
        options["rows"] = torch.randperm(rows + 1, generator=g)[:rows]
    mask_id = width // 2 if width > 2 and width // 2 % 3 != 1 and width > 4 else None
    got, want = (
        sample_categorical(logits, seed=2**62 + key, step=5, temperature=0.8, mask_id=mask_id, method=method, backend=b,
                           **options)
        for b in ("triton", "naive")
    )  # fmt: skip
    assert torch.equal(got.tokens, want.tokens)
    assert (got.logprob - want.logprob).abs().max() < 1e-5 * (1 + want.logprob.abs().max())
    assert (got.lse - want.lse).abs().max() < 1e-5 * (1 + want.lse.abs().max())


def race_is_invariant_to_tiles():
    g = torch.Generator().manual_seed(5)
    logits, keys = torch.randn(4, 3000, generator=g), torch.tensor([7, -3, 2**61, 0])
    runs = [
        cat.sample_categorical(logits, 11, keys, 2, 1.0, None, None, None, None, "race", block=b)[0]
        for b in (256, 1024, 4096)
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def row_is_independent_of_batch():
    g = torch.Generator().manual_seed(6)
    logits, keys = torch.randn(5, 700, generator=g), torch.arange(5) * 1000
    for method in ("tile", "race"):
        whole = sample_categorical(logits, seed=3, keys=keys, method=method, backend="triton").tokens
        for i in (0, 4):
            one = sample_categorical(logits[i : i + 1], seed=3, keys=keys[i : i + 1], method=method, backend="triton")
            assert int(one.tokens) == int(whole[i])


def draws_follow_the_law():
    """Chi-square of 200 draws of 4 classes, 3 degrees of freedom: above 27 once in 1e5."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    for method, count in (("tile", 200), ("race", 200)):
        tokens = sample_categorical(p.log().expand(count, 4), seed=12, method=method, backend="triton").tokens
        seen = torch.bincount(tokens, minlength=4).double()
        chi2 = float(((seen - count * p) ** 2 / (count * p)).sum())
        assert chi2 < 27.0, f"{method}: chi-square {chi2:.1f}"


def empty_and_dead_rows():
    none = sample_categorical(torch.zeros(0, 5), seed=1, backend="triton")
    assert none.tokens.shape == (0,)
    logits = torch.zeros(2, 5)
    logits[1] = -math.inf
    for method in ("tile", "race"):
        tokens, logprob, lse = sample_categorical(logits, seed=1, method=method, backend="triton")
        assert tokens[1] == -1 and logprob[1] == -math.inf and lse[1] == -math.inf and tokens[0] >= 0


if __name__ == "__main__":
    name = sys.argv[1]
    globals()[name]()
    print(f"passed {name}")
