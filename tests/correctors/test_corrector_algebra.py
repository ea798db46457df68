"""The one formula against each target's own, clocks of processes, and the equality of first-order kernels."""

import math

import numpy as np
import pytest
import torch
from analytic_targets import Mixture, denoiser, karras, process_of, start

import diffsamp
from diffsamp.correctors import Corrector, annealed, cfg, churned_heun, composed, product
from diffsamp.correctors.spans import spans


def scores(n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    level = diffsamp.Process.ve().level(1.7)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    x0 = tuple(torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(n))
    return level, x, x0, [(d - x) / level.sigma**2 for d in x0]


def dot(a, b):
    return (a * b).sum(1)


def test_general_rate_equals_each_targets_own_formula():
    level, x, x0, s = scores()
    s2, b, w = level.sigma**2, 1.7, 2.6
    cases = [
        (annealed(b), x0[:1], b * (b - 1) * dot(s[0], s[0])),
        (product(2), x0, 2 * dot(s[0], s[1])),
        (product(2, b), x0, b * (b - 1) * dot(s[0] + s[1], s[0] + s[1]) + 2 * b * dot(s[0], s[1])),
        (cfg(w), x0, w * (w - 1) * dot(s[0] - s[1], s[0] - s[1])),
    ]
    for target, predictions, expected in cases:
        assert torch.allclose(target.rate(predictions, x, level), s2 * expected, atol=1e-10, rtol=1e-10), target.name
    level, x, x0, s = scores(3)
    target = composed((2.0, 1.5), 1.2)
    mix = sum(p * si for p, si in zip(target.powers, s, strict=True))
    general = dot(mix, mix) - sum(p * dot(si, si) for p, si in zip(target.powers, s, strict=True))
    assert torch.allclose(target.rate(x0, x, level), level.sigma**2 * general, atol=1e-10)
    assert torch.allclose((target.mix(x0, x, level) - x) / level.sigma**2, mix, atol=1e-12)


@pytest.mark.parametrize("rule", ["left", "trapezoid"])
def test_weights_of_vp_and_flow_equal_those_of_ve_for_shared_noise(rule):
    experts = [Mixture([1.0], [1.9], [1.1]), Mixture([1.0], [0.0], [3.1])]
    found = []
    for kind in ("ve", "vp", "flow"):
        process = process_of(kind)
        plan = diffsamp.solver("sde-dpmpp-2m", lower_order_final=False)(process, karras(process, 12))
        x, generator = start(plan, 4 * 16, 0)
        result = Corrector(cfg(2.5), 16, 0.7, rule=rule).run(plan, denoiser(experts), x, generator=generator)
        found.append((result.log_weights, result.log_z, result.samples.numpy() / plan.last_level.alpha))
        assert result.resamplings.sum() > 0
    for other in found[1:]:
        for mine, ve in zip(other, found[0], strict=True):
            assert np.allclose(mine, ve, atol=1e-9, rtol=1e-9)


def test_ddpm_euler_ancestral_and_first_order_sde_are_one_map_in_the_variance_clock():
    process = process_of("vp")
    grid = karras(process, 9)
    ancestral = diffsamp.solver("euler-ancestral")(process, grid)
    sde = diffsamp.solver("sde-dpmpp-1")(process, grid)
    experts = [Mixture([0.4, 0.6], [-1.0, 1.0], [0.3, 0.2])]
    x, _ = start(sde, 32, 1)
    noise = torch.randn(9, 32, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = [diffsamp.sample(p, lambda v, at: denoiser(experts)(v, at)[0], x, noise=lambda i: noise[i])
            for p in (ancestral, sde)]  # fmt: skip
    xt = x / grid.levels[0].alpha
    for i, (a, b) in enumerate(zip(grid.levels, grid.levels[1:], strict=False)):
        s0, s1 = a.noise_to_signal, b.noise_to_signal
        h = s0**2 - s1**2
        xt = xt + h * (experts[0].x0(xt, s0) - xt) / s0**2 + math.sqrt(h) * s1 / s0 * noise[i]
    for got in ours:
        assert torch.allclose(got / grid.levels[-1].alpha, xt, atol=1e-12, rtol=1e-12)


def test_spans_of_a_churn_sampler_tile_the_grid_and_never_count_the_way_up():
    process = process_of("ve")
    grid = karras(process, 16, high=80.0, low=0.02)
    plan = churned_heun(process, grid, churn=6.0)
    moved = [(s.start, s.stop) for s in spans(plan) if s.stop < s.start]
    levels = [level.noise_to_signal for level in grid.levels]
    assert np.allclose(moved, list(zip(levels, levels[1:], strict=False)))
    assert any(row.level.noise_to_signal > s.start for row, s in zip(plan.rows, spans(plan), strict=True))
