"""Adaptive projected guidance as a function: its equalities, its geometry and its memory."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from diffsamp.guidance import APG, CFG, GuidanceState, apg, cfg
from diffsamp.process import Process

SHAPES = {"3-D": (3, 10, 6), "4-D": (3, 4, 8, 8), "5-D": (3, 4, 3, 6, 6)}
VP = Process.vp(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
FLOW = Process.flow()


def pair(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(shape, generator=generator, dtype=torch.float64)
    return c.to(dtype), (c + torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def inner(a, b):
    return (a.double() * b.double()).flatten(1).sum(1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    ("process", "t", "prediction"),
    [(VP, 400.0, "epsilon"), (VP, 400.0, "v_prediction"), (VP, 400.0, "sample"), (FLOW, 600.0, "flow_prediction")],
)
def test_full_eta_without_clamp_or_momentum_is_cfg_in_every_prediction_type(process, t, prediction, dtype, tolerance):
    level = process.level_at(t)
    x, _ = pair((2, 4, 8, 8), dtype, seed=9)
    f_cond, f_uncond = pair((2, 4, 8, 8), dtype)
    p, q = process.x0_coefficients(level, prediction)
    method = APG(7.5, eta=1.0, norm=0.0, momentum=0.0)
    x0, _ = method(method.init(2), p * x + q * f_cond, p * x + q * f_uncond, x, level)
    assert relative((x0 - p * x) / q, f_uncond + 7.5 * (f_cond - f_uncond)) <= tolerance


def test_scale_one_returns_the_conditional_prediction_itself():
    c, u = pair((2, 4, 8, 8), torch.float32)
    out, buffer = apg(c, u, 1.0, norm=2.0, momentum=-0.5)
    assert torch.equal(out, c)
    assert buffer is not None and torch.equal(buffer, c - u)


def test_continuous_at_scale_one_where_diffusers_default_rule_jumps():
    c, u = pair((2, 4, 8, 8))
    out, _ = apg(c, u, 1.0 + 1e-3, eta=0.0, momentum=0.0)
    step, _ = apg(c, u, 2.0, eta=0.0, momentum=0.0)
    bound = 1e-3 * (step - c).norm() * (1 + 1e-9)
    assert (out - c).norm() <= bound
    assert (normalized_guidance(c, u, 1.0 + 1e-3, eta=0.0) - c).norm() > 10 * bound


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_diffusers_original_formulation_over_four_momentum_steps(shape):
    reference, buffer = MomentumBuffer(-0.6), None
    for step in range(4):
        c, u = pair(shape, torch.float32, seed=step)
        ours, buffer = apg(c, u, 6.0, eta=0.3, norm=4.0, momentum=-0.6, buffer=buffer)
        theirs = normalized_guidance(c, u, 5.0, reference, 0.3, 4.0, use_original_formulation=True)
        assert relative(ours, theirs) <= 1e-6


@pytest.mark.parametrize("norm", [0.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_eta_zero_moves_at_right_angles_to_the_conditional_prediction(shape, norm):
    c, u = pair(shape)
    out, _ = apg(c, u, 7.5, eta=0.0, norm=norm)
    assert inner(out - c, c).abs().max() <= 1e-10


@pytest.mark.parametrize("size", [(4, 128, 128), (4, 64, 64), (3, 61, 67)])
def test_inner_products_of_float32_are_as_good_as_float64(size):
    """Beyond the rounding of the result: the parallel part left over is 1e-8 of the norms."""
    from diffsamp.guidance.apg import _inner_products

    c, u = pair((2, *size), torch.float32)
    c, m = c + 3.0, c - u  # a mean, so that the sum of products grows
    norms = (inner(m, m) * inner(c, c)).sqrt()
    for got, expected in zip(_inner_products(m, c), (inner(m, m), inner(m, c), inner(c, c)), strict=True):
        assert got.dtype == torch.float64
        assert ((got - expected).abs() / torch.maximum(expected.abs(), norms)).max() <= 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_nearly_orthogonal(dtype):
    c, u = pair((2, 4, 32, 32), dtype)
    c, u = c * 30, u * 30  # norms near 2000: squares overflow fp16
    out, buffer = apg(c, u, 3.0, eta=0.0, norm=500.0)
    moved = out.double() - c.double()
    assert out.dtype == dtype and buffer is not None and buffer.dtype == torch.float32
    assert torch.isfinite(out).all()
    cosine = inner(moved, c) / (inner(moved, moved) * inner(c, c)).sqrt()
    assert cosine.abs().max() <= 1e-2


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_step_is_never_longer_than_the_threshold_and_the_buffer_is_not_clamped(eta):
    limit, beta, buffer, differences = 2.5, -0.75, None, []
    for step in range(4):
        c, u = pair((3, 4, 8, 8), seed=step)
        differences.append(c - u)
        out, buffer = apg(c, u, 2.0, eta=eta, norm=limit, momentum=beta, buffer=buffer)
        assert (out - c).flatten(1).norm(dim=1).max() <= limit * (1 + 1e-12)
        expected = sum(beta**j * differences[step - j] for j in range(step + 1))
        assert buffer is not None and relative(buffer, expected) <= 1e-12
    assert buffer.flatten(1).norm(dim=1).min() > limit


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_batch_equals_its_samples_one_by_one(shape):
    method = APG(5.0, eta=0.2, norm=3.0, momentum=-0.5)
    whole, singles = method.init(3), [method.init(1) for _ in range(3)]
    for step in range(3):
        c, u = pair(shape, seed=step)
        out, whole = method(whole, c, u, c, VP.level_at(500.0))
        for i in range(3):
            alone, singles[i] = method(singles[i], c[i : i + 1], u[i : i + 1], c[i : i + 1], VP.level_at(500.0))
            assert relative(alone[0], out[i]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_equal_or_zero_predictions_give_finite_output(dtype, norm):
    c, u = pair((2, 4, 8, 8), dtype)
    assert torch.equal(apg(c, c.clone(), 7.5, norm=norm)[0], c)
    zero = torch.zeros_like(c)
    from_zero = apg(zero, u, 2.0, norm=norm)[0]
    assert torch.isfinite(from_zero).all() and from_zero.norm() > 0
    assert torch.isfinite(apg(c, zero, 7.5, norm=norm)[0]).all()


def test_rms_threshold_does_not_depend_on_the_size_of_the_latent_and_l2_does():
    c, u = pair((2, 4, 8, 8))
    tiles = (1, 1, 2, 2)
    for kind, norm, same in (("rms", 3.0 / math.sqrt(4 * 8 * 8), True), ("l2", 3.0, False)):
        options = dict(eta=0.0, norm=norm, norm_kind=kind, momentum=0.0)
        small, _ = apg(c, u, 7.5, **options)
        large, _ = apg(c.repeat(tiles), u.repeat(tiles), 7.5, **options)
        assert (relative(large, small.repeat(tiles)) <= 1e-12) is same


def test_inputs_and_the_given_buffer_are_left_as_they_were():
    c, u = pair((2, 4, 8, 8), torch.float32)
    b = torch.randn(c.shape, generator=torch.Generator().manual_seed(5))
    copies = [tensor.clone() for tensor in (c, u, b)]
    apg(c, u, 7.5, norm=2.0, buffer=b)
    for tensor, copy in zip((c, u, b), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_state_is_explicit_so_two_runs_can_be_interleaved():
    method = APG(5.0, momentum=-0.5)
    alone, first, second = method.init(), method.init(), method.init()
    level = VP.level_at(300.0)
    for step in range(3):
        c, u = pair((2, 3, 4, 4), seed=step)
        expected, alone = method(alone, c, u, c, level)
        got, first = method(first, c, u, c, level)
        _, second = method(second, u, c, c, level)
        assert torch.equal(got, expected)
    assert first.step == 3 and isinstance(first, GuidanceState)


def test_state_can_be_reindexed_by_a_resampler():
    method = APG(5.0, momentum=-0.5)
    c, u = pair((3, 3, 4, 4))
    _, state = method(method.init(), c, u, c, VP.level_at(300.0))
    index = torch.tensor([2, 0, 0])
    chosen = state.select(index)
    assert torch.equal(chosen.buffer, state.buffer[index]) and chosen.step == 1
    _, plain = CFG(2.0)(CFG(2.0).init(), c, u, c, VP.level_at(300.0))
    assert plain.select(index).buffer is None


def test_cfg_is_the_pipelines_formula_to_the_bit():
    c, u = pair((2, 4, 8, 8), torch.float32)
    assert torch.equal(cfg(c, u, 7.5), u + 7.5 * (c - u))
    assert cfg(c, u, 1.0) is c
