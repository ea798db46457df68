"""The operations on a CPU: torch forms against the definitions, laws of the draw, dispatch, and what must not be
loaded."""

from __future__ import annotations

import math

import pytest
import torch
from diffsamp_kernels import guided_coefficients, guided_step, linear_step, resample_gather, sample_categorical
from diffsamp_kernels.categorical.cpu import draw_rows
from kernel_runner import python

HALVES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def normal(key, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(key), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_linear_step_differs_from_definition(dtype):
    bank = [normal(k, 2, 3, 50, dtype=dtype) for k in range(6)]
    table = normal(9, 2, 3, 6, dtype=torch.float64)
    table[1, 0, 2:] = 0.0
    table[1, 1] = 0.0
    for got, want in zip(linear_step(bank, table, 1), linear_step(bank, table, 1, backend="naive"), strict=True):
        assert (got.double() - want.double()).abs().max() <= HALVES[dtype] * 10


def test_linear_step_reads_a_register_of_weight_zero_or_misses_out():
    bank = [normal(0, 40), torch.full((40,), math.nan), normal(2, 40)]
    out = [torch.full((40,), math.nan)]
    table = torch.tensor([[[2.0, 0.0, -1.0]]])
    assert linear_step(bank, table, 0, out)[0].data_ptr() == out[0].data_ptr()
    assert torch.allclose(out[0], 2 * bank[0] - bank[2])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("guidance", ["cfg", "rescale", "apg"])
def test_guided_step_differs_from_definition(guidance, dtype):
    c, u, x, h, m = (normal(k, 2, 4, 33, dtype=dtype) for k in range(5))
    coef = guided_coefficients((0.4, 0.5, 0.6), (0.1, -0.2, 0.3), x0=(1.1, -0.7), scale=6.0, eta=0.1,
                               norm_threshold=4.0, momentum=-0.5, rescale=0.7)[None]  # fmt: skip
    kept = m if guidance == "apg" else None
    got, want = (
        guided_step(c, u, x, (h,), coef=coef, guidance=guidance, momentum=kept, second=True, backend=b)
        for b in ("torch", "naive")
    )
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.double() - b.double()).abs().max() <= HALVES[dtype] * float(b.double().abs().max())


@pytest.mark.parametrize("guidance", ["cfg", "rescale", "apg"])
@pytest.mark.parametrize("shape", [(5, 40), (4, 2, 3, 900), (1, 300_000), (3, 2, 150_000), (2, 1)])
def test_guided_step_differs_in_another_shape(guidance, shape):
    """Many small samples, samples that share a group, samples larger than one: with and without a conversion."""
    c, u, x, h = (normal(k, *shape) for k in range(4))
    share = 0.0 if shape[-1] == 1 else 0.7  # one element has no deviation to rescale to
    for x0 in ((0.0, 1.0), (0.0, -0.5), (1.1, -0.7)):
        coef = guided_coefficients((0.4, 0.5, -0.6), x0=x0, scale=6.0, eta=0.1, norm_threshold=9.0, rescale=share)
        got, want = (
            guided_step(c, u, x, (h,), coef=coef[None], guidance=guidance, backend=b) for b in ("torch", "naive")
        )
        for a, b in zip(got[:2], want[:2], strict=True):
            assert (a - b).abs().max() <= 3e-6 * b.abs().max()


