"""What guidance does to the size of samples, on digits with an exact denoiser."""

from __future__ import annotations

import functools

import pytest
from digits_toy import run

from diffsamp.guidance import APG, CFG


def rms(x):
    return x.square().mean().sqrt().item()


def saturated(x):
    return (x.abs() > 1.5).double().mean().item()


@functools.cache
def samples(name, scale, space="x0"):
    method = {
        "cfg": CFG(scale),
        "projection": APG(scale, eta=0.0, momentum=0.0),
        "half": APG(scale, eta=0.5, momentum=0.0),
        "full": APG(scale, eta=0.0, norm=2.5, momentum=-0.75),
    }[name]
    return run(method, space=space)


@pytest.mark.parametrize(("name", "bound"), [("projection", 0.75), ("full", 0.45)])
def test_strong_guidance_inflates_samples_less_than_cfg(name, bound):
    plain = rms(samples("cfg", 1.0))
    growth = rms(samples("cfg", 20.0)) - plain
    assert growth > 0.2
    assert rms(samples(name, 20.0)) - plain <= bound * growth


@pytest.mark.parametrize(("name", "bound"), [("projection", 0.80), ("full", 0.45)])
def test_strong_guidance_saturates_fewer_pixels_than_cfg(name, bound):
    assert saturated(samples(name, 20.0)) <= bound * saturated(samples("cfg", 20.0))


def test_more_of_the_parallel_part_makes_larger_samples():
    sizes = [rms(samples(name, 20.0)) for name in ("projection", "half", "cfg")]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]


def test_projection_acts_in_x0_space_where_it_damps_at_least_twice_as_much_as_in_epsilon_space():
    cfg = rms(samples("cfg", 5.0))
    in_x0 = cfg - rms(samples("projection", 5.0))
    in_epsilon = cfg - rms(samples("projection", 5.0, "epsilon"))
    assert in_x0 >= 2 * in_epsilon and in_x0 > 0
