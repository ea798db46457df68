"""The way from `sample_categorical` to the kernel of GPU tensors, run on a CPU: arguments, keys, mask, bad rows.

The dispatch is taken with the form that the kernel has in torch, and once with Triton in its interpreter.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffsamp_kernels.categorical import sample_categorical as kernel

from diffsamp import masked
from diffsamp.errors import DiffsampError
from diffsamp.masked import categorical, sample_categorical
from diffsamp.masked.randomness import hashed_uniforms

ROOT = Path(__file__).parents[2]


@pytest.fixture
def calls(monkeypatch):
    """Sends plain draws to the form that the kernel has in torch; returns the arguments of each use."""
    seen = []

    def spy(logits, **options):
        seen.append({"shape": tuple(logits.shape), "dtype": logits.dtype, **options})
        return kernel(logits, **options)

    monkeypatch.setattr(categorical, "kernel_backend", lambda rows: "torch")
    monkeypatch.setattr(categorical, "kernel_categorical", spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_is_given_the_keys_of_the_seeds_the_temperature_and_the_mask(calls, dtype):
    logits = (torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    logits[:, 11] = 60.0
    seeds = [5, 4, 3, 2, 1, 0]
    tokens = sample_categorical(logits, seeds=seeds, step=9, temperature=0.6, mask_id=11)
    (given,) = calls
    assert given["dtype"] == dtype and given["shape"] == (6, 50) and given["backend"] == "torch"
    assert given["temperature"] == 0.6 and given["mask_id"] == 11 and given["seed"] == 0
    u = hashed_uniforms(np.array(seeds), 9, 2)[:, 0]
    assert given["keys"].tolist() == [int(v * 2**53) for v in u] and len(set(given["keys"].tolist())) == 6
    want = kernel(logits, seed=0, keys=given["keys"], temperature=0.6, mask_id=11, backend="naive").tokens
    assert torch.equal(tokens, want) and not bool((tokens == 11).any())


def test_kernel_draws_are_those_of_the_row_alone_and_differ_by_step(calls):
    logits = torch.randn(9, 300, generator=torch.Generator().manual_seed(1))
    seeds = torch.arange(9) * 77
    together = sample_categorical(logits, seeds=seeds, step=1)
    alone = torch.cat([sample_categorical(logits[i : i + 1], seeds=seeds[i : i + 1], step=1) for i in range(9)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, sample_categorical(logits, seeds=seeds, step=2))
    assert len(calls) == 11


def test_kernel_draws_follow_the_law_of_the_logits(calls):
    # Chi-square with 7 degrees of freedom exceeds 37 once in 2e5.
    p = torch.tensor([0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.04, 0.01])
    rows = 40_000
    for options in ({"generator": torch.Generator().manual_seed(2)}, {"seeds": torch.arange(rows)}):
        tokens = sample_categorical(p.log().expand(rows, 8), **options)
        seen = torch.bincount(tokens, minlength=8)
        assert float(((seen - rows * p) ** 2 / (rows * p)).sum()) < 37.0
    assert len(calls) == 2


def test_whole_sampler_runs_on_kernel_draws(calls):
    def likes_the_mask(x, t):
        return torch.nn.functional.one_hot(torch.full_like(x, 12), 13).float() * 40

    x = torch.full((3, 6), 12)
    x[1, :2] = 4
    tokens, _ = masked.sample(likes_the_mask, x, mask_id=12, seeds=[1, 2, 3], record_entropy=False)
    assert int(tokens.max()) < 12 and tokens[1, :2].tolist() == [4, 4]
    assert len(calls) == 6 and {c["mask_id"] for c in calls} == {12}
    again, _ = masked.sample(likes_the_mask, x[1:2], mask_id=12, seeds=[2], record_entropy=False)
    assert torch.equal(again[0], tokens[1])


def test_rows_that_the_kernel_cannot_draw_are_named_or_take_their_limit(calls):
    with pytest.raises(DiffsampError, match="row 1 holds NaN"):
        sample_categorical(torch.tensor([[0.0, 1.0], [math.nan, 0.0]]))
    with pytest.raises(DiffsampError, match="row 0 has no class"):
        sample_categorical(torch.full((2, 4), -math.inf))
    tokens = sample_categorical(torch.tensor([[0.0, math.inf, 1.0]] * 50), torch.Generator().manual_seed(0))
    assert bool((tokens == 1).all())
    assert len(calls) == 3


@pytest.mark.parametrize(
    "options",
    [{"top_k": 2}, {"top_p": 0.9}, {"temperature": 0.0}, {"precision": "fp64"}, {"precision": "fp32"}],
    ids=str,
)
def test_draws_with_filters_races_and_greedy_choices_do_not_go_to_the_kernel(calls, options):
    sample_categorical(torch.zeros(2, 5), seeds=[0, 1], **options)
    assert calls == []


def test_kernel_is_chosen_for_the_dtypes_it_has_where_triton_would_run(monkeypatch):
    rows = torch.zeros(2, 5)
    assert categorical.kernel_backend(rows) is None  # a CPU tensor
    monkeypatch.setattr(categorical, "choose", lambda backend, tensor: "triton")
    assert categorical.kernel_backend(rows) == categorical.kernel_backend(rows.half()) == "triton"
    assert categorical.kernel_backend(rows.double()) is None


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_race_over_parts_of_the_vocabulary_has_the_winner_of_the_whole(parts, interleaved):
    # As on several devices that hold a part of the classes each: a winner of each part, then a race of the winners.
    rows, width = 300, 1000
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(3)) * 3
    owner = torch.arange(width) % parts if interleaved else torch.arange(width) * parts // width

    def in_parts(method):
        options = {"seed": 5, "keys": torch.arange(rows) * 7919 - 3, "step": 7, "method": method, "backend": "torch"}
        final, mass = torch.full_like(logits, -math.inf), []
        for part in range(parts):
            won = kernel(logits.masked_fill(owner != part, -math.inf), **options)
            assert bool((owner[won.tokens] == part).all())
            final.scatter_(1, won.tokens[:, None], logits.gather(1, won.tokens[:, None]))
            mass.append(won.lse)
        whole = kernel(logits, **options)
        assert torch.allclose(torch.stack(mass).logsumexp(0), whole.lse, atol=1e-5)
        return kernel(final, **options).tokens, whole.tokens

    assert torch.equal(*in_parts("race"))
    assert not torch.equal(*in_parts("tile"))  # an inverse CDF is not invariant, so equality above says something


def test_dispatch_reaches_triton_and_draws_what_its_definition_draws():
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DIFFSAMP_BACKEND")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext"), env.get("PYTHONPATH", "")])
    env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "DIFFSAMP_BACKEND": "triton"}
    script = str(Path(__file__).with_name("kernel_draw_case.py"))
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout + result.stderr
