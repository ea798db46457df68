"""Means that a network shows at the start level: exact for a network that is the denoiser of other Gaussians."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_teleport_maps import FLOW, VE, VP, statistics

from diffsamp import calibrate, engine
from diffsamp.calibrate.model import Model
from diffsamp.errors import DiffsampError
from diffsamp.grids import Grid, grid
from diffsamp.process import Level, Process
from diffsamp.registry import solver
from diffsamp.teleport import Statistics, gather, gaussian_denoiser, network_means, teleport

D, CLASSES = 12, 3


def of_classes(seed: int = 0) -> Statistics:
    stats = statistics(D)
    own = torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    other = statistics(D, seed=5)
    return replace(stats, class_means=own, within=(other.basis, other.eigenvalues, other.residual))


def network(believed: Statistics, process: Process, prediction: str = "sample") -> Model:
    """The denoiser of ``believed``, guided; no training, no error but that its means may be others than the data's."""

    def guided(labels: torch.Tensor, scale: float):
        def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
            own = believed if believed.class_means is None else believed.of_class(labels)
            c, u = gaussian_denoiser(own, x, level), gaussian_denoiser(believed, x, level)
            p, q = process.x0_coefficients(level, prediction)
            return ((c if scale <= 1 else u + scale * (c - u)) - p * x) / q

        return denoise

    return Model("toy", "0" * 64, process, prediction, (D,), CLASSES, guided)


@pytest.mark.parametrize(("process", "prediction"), [(VE, "sample"), (VP, "v_prediction"), (FLOW, "flow_prediction")])
def test_other_means_than_the_networks_are_found(process, prediction):
    data, believed = of_classes(0), replace(of_classes(1), mean=torch.linspace(-1, 1, D, dtype=torch.float64))
    level = process.level(10.0)
    found = network_means(data, network(believed, process, prediction), level, per_class=5)
    assert found.class_means is not None and believed.class_means is not None and data.class_means is not None
    assert (found.class_means - believed.class_means).abs().max() < 1e-3  # noise and answers are float32
    assert (found.mean - believed.mean).abs().max() < 1e-3
    assert (data.class_means - believed.class_means).abs().max() > 1
    assert found.key["means"] == "network, sigma/alpha 10, 15 noises"
    assert torch.equal(found.eigenvalues, data.eigenvalues) and "means" not in data.key


def test_statistics_without_classes_get_another_mean_than_the_answers_average():
    believed = statistics(D, seed=3)
    found = network_means(statistics(D), network(replace(believed, basis=statistics(D).basis), VE), VE.level(20.0))
    assert found.class_means is None and (found.mean - believed.mean).abs().max() < 1e-3


def test_the_embedded_networks_own_means_bring_a_guided_start_no_nearer_to_its_run():
    """Statistics of data that the network was trained on, but for the means: those of its own few samples."""
    model = calibrate.embedded("fashion")
    noise, labels = model.points(range(12))
    whole = grid("karras", model.process, 24, sigma_max=80.0)
    top = Grid(model.process, tuple(level for level in whole.levels if level.noise_to_signal > 14))
    x = noise * top.levels[0].sigma
    with torch.no_grad():
        goal = engine.sample(
            solver("unipc")(model.process, top), model.guided(labels, 3.0), x, prediction=model.prediction
        )
        made, classes = model.points(range(100, 160))
        plan = solver("unipc")(model.process, grid("linspace", model.process, 6))
        samples = engine.sample(
            plan, model.guided(classes, 1.0), made * plan.first_level.sigma, prediction=model.prediction
        )
    data = gather([(samples, classes)], rank=16)

    def miss(stats: Statistics) -> float:
        moved = teleport(stats, x, top.levels[0], top.levels[-1], labels=labels, guidance_scale=3.0)
        return float((moved - goal).square().flatten(1).mean(1).median())

    assert miss(network_means(data, model, per_class=8)) < 0.7 * miss(data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per_class": 0}, "per_class: got 0"),
        ({"level": FLOW.level_at(1000.0)}, "both signal and noise"),
        ({"stats": replace(of_classes(), class_means=torch.zeros(4, D))}, "have 4 classes, the model has 3"),
        ({"stats": replace(of_classes(), mean=torch.full((D,), torch.nan))}, "are not finite"),
    ],
)
def test_what_has_no_means_is_not_refused(options, words):
    with pytest.raises(DiffsampError, match=words):
        network_means(
            options.get("stats", of_classes()), network(options.get("stats", of_classes()), FLOW), options.get("level"),
            per_class=options.get("per_class", 1),
        )  # fmt: skip
