"""Cases for Triton's interpreter, one function each; run as ``TRITON_INTERPRET=1 python interpreter_cases.py
<case>``."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from buffers import poisoned, sparse, strided
from diffsamp_kernels import guided_coefficients, guided_step, linear_step, resample_gather, sample_categorical
from diffsamp_kernels.categorical import triton as cat
from diffsamp_kernels.categorical.naive import race_variates
from hypothesis import given, seed, settings
from hypothesis import strategies as st

torch.set_num_threads(1)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.integers(0, 3)
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


def draw(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, layout: int) -> torch.Tensor:
    """Normal numbers in one of the layouts of :func:`buffers.strided`."""
    return strided(torch.randn(shape, generator=generator).to(dtype), layout)


def dirty(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The call in Triton, with every tensor that it allocates full of NaN and guarded behind its end."""
    with poisoned():
        return call(*arguments, backend="triton", **options)


@seed(1)
@QUICK
@given(st.integers(1, 3), st.integers(0, 2500), st.integers(1, 6), st.integers(1, 3), DTYPES, LAYOUTS, st.booleans(),
       st.integers(0, 99))  # fmt: skip
def linear(batch, n, k, m, dtype, layout, given_out, key):
    g = torch.Generator().manual_seed(key)
    bank = [draw(g, (batch, n), dtype, layout) for _ in range(k)]
    table = torch.randn(3, m, k, generator=g, dtype=torch.float64)
    wanted = linear_step(bank, table, 2, backend="naive")
    if not given_out:
        for y, want in zip(dirty(linear_step, bank, table, 2), wanted, strict=True):
            close(y, want)
        return
    # The output lies in a larger buffer of NaN: nothing beyond its end may change, nothing of it may stay.
    buffers = [torch.full((batch * n + 64,), math.nan, dtype=dtype) for _ in range(m)]
    out = [b[: batch * n].view(batch, n) for b in buffers]
    got = linear_step(bank, table, torch.tensor([2]), out, backend="triton")
    for y, want, buffer in zip(got, wanted, buffers, strict=True):
        close(y, want)
        assert buffer[batch * n :].isnan().all()


@seed(2)
@QUICK
@given(st.integers(0, 3), st.integers(2, 9000), st.sampled_from(["cfg", "rescale", "apg"]), st.booleans(), st.integers(0, 3),  # noqa: E501
       DTYPES, LAYOUTS, st.integers(0, 99))  # fmt: skip
def guided(batch, n, guidance, second, length, dtype, layout, key):
    g = torch.Generator().manual_seed(key)
    c, u, x, m, *history = (draw(g, (batch, n), dtype, layout) for _ in range(4 + length))
    coef = guided_coefficients(
        torch.randn(5, generator=g).tolist(), torch.randn(5, generator=g).tolist(), x0=(1.1, -0.7), scale=5.0, eta=0.3,
        norm_threshold=7.0, momentum=-0.5, rescale=0.7,
    )[None]  # fmt: skip
    kept = m if guidance == "apg" and key % 2 else None
    options = {"coef": coef, "guidance": guidance, "momentum": kept, "second": second}
    got = dirty(guided_step, c, u, x, history, **options)
    want = guided_step(c, u, x, history, backend="naive", **options)
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            close(a, b)


@seed(3)
@QUICK
@given(st.integers(0, 5), st.integers(0, 2100), st.integers(1, 6), DTYPES, LAYOUTS, st.integers(0, 99))
def gather(particles, n, k, dtype, layout, key):
    g = torch.Generator().manual_seed(key)
    bank = [draw(g, (particles, n), dtype, layout) for _ in range(k)]
    ancestors = torch.randint(0, max(particles, 1), (particles,), generator=g)
    for a, b in zip(dirty(resample_gather, bank, ancestors), bank, strict=True):
        assert torch.equal(a, b[ancestors])


def compare_draws(logits: torch.Tensor, **options: Any) -> None:
    """Triton against the definition: tokens equal, the two logarithms within float32."""
    got = dirty(sample_categorical, logits, **options)
    want = sample_categorical(logits, backend="naive", **options)
    assert torch.equal(got.tokens, want.tokens), (got.tokens, want.tokens)
    assert (got.logprob - want.logprob).abs().max() < 1e-5 * (1 + want.logprob.abs().max())
    assert (got.lse - want.lse).abs().max() < 1e-5 * (1 + want.lse.abs().max())


@seed(4)
@QUICK
@given(st.integers(1, 3), st.integers(1, 9500), st.sampled_from(["tile", "race"]), DTYPES, LAYOUTS, st.booleans(),
       st.booleans(), st.integers(0, 99))  # fmt: skip
def categorical(rows, width, method, dtype, layout, cfg, some, key):
    g = torch.Generator().manual_seed(key)
    values = [(torch.randn(rows + 1, width, generator=g) * 3).to(dtype) for _ in range(2)]
    values[0][:, 1:-1:3] = -math.inf
    logits, uncond = (strided(v, layout) for v in values)
    options = {"uncond": uncond, "cfg_scale": 2.0} if cfg else {}
    if some:
        options["rows"] = torch.randperm(rows + 1, generator=g)[:rows]
    mask_id = width // 2 if width > 2 and width // 2 % 3 != 1 and width > 4 else None
    compare_draws(logits, seed=2**62 + key, step=5, temperature=0.8, mask_id=mask_id, method=method, **options)


