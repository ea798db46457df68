"""Closed-form maps of Gaussian data. Exact but for rounding: no sampling error enters a bound here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffsamp.errors import DiffsampError
from diffsamp.grids import Grid, grid
from diffsamp.process import Process
from diffsamp.registry import solver
from diffsamp.teleport import Statistics, gather, gaussian_denoiser, gaussian_map, load, start_grid, teleport

VE = Process.ve()
VP = Process.vp("scaled_linear", 0.00085, 0.012)
FLOW = Process.flow()


def statistics(d: int = 12, k: int | None = None, floor: float = 0.0, seed: int = 0) -> Statistics:
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.normal(size=(d, d)))[0][:, : k or d]
    values = 3.0 / np.arange(1, d + 1)[: k or d] ** 2 + floor
    return Statistics(
        torch.tensor(generator.normal(size=d)), torch.tensor(basis), torch.tensor(values), floor, (d,), 1000
    )


def start(process: Process, ratio: float, n: int = 5, d: int = 12) -> tuple:
    level = process.level(ratio)
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return level, level.sigma * noise


def test_heun_converges_to_the_closed_form_at_second_order():
    stats, (s, x) = statistics(), start(VE, 20.0)
    t = VE.level(0.5)
    exact = gaussian_map(stats, x, s, t)
    errors = []
    for n in (40, 80, 160):
        sigmas = np.geomspace(20.0, 0.5, n + 1)
        y = x
        for a, b in zip(sigmas, sigmas[1:], strict=False):
            slope = (y - gaussian_denoiser(stats, y, VE.level(a))) / a
            guess = y + (b - a) * slope
            y = y + (b - a) / 2 * (slope + (guess - gaussian_denoiser(stats, guess, VE.level(b))) / b)
        errors.append(float((y - exact).norm()))
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert 3.5 < errors[1] / errors[2] < 4.5


@pytest.mark.parametrize("process", [VE, VP, FLOW], ids=["ve", "vp", "flow"])
def test_map_composes_inverts_and_is_the_identity_on_one_level(process):
    stats, (s, x) = statistics(), start(process, 10.0)
    m, t = process.level(3.0), process.level(0.7)
    direct = gaussian_map(stats, x, s, t)
    assert (gaussian_map(stats, gaussian_map(stats, x, s, m), m, t) - direct).abs().max() < 1e-12
    assert (gaussian_map(stats, direct, t, s) - x).abs().max() < 1e-11
    assert (gaussian_map(stats, x, s, s) - x).abs().max() < 1e-13


@pytest.mark.parametrize("process", [VP, FLOW], ids=["vp", "flow"])
def test_other_processes_equal_ve_after_dividing_by_alpha(process):
    stats, (s, x) = statistics(), start(process, 10.0)
    t = process.level(0.7)
    ve = gaussian_map(stats, x / s.alpha, VE.level(10.0), VE.level(0.7))
    assert (gaussian_map(stats, x, s, t) / t.alpha - ve).abs().max() < 1e-10


def test_flow_map_is_regular_at_pure_noise():
    stats = statistics()
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = gaussian_map(stats, x, FLOW.level(1e9), FLOW.level(2.0))
    at = gaussian_map(stats, x, FLOW.level(float("inf")), FLOW.level(2.0))
    assert torch.isfinite(at).all()
    assert (at - near).abs().max() < 1e-8


def test_low_rank_with_residual_equals_the_full_covariance_with_that_floor():
    low = statistics(k=4, floor=0.3)
    full_basis = torch.linalg.qr(torch.cat([low.basis, torch.eye(12, dtype=torch.float64)[:, :8]], 1))[0]
    # QR may flip signs of columns; a projector does not notice.
    full = Statistics(
        low.mean, full_basis, torch.cat([low.eigenvalues, torch.full((8,), 0.3, dtype=torch.float64)]), 0.0, (12,), 9
    )
    (s, x), t = start(VE, 10.0), VE.level(0.5)
    assert (gaussian_map(low, x, s, t) - gaussian_map(full, x, s, t)).abs().max() < 1e-12


def test_float32_is_close_and_half_precision_is_computed_in_float32():
    stats, (s, x) = statistics(), start(VE, 20.0)
    t = VE.level(1.0)
    exact = gaussian_map(stats, x, s, t)
    single = gaussian_map(stats, x.float(), s, t)
    assert single.dtype == torch.float32
    assert (single - exact).norm() / exact.norm() < 1e-6
    half = x.bfloat16()
    assert torch.equal(gaussian_map(stats, half, s, t), gaussian_map(stats, half.float(), s, t).bfloat16())


def test_streamed_covariance_equals_the_one_of_the_whole():
    data = torch.randn(500, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 + 1
    stats = gather(data.split(70))
    covariance = stats.basis @ torch.diag(stats.eigenvalues) @ stats.basis.T
    assert (covariance - torch.cov(data.reshape(500, -1).T)).abs().max() < 1e-10
    assert (stats.mean - data.reshape(500, -1).mean(0)).abs().max() < 1e-12


def test_randomised_eigenvalues_are_within_a_percent(monkeypatch):
    monkeypatch.setattr("diffsamp.teleport.statistics.EXACT_LIMIT", 64)
    scale = 1.0 / torch.arange(1, 201, dtype=torch.float64)
    data = torch.randn(600, 200, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * scale
    exact = torch.linalg.eigvalsh(torch.cov(data.T)).flip(0)
    stats = gather(data.split(100), rank=16)
    assert ((stats.eigenvalues - exact[:16]).abs() / exact[:16]).max() < 0.01
    assert stats.residual == pytest.approx(float(exact[16:].sum()) / 184, rel=0.05)


def test_class_statistics_hold_each_mean_and_the_pooled_covariance():
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(300) % 3
    data = torch.randn(300, 5, generator=generator, dtype=torch.float64) + 4.0 * labels[:, None]
    stats = gather([(data, labels)])
    for c in range(3):
        assert (stats.class_means[c] - data[labels == c].mean(0)).abs().max() < 1e-12
    centred = torch.cat([data[labels == c] - data[labels == c].mean(0) for c in range(3)])
    basis, values, _ = stats.within
    assert (basis @ torch.diag(values) @ basis.T - centred.T @ centred / 297).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("batches", "rank", "words"),
    [
        ([torch.randn(10, 8)], 6, "at least 12"),
        ([torch.full((10, 2), float("nan"))], None, "not finite"),
        ([torch.randn(1, 2)], None, "at least 2"),
        ([torch.randn(10, 2)], 3, "accepted: 1 to 2"),
    ],
)
def test_bad_samples_are_refused(batches, rank, words):
    with pytest.raises(DiffsampError, match=words):
        gather(batches, rank=rank)


def test_statistics_survive_the_file_and_their_key_is_checked(tmp_path):
    data = torch.randn(200, 6, generator=torch.Generator().manual_seed(5))
    stats = gather([(data, torch.arange(200) % 2)], key={"vae": "a", "scaling_factor": 0.18, "resolution": 64})
    again = load(stats.save(tmp_path / "s.safetensors"))
    (s, x), t = start(VE, 10.0, d=6), VE.level(0.5)
    assert (gaussian_map(again, x, s, t) - gaussian_map(stats, x, s, t)).abs().max() < 1e-6
    assert again.count == 200 and again.class_means.shape == (2, 6)
    again.check_key(vae="a", scaling_factor=0.18, resolution=64)
    with pytest.raises(DiffsampError, match="scaling_factor=0.18"):
        again.check_key(scaling_factor=0.13)


def test_start_grid_is_the_tail_of_the_grid_and_multistep_history_is_empty_there():
    whole = grid("karras", VE, 18)
    tail = start_grid(whole, whole.levels[6].noise_to_signal)
    assert np.abs(tail.sigmas - whole.sigmas[6:]).max() < 1e-12
    plan = solver("unipc", order=3)(VE, tail)
    assert [row.depth for row in plan.rows[:2]] == [1, 2]
    assert isinstance(tail, Grid) and len(tail) == 12


def test_unconditional_gaussian_under_guidance_is_refused_unless_forced():
    stats, (s, x) = statistics(), start(VE, 20.0)
    with pytest.raises(DiffsampError, match="white noise"):
        teleport(stats, x, s, VE.level(5.0), guidance_scale=3.0)
    with pytest.warns(UserWarning, match="white noise"):
        forced = teleport(stats, x, s, VE.level(5.0), guidance_scale=3.0, force=True)
    assert torch.equal(forced, gaussian_map(stats, x, s, VE.level(5.0)))


def test_wrong_shape_and_wrong_direction_are_refused():
    stats, (s, x) = statistics(), start(VE, 20.0)
    with pytest.raises(DiffsampError, match="shape"):
        gaussian_map(stats, x[:, :5], s, VE.level(5.0))
    with pytest.raises(DiffsampError, match="not below"):
        teleport(stats, x, s, VE.level(30.0))
