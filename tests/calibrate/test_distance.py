"""Tables refined for the Fréchet distance of their pictures: what is descended, kept and refused. Seeded."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from diffsamp import calibrate, engine, rng
from diffsamp.calibrate.artifact import Artifact
from diffsamp.calibrate.frechet import Distance
from diffsamp.calibrate.refine import in_parts, refine
from diffsamp.calibrate.search import mse
from diffsamp.calibrate.table import TableFit
from diffsamp.cli.calibrate import app
from diffsamp.errors import DiffsampError
from diffsamp.grids import grid
from diffsamp.metrics.frechet import frechet_distance
from diffsamp.metrics.moments import FrechetStats
from diffsamp.pixels import eight_bit
from diffsamp.plan import Plan
from diffsamp.process import Process
from diffsamp.registry import solver
from diffsamp.solvers.dc import dc
from diffsamp.testing import toys

VP = Process.vp("scaled_linear", 0.00085, 0.012)
TOY = toys.img()
WIDTH = 6


class Waves:
    """A small fixed network from 8x8 pictures to features."""

    fingerprint = "ab" * 32

    def __init__(self) -> None:
        self.matrix = rng.normal([0], (64, WIDTH))[0].double() / 8
        self.seen = 0

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        self.seen += len(pictures)
        return torch.tanh((pictures.double().flatten(1) / 127.5 - 1) @ self.matrix).float()


def pictures(x: torch.Tensor) -> torch.Tensor:
    return eight_bit(x / 3)


MODEL = calibrate.Model("toy", "ab" * 32, VP, "sample", (1, 8, 8), 10, TOY.denoiser, pictures)


def features(x: torch.Tensor) -> dict[str, np.ndarray]:
    return {"features": Waves()(x).numpy()}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Statistics of the toy's own data, made by a fine run, as a file."""
    noise, labels = MODEL.points(range(5000, 5512))
    plan = solver("unipc")(VP, grid("linspace", VP, 40))
    x = engine.sample(plan, TOY.denoiser(labels), noise * plan.first_level.sigma)
    stats = FrechetStats.of(features(pictures(x))["features"])
    path = tmp_path_factory.mktemp("real") / "real.safetensors"
    stats.save(path)
    return stats, path


@pytest.fixture(scope="module")
def case(real):
    """A plan of 5 calls, its points with their goal, many noises, fresh noises, and the distance."""
    named = grid("linspace", VP, 5)
    plan = solver("unipc")(VP, named)
    sigma = plan.first_level.sigma
    noise, labels = MODEL.points(range(24))
    x = noise * sigma
    goal = calibrate.Reference(VP, named.levels, TOY.denoiser(labels), x, steps=100).at(named.levels[-1])
    far, fresh = (MODEL.points(range(first, first + 256)) for first in (1000, 2000))
    distance = Distance(features, real[0].mean, real[0].covariance, pictures)
    points = (TOY.denoiser(labels[:16]), x[:16], goal[:16])
    unseen = (TOY.denoiser(labels[16:]), x[16:], goal[16:])
    many, others = ((in_parts(MODEL, part[1], 1.0), part[0] * sigma) for part in (far, fresh))
    return plan, points, unseen, many, others, distance


def error(plan: Plan, points) -> float:
    return mse(engine.sample(plan, points[0], points[1]), points[2])


@pytest.mark.parametrize("n", [40, 5])  # 5 pictures: a covariance of less than full rank
def test_value_is_the_metric_and_slope_its_derivative(n):
    draw = np.random.default_rng(0)
    real, found = draw.normal(size=(400, 8)) @ draw.normal(size=(8, 8)), draw.normal(size=(n, 8)) + 0.3
    distance = Distance(features, real.mean(0), np.cov(real.T), pictures)
    value, slope = distance.with_slope(found)
    assert value == pytest.approx(frechet_distance(found, real), rel=1e-10)
    move = draw.normal(size=found.shape)
    change = (distance.value(found + 1e-5 * move) - distance.value(found - 1e-5 * move)) / 2e-5
    assert float((slope * move).sum()) == pytest.approx(change, rel=1e-5)