@seed(5)
@QUICK
@given(st.integers(1, 3), st.integers(2, 3000), st.sampled_from(["tile", "race"]), DTYPES, LAYOUTS, st.booleans(),
       st.one_of(st.none(), st.integers(1, 400)), st.one_of(st.none(), st.floats(0.01, 0.99)), st.booleans(),
       st.integers(0, 99))  # fmt: skip
def cut(rows, width, method, dtype, layout, cfg, top_k, top_p, tied, key):
    """top-k and top-p; ``tied`` logits have few values, so that the threshold falls on many equal classes."""
    g = torch.Generator().manual_seed(key)
    values = [(torch.randn(rows, width, generator=g) * 3).to(dtype) for _ in range(2)]
    if tied:
        values = [v.float().round().to(dtype) for v in values]
    values[0][:, 1:-1:5] = -math.inf
    logits, uncond = (strided(v, layout) for v in values)
    options = {"uncond": uncond, "cfg_scale": 2.0} if cfg else {}
    compare_draws(logits, seed=key, step=1, temperature=0.9, method=method, top_k=top_k, top_p=top_p, **options)


def near_ties_of_a_race():
    """Logits equal to the logarithms of the variates make every class a winner but for rounding, which decides."""
    keys, width = torch.arange(12), 900
    e = torch.from_numpy(race_variates(9, keys.numpy(), 4, width)).log()
    for shift in (0.0, 40.0):
        logits = torch.full((12, width), -math.inf)
        for i in range(12):
            a, b = 17 + 31 * i, 800 - 43 * i
            logits[i, [a, b]] = (e[i, [a, b]] + shift).float()
        compare_draws(logits, seed=9, keys=keys, step=4, method="race")
        right = (e - logits.double()).argmin(1)
        rounded = (e.float() - logits).argmin(1)  # what a race with float32 keys sees
        assert bool((rounded != right).any()), "the case is too easy: float32 keys find the winner as well"


def wide_offsets():
    """A row whose first element is number 2^31 + 2 V: offsets of 32 bits would read another place."""
    with tempfile.TemporaryDirectory() as folder:
        width = 4096
        many = sparse(Path(folder), (2**31 // width + 3, width), torch.bfloat16)
        row = torch.tensor([many.shape[0] - 1])
        many[row] = torch.randn(1, width, generator=torch.Generator().manual_seed(8)).bfloat16()
        for options in ({}, {"method": "race"}, {"top_k": 40, "top_p": 0.8}):
            keys = torch.tensor([3])
            got = sample_categorical(many, seed=1, rows=row, keys=keys, backend="triton", **options)
            want = sample_categorical(many[row].clone(), seed=1, keys=keys, backend="naive", **options)
            assert torch.equal(got.tokens, want.tokens) and torch.allclose(got.lse, want.lse, atol=1e-5)
        assert torch.equal(resample_gather([many], row, backend="triton")[0], many[row])


def counter_on_the_device():
    """The same launch, again: only the counter in memory has moved, as when a captured graph is played."""
    g = torch.Generator().manual_seed(3)
    bank = [torch.randn(70, generator=g) for _ in range(3)]
    table = torch.randn(4, 1, 3, generator=g, dtype=torch.float64)
    step, out = torch.zeros(1, dtype=torch.int64), [torch.empty(70)]
    coef = torch.stack([guided_coefficients((0.1 * i, 1.0), scale=2.0 + i) for i in range(4)])
    logits = torch.randn(2, 50, generator=g)
    for i in range(4):
        linear_step(bank, table, step, out, backend="triton")
        close(out[0], linear_step(bank, table, i, backend="naive")[0])
        batch = [b.view(2, 35) for b in bank]
        got = guided_step(*batch, coef=coef, step=step, guidance="rescale", backend="triton")
        close(got.next_input, guided_step(*batch, coef=coef, step=i, guidance="rescale", backend="naive").next_input)
        drawn = sample_categorical(logits, seed=torch.tensor([5]), step=step, backend="triton").tokens
        assert torch.equal(drawn, sample_categorical(logits, seed=5, step=i, backend="naive").tokens)
        step.add_(1)


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
    for options in ({}, {"method": "race"}, {"top_k": 2}):
        none = sample_categorical(torch.zeros(0, 5), seed=1, backend="triton", **options)
        assert none.tokens.shape == (0,) and none.lse.shape == (0,)
    empty = torch.zeros(2, 0, 3)
    coef = guided_coefficients((1.0,), scale=2.0)[None]
    for guidance in ("cfg", "rescale", "apg"):
        got = guided_step(empty, empty, empty, coef=coef, guidance=guidance, second=True, backend="triton")
        assert got.x0.shape == (2, 0, 3) and got.second is not None and got.second.shape == (2, 0, 3)
    assert linear_step([empty], torch.ones(1, 1, 1), backend="triton")[0].shape == (2, 0, 3)
    none_left = torch.zeros(0, dtype=torch.int64)
    assert resample_gather([torch.ones(3, 2)], none_left, backend="triton")[0].shape == (0, 2)
    logits = torch.zeros(2, 5)
    logits[1] = -math.inf
    for options in ({}, {"method": "race"}, {"top_p": 0.5}, {"top_k": 3, "method": "race"}):
        tokens, logprob, lse = sample_categorical(logits, seed=1, backend="triton", **options)
        assert tokens[1] == -1 and logprob[1] == -math.inf and lse[1] == -math.inf and tokens[0] >= 0


if __name__ == "__main__":
    name = sys.argv[1]
    globals()[name]()
    print(f"passed {name}")