def test_bank_in_one_storage_differs_from_separate_registers():
    bank = normal(3, 6, 500)
    table = normal(4, 1, 2, 3, dtype=torch.float64)
    for rows in (slice(0, 3), slice(0, 6, 2), slice(3, 6)):
        registers = list(bank[rows])
        apart = [r.clone() for r in registers]
        out = [torch.full((500,), math.nan) for _ in range(2)]
        linear_step(registers, table, 0, out)
        for a, b in zip(out, linear_step(apart, table, 0, backend="naive"), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_guided_step_changes_its_inputs():
    tensors = [normal(k, 2, 64) for k in range(5)]
    kept = [t.clone() for t in tensors]
    coef = guided_coefficients((1.0, 1.0, 1.0), scale=3.0, eta=0.0, norm_threshold=1.0, momentum=0.5)[None]
    guided_step(*tensors[:3], tensors[3:4], coef=coef, guidance="apg", momentum=tensors[4])
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


def test_apg_is_not_that_of_diffusers():
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

    c, u, x = (normal(k, 2, 4, 8, 8) for k in range(3))
    coef = guided_coefficients((0.0, 1.0), scale=5.0, eta=0.2, norm_threshold=3.0)[None]
    want = normalized_guidance(c, u, 4.0, None, 0.2, 3.0, True)
    assert torch.allclose(guided_step(c, u, x, coef=coef, guidance="apg").x0, want, atol=2e-5)


@pytest.mark.parametrize("width", [1, 9, 4096, 5001, 8192])
@pytest.mark.parametrize("method", ["tile", "race"])
def test_draw_differs_from_definition(width, method):
    logits = normal(1, 20, width) * 3
    got, want = (sample_categorical(logits, seed=5, method=method, backend=b) for b in ("torch", "naive"))
    assert torch.equal(got.tokens, want.tokens)
    assert torch.allclose(got.logprob, want.logprob, atol=1e-5) and torch.allclose(got.lse, want.lse, atol=1e-5)


@pytest.mark.parametrize("method", ["tile", "race"])
def test_draw_misses_the_law(method):
    """Chi-square with 7 degrees of freedom exceeds 37 once in 2e5."""
    p = torch.tensor([0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.04, 0.01])
    tokens = sample_categorical(p.log().expand(40000, 8), seed=8, method=method).tokens
    seen = torch.bincount(tokens, minlength=8).double()
    assert float(((seen - 40000 * p) ** 2 / (40000 * p)).sum()) < 37.0


def test_rare_token_cannot_be_drawn():
    """A class of probability 1e-9 at the front is drawn by the uniform that points into it, and by no other."""
    logits = torch.zeros(2, 4097)
    logits[:, 0] = math.log(1e-9 * 4096)
    u = torch.tensor([[1e-12, 1e-10], [1e-12, 3e-9]], dtype=torch.float64)
    tokens, logprob, _ = draw_rows(logits, u)
    assert int(tokens[0]) == 0 and int(tokens[1]) == 1
    assert abs(float(logprob[0]) - math.log(1e-9)) < 1e-4


def test_cut_mask_and_rows_are_ignored():
    logits = normal(3, 500, 10)
    tokens = sample_categorical(logits, seed=1, top_k=3).tokens
    assert all(int(t) in row.topk(3).indices.tolist() for t, row in zip(tokens, logits, strict=True))
    logits[:, 4] = 50.0
    assert not bool((sample_categorical(logits, seed=1, mask_id=4).tokens == 4).any())
    rows, keys = torch.tensor([7, 3]), torch.tensor([70, 30])
    some = sample_categorical(logits[:, :4], seed=1, rows=rows, keys=keys)
    alone = sample_categorical(logits[3:4, :4], seed=1, keys=keys[1:])
    assert int(some.tokens[1]) == int(alone.tokens[0])
    assert bool((sample_categorical(logits, seed=1, top_p=0.5).tokens == 4).all())


@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (7, None), (900, None), (None, 0.3), (None, 0.999), (40, 0.7)])
@pytest.mark.parametrize("tied", [False, True])
def test_cut_differs_from_definition(top_k, top_p, tied):
    logits = normal(6, 40, 3000) * (0.3 if top_p == 0.999 else 3.0)
    if tied:
        logits = logits.round()
    logits[:, ::7] = -math.inf
    options = {"seed": 2, "temperature": 0.9, "mask_id": 5, "top_k": top_k, "top_p": top_p}
    got, want = (sample_categorical(logits, backend=b, **options) for b in ("torch", "naive"))
    assert torch.equal(got.tokens, want.tokens)
    assert torch.allclose(got.lse, want.lse, atol=1e-5)


def test_row_without_a_class_gets_one():
    logits = torch.full((2, 5), -math.inf)
    logits[1, 3] = 0.0
    got = sample_categorical(logits, seed=1)
    assert got.tokens.tolist() == [-1, 3] and got.lse[0] == -math.inf


