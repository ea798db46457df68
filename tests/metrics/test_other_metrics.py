"""KID, Inception Score, precision and recall, accuracy, trajectory error against peers and hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffsamp import metrics
from diffsamp.errors import DiffsampError
from diffsamp.metrics.intervals import wilson


def pair(n: int = 300, d: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, d)), rng.standard_normal((n + 40, d)) * 1.2 + 0.1


def test_kid_subsets_agree_with_torch_fidelity():
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = pair()
    theirs = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=7, kid_subset_size=100, verbose=False, rng_seed=2020
    )
    mean, spread = metrics.kernel_distance_subsets(a, b, subsets=7, subset_size=100)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)


def test_kid_by_hand():
    # d = 1, kernel (xy + 1)^3: pairs {0, 1} against {1, 1}: k(0,1) = 1; k(1,1) = 8; cross mean (1 + 1 + 8 + 8) / 4.
    assert metrics.kernel_distance([[0.0], [1.0]], [[1.0], [1.0]]) == pytest.approx(1 + 8 - 2 * 4.5)


def test_inception_score_agrees_with_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = np.random.default_rng(1).standard_normal((200, 10)) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits), 10, True, 2020)
    mean, spread = metrics.inception_score(logits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert spread == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_inception_score_of_certain_balanced_logits_is_the_number_of_classes():
    logits = np.tile(np.eye(10) * 200, (10, 1))
    assert metrics.inception_score(logits, splits=1)[0] == pytest.approx(10)


def test_precision_recall_agrees_with_torch_fidelity():
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    a, b = pair()
    theirs = calculate_precision_recall_full(torch.from_numpy(a), torch.from_numpy(b), 3)
    ours = metrics.precision_recall(a, b, k=3)
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert 0 < ours[0] < 1 and 0 < ours[1] < 1


def test_precision_recall_by_hand():
    # k = 1. Real 0, 1, 10, 11 reach 1 each; generated 0.5, 0.6, 50, 51 reach 0.1, 0.1, 1, 1.
    real, generated = np.array([[0.0], [1], [10], [11]]), np.array([[0.5], [0.6], [50], [51]])
    assert metrics.precision_recall(generated, real, k=1) == (0.5, 0.0)


def test_accuracy_and_its_interval():
    assert metrics.class_accuracy(np.eye(4), [0, 1, 2, 0]) == 0.75
    found = wilson(0.75, 4)
    assert found.low == pytest.approx(0.3006, abs=1e-4) and found.high == pytest.approx(0.9544, abs=1e-4)


def test_trajectory_error_is_per_sample():
    a = np.zeros((2, 1, 2, 2))
    b = a.copy()
    b[1, 0, 0, 0] = 2.0
    assert metrics.trajectory_error(a, b).tolist() == [0.0, 1.0]


def test_bad_input_is_one_clear_line():
    a, b = pair(20)
    for call, told in (
        (lambda: metrics.check_metrics(["fd", "fidd"]), "accepted: fd"),
        (lambda: metrics.check_metrics([]), "metrics is empty"),
        (lambda: metrics.Protocol.named("tf2", 10), "accepted: embedded, torch-fidelity"),
        (lambda: metrics.Protocol.named("clean-fid", 10, resize="nearest"), "accepted: tf1"),
        (lambda: metrics.precision_recall(a[:3], b), "k=3"),
        (lambda: metrics.kernel_distance_subsets(a, b), "subset_size=1000"),
        (lambda: metrics.kernel_distance(a, b[:, :3]), "columns"),
        (lambda: metrics.class_accuracy(a, [1, 2]), "labels has shape"),
        (lambda: metrics.inception_score(a, splits=21), "splits=21"),
        (lambda: metrics.trajectory_error(a, b), "equal shapes"),
    ):
        with pytest.raises(DiffsampError, match=told) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_evaluate_leaves_out_what_the_cell_cannot_have_and_refuses_another_width():
    a, b = pair(60)
    reference = metrics.Reference("r", metrics.FrechetStats.of(b), b)
    found = metrics.evaluate(metrics.names(), {"features": a}, reference, replicates=5)
    assert set(found) == {"fd", "fd-infinity", "kid", "precision", "recall"}
    assert all(v.low <= v.value <= v.high for v in found.values())
    with pytest.raises(DiffsampError, match="has 24 features per picture and the run 5"):
        metrics.evaluate(["fd"], {"features": a[:, :5]}, reference)