def test_a_table_as_unknowns_is_the_table_and_late_ones_leave_the_early_calls_alone():
    named = grid("linspace", VP, 7)
    plan = dc(solver("unipc")(VP, named), ratios=(1, 1, 0.8, 1.1, 1.2, 0.9, 1.3))
    table, start = TableFit.around(plan)
    same = table.plan(start)
    assert same is not None and np.abs(same.response("sample") - plan.response("sample")).max() < 1e-9
    again, begun = TableFit.around(same)
    moved_times = begun.copy()
    moved_times[-1] += 0.2
    told = again.plan(moved_times)
    assert told is not None
    other, values = TableFit.around(told)
    assert other.plan(values).rows[-1].level.t == pytest.approx(told.rows[-1].level.t, abs=1e-6)
    for calls in (0, 1, 3):
        free = table.late(calls)
        changed = start.copy()
        changed[free] += 0.05
        made = table.plan(changed)
        assert made is not None
        early = 7 - calls  # inputs of these calls, and what the network is told there, stay
        known = [[(v.t, v.alpha, v.sigma) for v in (r.level for r in p.rows[:early])] for p in (made, plan)]
        assert np.abs(np.subtract(*known)).max() < 1e-6
        difference = np.abs(made.response("sample") - plan.response("sample")).max(1)
        assert difference[:early].max() < 1e-9 < difference[early]
    assert table.late(7) == list(range(len(start)))


def test_distance_falls_on_unseen_noises_and_the_error_stays_in_its_bound(case):
    plan, points, unseen, many, fresh, distance = case
    table, start = TableFit.around(plan)
    found = refine(
        table.plan, start, table.late(4), points, many, distance, lambda p: error(p, unseen), weight=1.0, bound=1.1
    )
    made = table.plan(found.values)
    assert made is not None
    before, after = error(plan, points), error(made, points)
    assert (found.error_before, found.error) == pytest.approx((before, after), rel=1e-5)
    assert after <= 1.1 * before and error(made, unseen) <= 1.1 * error(plan, unseen)
    assert found.held_out_before == pytest.approx(error(plan, unseen), rel=1e-6)

    def apart(p: Plan, noises) -> float:
        return distance.value(distance.features(engine.sample(p, *noises)))

    assert apart(made, many) == pytest.approx(found.after, rel=1e-9)
    # What a fine run of as many pictures has is bias; what the plan has above it falls, where it was searched and not.
    fine = solver("unipc")(VP, grid("linspace", VP, 40))
    assert found.after - apart(fine, many) < 0.2 * (found.before - apart(fine, many))
    assert apart(made, fresh) - apart(fine, fresh) < 0.3 * (apart(plan, fresh) - apart(fine, fresh))


def test_nothing_is_taken_that_the_held_out_noises_forbid(case):
    plan, points, _, many, _, distance = case
    table, start = TableFit.around(plan)
    asked: list[Plan] = []

    def held_out(candidate: Plan) -> float:
        asked.append(candidate)
        return 1.0 if len(asked) == 1 else 1.3

    found = refine(table.plan, start, table.late(1), points, many, distance, held_out, bound=1.25, trust=0.01)
    assert len(asked) > 1 and np.array_equal(found.values, start)
    assert found.after == found.before and found.error == found.error_before


@pytest.fixture
def options(real, monkeypatch):
    extractor = Waves()
    monkeypatch.setattr("diffsamp.testing.toys.waves", extractor, raising=False)
    return {
        "nfe": [5], "guidance_scale": [1.0], "points": 14, "held_out": 8, "reference_steps": 40, "rounds": 1,
        "extractor": "diffsamp.testing.toys:waves", "reference": str(real[1]), "pictures": 64,
    }  # fmt: skip


def plain(options: dict) -> dict:
    return {k: v for k, v in options.items() if k not in ("extractor", "reference", "pictures")}


