"""Every family of tiny pipelines: guidance is either exact in it or refused with a reason."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import FAMILIES, build

from diffsamp.adapters.cfg_form import cfg_form
from diffsamp.adapters.guidance_hook import attach, detach
from diffsamp.errors import DiffsampError

REFUSED_AT_ONCE = ("sd_pag", "sd_pix2pix", "svd", "ddpm", "ddim", "flux2", "z_image", "z_image_img2img")
ONE_CALL = ("flux_dev", "flux_schnell", "flux_img2img", "flux_inpaint", "hunyuan_video")
SCALE = 3.0
OURS = ("unipc", "heun", "sde-dpmpp-2m")


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED_AT_ONCE + ONE_CALL])
def test_cfg_by_the_hook_and_by_way_of_x0_equals_the_pipeline_and_detaching_is_bitwise(name):
    tiny = build(name)
    plain = tiny.run(2)
    try:
        attach(tiny.pipe, "cfg", SCALE)
        assert relative(tiny.run(2), plain) <= 1e-5
        if not cfg_form(type(tiny.pipe)).keeps_norm:
            attach(tiny.pipe, "apg", SCALE, eta=1.0, momentum=0.0)
            assert relative(tiny.run(2), plain) <= 1e-5
        attach(tiny.pipe, "apg", SCALE)
        assert not torch.equal(tiny.run(2), plain)
    finally:
        detach(tiny.pipe)
    assert torch.equal(tiny.run(2), plain)


@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_pipelines_whose_cfg_is_another_are_refused_when_attaching(name):
    with pytest.raises(DiffsampError, match="guidance: "):
        attach(build(name).pipe, "apg:3")


@pytest.mark.parametrize("name", ONE_CALL)
def test_a_run_without_an_unconditional_call_is_refused(name):
    tiny = build(name)
    attach(tiny.pipe, "apg:3")
    try:
        with pytest.raises(DiffsampError, match="no unconditional prediction"):
            tiny.run(4)  # a step that follows one without its second call
    finally:
        detach(tiny.pipe)


@pytest.mark.parametrize("solver", OURS)
@pytest.mark.parametrize("name", ["sd1", "sd_img2img", "sd3", "sd3_img2img", "flux_true_cfg", "wan"])
def test_our_schedulers_tell_the_level_too(name, solver):
    import diffsamp

    tiny = build(name)
    try:
        diffsamp.use(tiny.pipe, solver, seed=0)
        plain = tiny.run(4)
        diffsamp.use(tiny.pipe, guidance="apg", guidance_scale=SCALE)
        first = tiny.run(4)
        assert torch.equal(tiny.run(4), first)
        attach(tiny.pipe, "apg", SCALE, eta=1.0, momentum=0.0)
        assert relative(tiny.run(4), plain) <= 1e-5
    finally:
        diffsamp.restore(tiny.pipe)
    assert tiny.pipe.scheduler is tiny.stock
