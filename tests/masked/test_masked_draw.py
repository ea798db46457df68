"""The categorical draw: tails, zero mass, infinities, batch invariance. Bounds are 4.5 sigma or more unless stated."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffsamp import masked
from diffsamp.errors import DiffsampError
from diffsamp.masked import filter_logits, sample_categorical
from diffsamp.masked.ancestral import mixed_race
from diffsamp.masked.categorical import draw
from diffsamp.masked.randomness import hashed_uniforms


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


def lattice(bits: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randint(0, 2**bits, shape, generator=generator).double() * 2.0**-bits


def head_and_tail(width: int, log2_weight: float) -> torch.Tensor:
    logits = torch.full((width,), log2_weight * math.log(2), dtype=torch.float32)
    logits[3] = 0.0
    return logits


@pytest.mark.parametrize("log2_weight", [-23, -25])
def test_tail_is_drawn_as_often_as_it_should_over_5e8_classes(log2_weight):
    width = 50_257
    rows = math.ceil(5e8 / width)
    tokens = sample_categorical(head_and_tail(width, log2_weight).expand(rows, width), torch.Generator().manual_seed(1))
    mass = (width - 1) * 2.0**log2_weight
    expected = rows * mass / (1 + mass)
    hits = int((tokens != 3).sum())
    assert abs(hits - expected) < 3 * math.sqrt(expected), (hits, expected)
    assert len(tokens[tokens != 3].unique()) >= 0.9 * hits  # spread over the tail, not one class


@pytest.mark.parametrize("x", [0.25, 1.0, 2.0])
def test_race_on_a_lattice_follows_its_law_and_the_production_source_does_not(x):
    bits, rows, width = 12, 400_000, 16
    weight = 2.0**-bits / x
    logits = torch.log(torch.tensor([1.0] + [weight] * (width - 1), dtype=torch.float64)).expand(rows, width)
    mass = (width - 1) * weight
    expected = rows * mass / (1 + mass)
    naive = draw(logits, lattice(bits, 2), precision="fp64")
    factor = float((naive != 0).sum()) / expected
    sigma = 1 / math.sqrt(expected)
    assert factor == pytest.approx(x / math.expm1(x), abs=max(0.05 * x / math.expm1(x), 4.5 * sigma))
    for precision in ("safe", "fp64"):
        real = sample_categorical(logits, torch.Generator().manual_seed(3), precision)
        assert float((real != 0).sum()) / expected == pytest.approx(1.0, abs=max(0.03, 4.5 * sigma))
    hashed = sample_categorical(logits, seeds=torch.arange(rows))
    assert float((hashed != 0).sum()) / expected == pytest.approx(1.0, abs=max(0.03, 4.5 * sigma))


@pytest.mark.parametrize("u", [0.0, 1.0, 1 - 2.0**-53])
@pytest.mark.parametrize("precision", ["safe", "fp64", "fp32"])
@pytest.mark.parametrize("width", [5, 1000])
def test_extreme_uniforms_give_a_class_of_positive_probability(u, precision, width):
    logits = torch.full((3, width), -math.inf)
    logits[:, width // 2] = 0.0
    logits[1:, 1] = 1.0
    tokens = sample_categorical(logits, precision=precision, uniform=lambda shape: torch.full(shape, u))
    assert bool((logits.gather(1, tokens[:, None]) > -math.inf).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["safe", "fp32"])
def test_one_hot_of_a_vocabulary_is_never_missed(dtype, precision):
    width, rows = 50_257, 20_000 if precision == "safe" else 300
    logits = torch.full((width,), -math.inf, dtype=dtype)
    logits[40_000] = 3.0
    tokens = sample_categorical(logits.expand(rows, width), torch.Generator().manual_seed(4), precision)
    assert bool((tokens == 40_000).all())


def test_law_matches_a_softmax_with_thousands_of_classes():
    width, rows = 5000, 60_000
    logits = torch.randn(width, generator=torch.Generator().manual_seed(5)) * 3
    p = logits.double().softmax(-1).numpy()
    tokens = sample_categorical(logits.expand(rows, width), torch.Generator().manual_seed(6)).numpy()
    ranked = np.argsort(p)
    groups = np.searchsorted(np.linspace(0, 1, 41)[1:-1], p[ranked].cumsum())
    group_of = np.empty(width, int)
    group_of[ranked] = groups
    expected = np.bincount(groups, weights=p[ranked]) * rows
    observed = np.bincount(group_of[tokens], minlength=len(expected))
    keep = expected > 5
    chi2 = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    from scipy.stats import chi2 as law

    assert 1e-5 < law.sf(chi2, keep.sum() - 1) < 1 - 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_and_the_mask_class_stay_out(dtype):
    big = 1e4 if dtype != torch.float16 else 6e4
    logits = torch.tensor(
        [[0.0, big, -big, 100.0], [-big, -big, -math.inf, -big], [0.0, math.inf, math.inf, big]], dtype=dtype
    ).repeat_interleave(500, 0)
    tokens = sample_categorical(logits, torch.Generator().manual_seed(7), mask_id=1).view(3, 500)
    assert bool((tokens[0] == 3).all())
    assert set(tokens[1].tolist()) == {0, 3}
    assert bool((tokens[2] == 2).all())
    both = sample_categorical(logits[1000:], torch.Generator().manual_seed(8))
    assert set(both.tolist()) == {1, 2} and 150 < int((both == 1).sum()) < 350


@pytest.mark.parametrize("precision", ["safe", "fp64", "fp32"])
@pytest.mark.parametrize("width", [7, 300, 5000])
def test_a_row_does_not_depend_on_its_batch(precision, width):
    logits = torch.randn(37, width, generator=torch.Generator().manual_seed(9)) * 4
    seeds = torch.arange(37) * 1_000_003 - 5
    together = sample_categorical(logits, precision=precision, seeds=seeds, step=2)
    alone = torch.cat(
        [sample_categorical(logits[i : i + 1], precision=precision, seeds=seeds[i : i + 1], step=2) for i in range(37)]
    )
    flipped = sample_categorical(logits.flip(0), precision=precision, seeds=seeds.flip(0), step=2).flip(0)
    assert torch.equal(together, alone) and torch.equal(together, flipped)
    assert not torch.equal(together, sample_categorical(logits, precision=precision, seeds=seeds, step=3))


def test_hashed_uniforms_are_uniform_and_uncorrelated():
    u = hashed_uniforms(np.arange(2000), 5, 500)
    from scipy.stats import kstest

    assert kstest(u.ravel()[:200_000], "uniform").pvalue > 1e-5
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 4.5e-3
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 4.5e-3
    assert len(np.unique(u)) == u.size


def test_race_against_the_mask_unmasks_too_rarely_and_the_shipped_samplers_do_not():
    # One ancestral step, d = 1/64, uniform classes, on a lattice of 2^-12 where float32 has 2^-24: x = 1 for each.
    width, rows, steps = 64, 60_000, 64
    flat = torch.zeros(1, width).expand(rows, width)
    expected = rows / steps
    naive = int((mixed_race(flat, 1 / steps, "fp64", uniform=lattice(12, 10)) < width).sum())
    law = expected / math.expm1(1.0)
    assert abs(naive - law) < 4.5 * math.sqrt(law) + 0.05 * law and naive < 0.75 * expected
    # 64 masks a row: the revelations of the first step, for the samplers that draw counts instead.
    planned = masked.CountFirst(steps).events(np.full(rows, 64), np.arange(rows))
    revealed = ((planned.times == 1.0) * planned.sizes).sum()
    assert abs(revealed - rows) < 4.5 * math.sqrt(rows)


def test_filters_keep_what_they_say():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.2, 0.1]]))
    assert filter_logits(logits, top_p=0.6).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, top_p=0.5).isfinite().sum() == 1
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, True, False]]  # ties stay
    assert sample_categorical(logits, temperature=0.0).item() == 0
    cold = filter_logits(logits, temperature=0.5).softmax(-1)
    assert torch.allclose(cold, torch.tensor([[0.25, 0.04, 0.04, 0.01]]) / 0.34)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"logits": torch.tensor([[0.0, 1.0], [math.nan, 0.0]])}, "row 1 holds NaN"),
        ({"logits": torch.full((2, 4), -math.inf)}, "row 0 has no class"),
        ({"logits": torch.zeros(2, 3), "mask_id": 1, "uniform": None, "temperature": -1.0}, "temperature=-1.0"),
        ({"logits": torch.zeros(2, 3), "top_p": 0.0}, "top_p=0.0"),
        ({"logits": torch.zeros(2, 3), "top_k": 0}, "top_k=0"),
        ({"logits": torch.zeros(2, 3), "precision": "fp16"}, "precision='fp16'"),
        ({"logits": torch.zeros(2, 3), "seeds": [1]}, "seeds must be 2 integers"),
        ({"logits": torch.zeros(2, 0)}, "shape"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "int64"),
    ],
)
def test_bad_input_is_named_in_one_line(change, text):
    with pytest.raises(DiffsampError, match=text) as caught:
        sample_categorical(**change)
    assert "\n" not in str(caught.value)