def test_refined_settings_keep_their_provenance_and_are_not_searched_again(options, tmp_path):
    path = tmp_path / "all.safetensors"
    before = calibrate.calibrate_all(MODEL, **plain({**options, "guidance_scale": [1.0, 3.0]}), out=path)
    assert all(s.distance is None for s in before.settings.values())
    lines: list[tuple[str, int, int]] = []
    calibrate.calibrate_all(MODEL, **options, out=path, progress=lambda *line: lines.append(line))
    loaded = Artifact.load(path)
    assert loaded.settings["5/3"] == before.settings["5/3"]
    setting, old = loaded.setting(5, 1.0), before.setting(5, 1.0)
    facts = setting.distance
    assert facts is not None and setting.values != old.values and setting.kept == old.kept + "+distance"
    # What is promised is that the sum of both, each in units of its start, falls.
    assert setting.after / facts["error_before"] + facts["after"] / facts["before"] < 2
    assert facts["after"] < facts["before"] and facts["pictures"] == 64 and facts["extractor_sha256"] == "ab" * 32
    assert setting.after <= 1.25 * facts["error_before"] and setting.calls > old.calls
    assert setting.held_out_after <= 1.25 * facts["held_out_error_before"]
    assert facts["held_out_error_before"] == pytest.approx(old.held_out_after, rel=0.02)
    assert lines and lines[-1][1:] == (2, 2) and all(1 <= done <= total for _, done, total in lines)
    base = solver("unipc")(VP, grid("linspace", VP, 5))
    assert loaded.apply(base, 1.0).nfe == 5

    def guided(labels, scale):
        raise AssertionError("the network was asked for")

    def broken(labels, scale):
        return lambda x, level: guided(labels, scale)

    again = calibrate.calibrate_all(replace(MODEL, guided=broken), **options, out=path)
    assert again.settings == loaded.settings
    with pytest.raises(DiffsampError, match="refined with weight 1.0, this run has 3.0") as refused:
        calibrate.calibrate_all(MODEL, **options, weight=3.0, out=path)
    assert "\n" not in str(refused.value)
    fresh = calibrate.calibrate_all(MODEL, **options)
    assert fresh.setting(5, 1.0).values == setting.values  # seeded, killed between the stages or not


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pictures": 10}, "pictures: got 10; a distance needs at least 64"),
        ({"weight": 0.0}, "weight: got 0"), ({"weight": float("nan")}, "weight: got nan"),
        ({"bound": 0.9}, "bound: got 0.9; must be 1 or above"),
        ({"held_out": 2}, "at least 8 held-out noises"),
        ({"extractor": "fashion-dnn"}, "extractor='fashion-dnn'; accepted"),
        ({"reference": "nowhere"}, "reference='nowhere': no such file"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_before_the_network_is_asked(options, given, words):
    def guided(labels, scale):
        raise AssertionError("the network was asked for")

    with pytest.raises(DiffsampError, match=words) as refused:
        calibrate.calibrate_all(replace(MODEL, guided=guided), **{**options, **given})
    assert "\n" not in str(refused.value)


def test_a_model_without_pictures_and_a_reference_of_another_width_are_told(options, tmp_path):
    with pytest.raises(DiffsampError, match="model toy has samples of shape"):
        calibrate.calibrate_all(replace(MODEL, pictures=None), **options)
    np.savez(tmp_path / "five.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(DiffsampError, match="reference: has 5 features, the extractor makes 6"):
        calibrate.calibrate_all(MODEL, **{**options, "reference": str(tmp_path / "five.npz")})


def call(*arguments: str) -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="points: 4 is few|pictures: 64 are few")
        done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_refines_and_shows_the_distance(tmp_path):
    path = tmp_path / "all.safetensors"
    small = ("--nfe", "3", "--guidance-scale", "1", "--points", "4", "--held-out", "8", "--reference-steps", "12")
    few = ("--evaluations", "5", "--rounds", "1", "--out", str(path))
    text = call("all", *small, *few, "--extractor", "fashion-cnn", "--pictures", "64", "--bound", "2")
    facts = Artifact.load(path).setting(3, 1.0).distance
    assert facts is not None and facts["extractor"] == "fashion-cnn" and facts["bound"] == 2.0
    assert "training" in facts["reference"]  # the test split is what distances are reported against
    assert f"{facts['before']:.3f}" in text and "derivative 1 of" in text
    with pytest.raises(DiffsampError, match="pictures: is of no use without --extractor"):
        call("all", *small, "--pictures", "64")