def test_gather_and_empty_inputs_are_wrong():
    x = normal(0, 4, 3)
    index = torch.tensor([3, 3, 0, 1])
    assert torch.equal(resample_gather([x], index)[0], x[index])
    assert sample_categorical(torch.zeros(0, 5), seed=1).tokens.shape == (0,)
    empty = torch.zeros(2, 0)
    coef = guided_coefficients((1.0,), scale=2.0)[None]
    assert guided_step(empty, empty, empty, coef=coef, guidance="apg").x0.shape == (2, 0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: linear_step([x], torch.zeros(1, 1, 1), backend="cuda"), "backend='cuda'"),
        (lambda x: linear_step([x], torch.zeros(1, 1, 1), backend="triton"), "needs a GPU"),
        (lambda x: linear_step([x], torch.zeros(1, 1, 2)), "table"),
        (lambda x: resample_gather([x], torch.zeros(2, dtype=torch.int64), backend="compiled"), "no such form"),
        (lambda x: guided_step(x, x, x, coef=torch.zeros(1, 18, dtype=torch.float64), momentum=x), "momentum"),
        (lambda x: sample_categorical(x, seed=1, temperature=0.0), "temperature"),
        (lambda x: resample_gather([x], torch.zeros(2)), "ancestors"),
    ],
)
def test_bad_argument_is_not_named(call, text, monkeypatch):
    monkeypatch.delenv("DIFFSAMP_BACKEND", raising=False)
    with pytest.raises(ValueError, match=text):
        call(torch.zeros(2, 3))


def test_triton_is_needed_on_a_cpu():
    script = """
import sys
sys.modules["triton"] = None
import importlib.util, torch, diffsamp_kernels as k
assert k.linear_step([torch.ones(3)], torch.ones(1, 1, 1))[0].tolist() == [1, 1, 1]
assert k.sample_categorical(torch.zeros(2, 3), seed=1).tokens.shape == (2,)
k.dispatch.importlib.util.find_spec = lambda name: None
try:
    k.linear_step([torch.ones(3)], torch.ones(1, 1, 1), backend="triton")
except k.BackendError as error:
    assert "not installed" in str(error)
else:
    raise SystemExit("Triton was found")
"""
    result = python("-c", script)
    assert result.returncode == 0, result.stderr


def test_compiled_form_is_wrong_or_runs_without_a_compiler():
    script = """
import torch, diffsamp_kernels as k
x = torch.randn(6, 2, 3, 40, generator=torch.Generator().manual_seed(0))
coef = k.guided_coefficients((0.4, 0.5, 0.6), (0.1, -0.2, 0.3), x0=(1.1, -0.7), scale=6.0, eta=0.1,
                             norm_threshold=4.0, momentum=-0.5, rescale=0.7)[None]
got, want = (k.guided_step(*x[:3], (x[3],), coef=coef, guidance="apg", momentum=x[4], second=True, backend=b)
             for b in ("compiled", "naive"))
for a, b in zip(got, want):
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
table = torch.randn(2, 2, 4, dtype=torch.float64)
for a, b in zip(*(k.linear_step(list(x[:4]), table, 1, backend=b) for b in ("compiled", "naive"))):
    assert torch.allclose(a, b, atol=1e-5)
"""
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    script = """
import torch, diffsamp_kernels as k
try:
    k.linear_step([torch.ones(3)], torch.ones(1, 1, 1), backend="compiled")
except k.BackendError as error:
    assert "no C++ compiler" in str(error), error
else:
    raise SystemExit("it ran")
assert k.linear_step([torch.ones(3)], torch.ones(1, 1, 1))[0].tolist() == [1, 1, 1]
"""
    result = python("-c", script, PATH="/nowhere", CXX="")
    assert result.returncode == 0, result.stderr


def test_compiled_uniforms_are_no_longer_float32():
    """torch.compile draws float64 uniforms in float32, so none is drawn in a compiled region."""
    script = """
import torch
torch.manual_seed(0)
draw = torch.compile(lambda: torch.rand(4096, dtype=torch.float64))
print(*(float((u.float().double() == u).double().mean()) for u in (draw(), torch.rand(4096, dtype=torch.float64))))
"""
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    compiled, eager = map(float, result.stdout.split())
    assert compiled == 1.0 and eager < 0.01
