"""Fréchet distance and its moments against closed forms, torchmetrics and torch-fidelity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffsamp.errors import DiffsampError
from diffsamp.metrics import FrechetStats, frechet_distance, frechet_infinity
from diffsamp.metrics.intervals import bootstrap


def draw(n: int, d: int, seed: int, mean: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((d, d)) * (0.5 ** np.arange(d))[:, None] ** 0.3
    return rng.standard_normal((n, d)) @ mix + mean


@pytest.mark.parametrize("n", [400, 20])  # 20 pictures for 48 features: rank-deficient
def test_a_set_has_no_distance_to_itself(n):
    x = draw(n, 48, 0, 3.0)
    assert abs(frechet_distance(x, x)) <= 1e-8 * np.trace(FrechetStats.of(x).covariance)


@pytest.mark.parametrize("n", [400, 20])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_scaled_set_is_at_the_closed_form_distance(n, scale):
    # C and s^2 C commute: FD = |(s - 1) mean|^2 + (s - 1)^2 tr C.
    x = draw(n, 48, 1, 1.0)
    stats = FrechetStats.of(x)
    expected = (scale - 1) ** 2 * (stats.mean @ stats.mean + np.trace(stats.covariance))
    assert frechet_distance(x * scale, x) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [400, 20])
def test_shifted_set_is_at_the_squared_shift(n):
    x = draw(n, 48, 2)
    shift = np.random.default_rng(3).standard_normal(48)
    # A floating-point zero stands beside the trace of the covariance: 1e-9 of what is summed.
    scale = shift @ shift + 2 * np.trace(FrechetStats.of(x).covariance)
    assert abs(frechet_distance(x + shift, x) - shift @ shift) <= 1e-9 * scale


def test_disjoint_subspaces_do_not_overlap():
    # Covariances that live in orthogonal subspaces: the cross term is exactly zero.
    rng = np.random.default_rng(4)
    a, b = np.zeros((30, 40)), np.zeros((30, 40))
    a[:, :20], b[:, 20:] = rng.standard_normal((2, 30, 20))
    sa, sb = FrechetStats.of(a), FrechetStats.of(b)
    expected = ((sa.mean - sb.mean) ** 2).sum() + np.trace(sa.covariance) + np.trace(sb.covariance)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_agrees_with_torch_fidelity_and_torchmetrics_in_float64():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    a, b = draw(600, 64, 5, 2.0), draw(500, 64, 6, 2.1)
    ours = frechet_distance(a, b)
    peers = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    theirs = fid_statistics_to_metric(*peers, verbose=False)["frechet_inception_distance"]
    moments = [torch.from_numpy(v) for x in (a, b) for v in (x.mean(0), np.cov(x, rowvar=False))]
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours == pytest.approx(float(_compute_fid(*moments)), rel=1e-6)


class Given(torch.nn.Module):
    """An extractor for torchmetrics whose pictures are features already."""

    num_features = 32

    def forward(self, x):
        return x


def test_agrees_with_the_public_metric_of_torchmetrics_in_float64():
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = draw(300, 32, 21, 2.0), draw(250, 32, 22, 2.2)
    metric = FrechetInceptionDistance(Given(), input_img_size=(32,)).set_dtype(torch.float64)
    for part in np.array_split(a, 3):
        metric.update(torch.from_numpy(part), real=True)
    metric.update(torch.from_numpy(b), real=False)
    theirs = metric.compute()
    assert theirs.dtype == torch.float64 and frechet_distance(b, a) == pytest.approx(float(theirs), rel=1e-6)


def test_merging_parts_is_the_same_as_one_set_far_from_zero():
    x = draw(1000, 24, 7, mean=1e6)
    whole, parts = FrechetStats.of(x), FrechetStats()
    for part in np.split(x, [1, 1, 300, 999]):  # parts of one, none, many and one picture
        parts.merge(FrechetStats.of(part))
    reference = np.cov((x - x.mean(0)), rowvar=False)
    assert parts.n == 1000
    assert np.abs(parts.mean - whole.mean).max() <= 1e-14 * 1e6
    assert np.abs(parts.covariance - reference).max() <= 1e-9 * np.abs(reference).max()


def test_statistics_survive_a_file(tmp_path):
    stats = FrechetStats.of(draw(50, 8, 8), {"extractor": "x", "resize": "tf1"})
    stats.save(tmp_path / "s.safetensors")
    back = FrechetStats.load(tmp_path / "s.safetensors")
    assert back.facts == stats.facts and back.n == 50
    assert frechet_distance(back, stats) == pytest.approx(0, abs=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_infinity_removes_most_of_the_bias():
    # Two samples of one distribution: FD at n is biased upwards, FD at infinity is near zero.
    reference = FrechetStats.of(draw(20000, 16, 9))
    rng = np.random.default_rng(10)
    mix = np.random.default_rng(9).standard_normal((16, 16)) * (0.5 ** np.arange(16))[:, None] ** 0.3
    sample = rng.standard_normal((400, 16)) @ mix
    assert abs(frechet_infinity(sample, reference)) < 0.5 * frechet_distance(sample, reference)


def test_bootstrap_spread_of_a_mean_is_the_standard_error():
    x = np.random.default_rng(11).standard_normal(400)
    found = bootstrap(400, lambda rows: float(x[rows].mean()), replicates=400)
    expected = 1.96 * x.std(ddof=1) / 20
    # The spread of 400 replicates has relative error 0.035: 25 % is seven of them, a false alarm below 1e-11.
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.25)


def test_bad_features_are_named():
    x = draw(20, 8, 12)
    with pytest.raises(DiffsampError, match=r"features have 8 columns and the reference has 7"):
        frechet_distance(x, x[:, :7])
    with pytest.raises(DiffsampError, match=r"not finite \(first in row 3\)"):
        frechet_distance(np.where(np.arange(20)[:, None] == 3, np.nan, x), x)
    with pytest.raises(DiffsampError, match="shape"):
        FrechetStats.of(x[0])
    with pytest.raises(DiffsampError, match="at least 2"):
        frechet_distance(x[:1], x)


def test_too_few_pictures_say_what_is_needed():
    assert FrechetStats.of(draw(9, 8, 13)).warning is None
    told = FrechetStats.of(draw(8, 8, 13)).warning
    assert told and "rank 7 for 8 features" in told and "at least 9" in told
