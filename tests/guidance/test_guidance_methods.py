"""The other methods: interval, frequencies, perpendicular negative, autoguidance."""

from __future__ import annotations

import math

import pytest
import torch

from diffsamp.errors import DiffsampError
from diffsamp.guidance import (
    APG,
    CFG,
    METHODS,
    AutoGuidance,
    CFGZeroStar,
    FrequencyDecoupled,
    Guidance,
    Interval,
    PerpNeg,
    RescaledCFG,
    pair,
    parse,
    perp_neg,
    written,
)
from diffsamp.guidance.fdg import fdg, low_frequencies
from diffsamp.process import Level

VP = Level(0, 0.6, 0.8)


def tensors(n, *shape, dtype=torch.float64):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(4), dtype=dtype)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_keeps_the_protocol_and_is_the_condition_alone_at_scale_one(name):
    method = parse(f"{name}:1")
    assert isinstance(method, Guidance)
    c, u, x, n = tensors(4, 2, 4, 8, 8, dtype=torch.float32)
    extra = (n,) if method.conditions == 3 else ()
    copies = [tensor.clone() for tensor in (c, u, x)]
    out, state = method(method.init(2, 10), c, u, x, VP, *extra)
    if name != "perp-neg":
        assert torch.equal(out, c)
    assert out.shape == c.shape and out.dtype == c.dtype and state.step == 1
    assert method.with_scale(3.0).guidance_scale == 3.0
    for tensor, copy in zip((c, u, x), copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_treats_samples_separately(name):
    method = parse(f"{name}:4")
    c, u, x, n = tensors(4, 3, 4, 8, 8)
    extra = (n,) if method.conditions == 3 else ()
    whole, _ = method(method.init(3, 10), c, u, x, VP, *extra)
    for i in range(3):
        alone, _ = method(method.init(1, 10), *(t[i : i + 1] for t in (c, u, x)), VP, *(t[i : i + 1] for t in extra))
        assert torch.allclose(alone[0], whole[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [CFG, APG, RescaledCFG, CFGZeroStar, AutoGuidance, FrequencyDecoupled])
def test_predictions_of_different_shapes_are_refused(kind):
    with pytest.raises(DiffsampError, match="shape"):
        kind(2.0)(kind(2.0).init(), torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 8, 8), VP)


def test_a_scale_left_to_a_pipeline_is_missed_where_there_is_none():
    c, u = tensors(2, 1, 4, 8, 8)
    with pytest.raises(DiffsampError, match="guidance_scale: is not set"):
        CFG()(CFG().init(), c, u, c, VP)


def test_interval_guides_inside_only_and_its_memory_waits():
    method = Interval(APG(5.0, momentum=-0.5), sigma_min=0.5, sigma_max=2.0)
    c, u = tensors(2, 2, 4, 8, 8)
    state = method.init(2)
    for ratio, active in ((5.0, False), (2.0, True), (1.0, True), (0.5, False)):
        level = Level(0, 1.0, ratio)
        before = state
        out, state = method(state, c, u, c, level)
        assert torch.equal(out, c) is not active
        assert (state.buffer is before.buffer) is not active
    assert state.step == 4
    out, _ = method(method.init(), c, u, c, Level(0, 0.0, 1.0))
    assert torch.equal(out, c)


def test_interval_in_fractions_of_the_run():
    method = Interval(CFG(3.0), start=0.2, stop=0.6)
    c, u = tensors(2, 2, 4, 8, 8)
    state, active = method.init(2, 10), []
    for _ in range(10):
        out, state = method(state, c, u, c, VP)
        active.append(not torch.equal(out, c))
    assert active == [False] * 2 + [True] * 4 + [False] * 4
    with pytest.raises(DiffsampError, match="number of steps is not known"):
        method(method.init(2), c, u, c, VP)


def test_equal_frequency_scales_are_cfg():
    c, u = tensors(2, 2, 4, 16, 16)
    assert torch.allclose(fdg(c, u, 6.0, 6.0), u + 6.0 * (c - u), rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (1, 4, 3, 12, 10), (1, 1, 7, 9), (1, 1, 2, 2)])
def test_a_constant_direction_is_low_frequency_and_a_checkerboard_is_high(shape):
    u = torch.zeros(shape, dtype=torch.float64)
    assert torch.allclose(fdg(u + 1.0, u, 3.0, 9.0), torch.full_like(u, 3.0), rtol=1e-9)
    if min(shape[-2:]) >= 12:
        board = (torch.arange(shape[-2])[:, None] + torch.arange(shape[-1])).remainder(2) * 2.0 - 1.0
        board = board.double().expand(shape)
        assert low_frequencies(board).abs().max() < 0.35
        inside = fdg(board, u, 3.0, 9.0)[..., 4:-4, 4:-4] / board[..., 4:-4, 4:-4]
        assert (inside - 9.0).abs().max() < 0.1


def test_frequencies_need_height_and_width():
    c, u = tensors(2, 2, 20, 8)
    with pytest.raises(DiffsampError, match="packed tokens"):
        FrequencyDecoupled(3.0)(FrequencyDecoupled(3.0).init(), c, u, c, VP)


def test_perpendicular_negative_removes_nothing_along_the_prompt():
    c, u, n = tensors(3, 2, 4, 8, 8)
    direction = c - u
    out = perp_neg(c, u, n, 5.0, 0.8)
    along = ((out - u) * direction).flatten(1).sum(1) / direction.flatten(1).square().sum(1)
    assert torch.allclose(along, torch.full_like(along, 5.0), rtol=1e-10)
    assert torch.allclose(perp_neg(c, u, c, 5.0, 1.0), u + 5.0 * direction)  # a negative that is the prompt
    assert torch.allclose(perp_neg(c, u, u, 5.0, 1.0), u + 5.0 * direction)  # an empty negative
    assert torch.isfinite(perp_neg(c, c, n, 5.0, 1.0)).all()
    with pytest.raises(DiffsampError, match="takes 3 predictions"):
        PerpNeg(5.0)(PerpNeg(5.0).init(), c, u, c, VP)


def test_autoguidance_pairs_a_strong_and_a_weak_denoiser():
    strong, weak = (lambda x, level: 2 * x), (lambda x, level: x)
    x = tensors(1, 2, 4, 8, 8)[0]
    predictions = pair(strong, weak)(x, VP)
    method = AutoGuidance(3.0)
    out, _ = method(method.init(), *predictions, x, VP)
    assert torch.allclose(out, x + 3.0 * x)


def test_zero_star_on_a_variance_preserving_level_skips_the_zero_start():
    c, u, x = tensors(3, 2, 4, 8, 8)
    out, _ = CFGZeroStar(3.0, zero_steps=5)(CFGZeroStar(3.0).init(), c, u, x, VP)
    assert torch.isfinite(out).all() and not torch.allclose(out, x)
    at_start, _ = CFGZeroStar(3.0)(CFGZeroStar(3.0).init(), c, u, x, Level(0, 0.0, 1.0))
    assert torch.equal(at_start, x)


BAD = [
    ("apg:0.5", "guidance_scale"), ("apg:nan", "guidance_scale"), ("cfg:inf", "guidance_scale"),
    ("apg:-2", "guidance_scale"), ("apg:x", "guidance_scale"), ("apg:5,norm=-1", "norm"), ("apg:5,norm=nan", "norm"),
    ("apg:5,momentum=2", "momentum"), ("apg:5,norm_kind=l1", "norm_kind"), ("apg:5,preset=dit", "preset"),
    ("apg:5,colour=1", "colour"), ("apg:5,eta", "not key=value"), ("apg:5,eta=0,eta=1", "eta: given twice"),
    ("agp:5", "did you mean 'apg'"), ("what", "is not known"), ("interval:5", "no interval"),
    ("cfg:5,start=0.8,stop=0.2", "start, stop"), ("cfg:5,sigma_min=3,sigma_max=1", "sigma_min, sigma_max"),
    ("cfg-rescale:5,rescale=2", "rescale"), ("cfg-rescale:5,space=rgb", "space"),
    ("cfg-zero:5,zero_steps=-1", "zero_steps"), ("fdg:5,levels=1", "levels"), ("fdg:5,low_scale=0", "low_scale"),
    ("perp-neg:5,negative_scale=-1", "negative_scale"),
    ("autoguidance:2,skip_layers=a", "skip_layers"), ("autoguidance:2,weak=net", "weak"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_text_gets_one_clear_line(text, message):
    with pytest.raises(DiffsampError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_bad_objects_get_one_clear_line():
    for call in (lambda: parse(5), lambda: parse(CFG(2.0), eta=1), lambda: AutoGuidance(2.0, weak=1, skip_layers=(1,))):
        with pytest.raises(DiffsampError):
            call()


def test_the_written_form_is_what_the_page_says():
    assert parse("apg:7.5,eta=0,norm=15,momentum=-0.5") == APG(7.5, eta=0.0, norm=15.0, momentum=-0.5)
    assert parse("apg", 4.0, norm=2.0) == APG(4.0, norm=2.0)
    assert parse("apg:7.5,preset=sdxl,momentum=0") == APG(7.5, norm=15.0, momentum=0.0)
    assert parse("interval:4,sigma_min=0.3,sigma_max=5") == Interval(CFG(4.0), 0.3, 5.0)
    assert parse("apg:4,stop=0.8") == Interval(APG(4.0), stop=0.8)
    assert parse("autoguidance:2,skip_layers=7+8").skip_layers == (7, 8)
    assert parse(CFG(2.0), 3.0) == CFG(3.0)
    assert parse("apg").guidance_scale is None
    assert parse("interval:4,sigma_min=0.3").with_scale(2.0) == Interval(CFG(2.0), 0.3, math.inf)


@pytest.mark.parametrize(
    "text", ["cfg", "cfg:2.5", "apg:7.5,norm=15.0,norm_kind=rms", "autoguidance:2.0,skip_layers=7+8",
             "cfg-rescale:3.0,space=x0,sigma_min=0.5", "apg:2.0,momentum=0.0,start=0.1,stop=0.9"]
)  # fmt: skip
def test_written_form_is_read_back_as_the_same_guidance(text):
    method = parse(text)
    assert parse(written(method)) == method
    with pytest.raises(DiffsampError, match="weak: cannot be written"):
        written(AutoGuidance(2.0, weak=object()))


def test_rms_preset_is_the_sdxl_one_at_its_own_size():
    c, u, x = tensors(3, 1, 4, 128, 128)
    outs = [parse(f"apg:7.5,preset={name}")(parse("apg").init(), c, u, x, VP)[0] for name in ("sdxl", "sdxl-rms")]
    assert torch.allclose(*outs, rtol=1e-12)
