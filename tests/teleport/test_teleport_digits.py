"""Teleportation on sklearn's digits with the exact denoiser of a kernel density (h = 0.2): the figures of the method.

Everything is seeded, so the bounds either hold or do not; no bound is a statistical test.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from diffsamp import engine
from diffsamp.grids import Grid, grid
from diffsamp.process import Process
from diffsamp.registry import solver
from diffsamp.teleport import choose_start, gather, gaussian_map, teleport
from diffsamp.testing.toys import Mixture

VE = Process.ve(0.002, 80.0)
TOP = VE.level(80.0)


@cache
def digits() -> tuple[Mixture, torch.Tensor, torch.Tensor]:
    data, labels = load_digits(return_X_y=True)
    x = torch.tensor(data / 8 - 1)
    return (
        Mixture(x, torch.tensor(labels), torch.full((64,), 0.04, dtype=torch.float64), (64,)),
        x,
        torch.tensor(labels),
    )


@cache
def statistics():
    """Of the density itself: the data's covariance plus the kernel's variance."""
    _, x, labels = digits()
    noise = 0.2 * torch.randn(8, *x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return gather([((x + part), labels) for part in noise])


def noise(n: int = 96) -> torch.Tensor:
    return 80.0 * torch.randn(n, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(model, x: torch.Tensor, start: float, n: int, name: str = "dpmpp-2m") -> torch.Tensor:
    return engine.sample(solver(name)(VE, grid("karras", VE, n, sigma_max=start)), model, x)


@cache
def fine() -> torch.Tensor:
    return run(digits()[0].denoiser(), noise(), 80.0, 150, "unipc")


def median_error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).square().mean(1).median())


@pytest.mark.parametrize(("start", "bound"), [(20.0, 1e-6), (10.0, 2e-6), (5.0, 1e-5)])
def test_teleported_run_follows_the_full_one_and_a_white_start_does_not(start, bound):
    model, level = digits()[0].denoiser(), VE.level(start)
    ours = run(model, gaussian_map(statistics(), noise(), TOP, level), start, 100, "unipc")
    white = run(model, noise() * start / 80.0, start, 100, "unipc")
    error = median_error(ours, fine())
    assert error < bound
    assert median_error(white, fine()) > 50 * error


def test_dropping_six_of_eighteen_calls_costs_nothing_and_so_does_one_large_step():
    model, whole = digits()[0].denoiser(), grid("karras", VE, 18)
    two_m = solver("dpmpp-2m")
    full = median_error(engine.sample(two_m(VE, whole), model, noise()), fine())
    tail = whole.after(6)
    started = gaussian_map(statistics(), noise(), TOP, tail.levels[0])
    ours = median_error(engine.sample(two_m(VE, tail), model, started), fine())
    large = Grid(VE, (whole.levels[0], *tail.levels), "large first step")
    control = median_error(engine.sample(two_m(VE, large), model, noise()), fine())
    assert len(tail) == 12 and len(large) == 13
    assert ours < 1.05 * full
    # What must not be hidden: a single large step does the same with one call more.
    assert control < 1.1 * ours


def test_guided_starts_rank_as_published():
    model, x, labels = digits()
    chosen = labels[:48]
    start, level = noise(48), VE.level(10.0)
    denoiser = model.denoiser(chosen, 3.0)
    goal = run(denoiser, start, 80.0, 150, "unipc")

    def error(moved: torch.Tensor) -> float:
        return median_error(run(denoiser, moved, 10.0, 100, "unipc"), goal)

    stats = statistics()
    ode = error(teleport(stats, start, TOP, level, labels=chosen, guidance_scale=3.0))
    call = error(teleport(stats, start, TOP, level, guidance_scale=3.0, denoised=denoiser(start, TOP)))
    with pytest.warns(UserWarning, match="white noise"):
        blind = error(teleport(stats, start, TOP, level, guidance_scale=3.0, force=True))
    assert ode < 5e-6
    assert call < 2e-5
    assert blind > 1e-4


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    def mean(u: torch.Tensor, v: torch.Tensor, same: bool) -> float:
        d = torch.cdist(u, v)
        return float(d.sum() / (len(u) * (len(v) - 1) if same else d.numel()))

    return 2 * mean(a, b, False) - mean(a, a, True) - mean(b, b, True)


def test_covariance_keeps_the_distribution_at_an_aggressive_start():
    """Energy distance to draws of the density; between two such sets of 4000 it varies by about 0.001."""
    model, x, _ = digits()
    n, level = 4000, VE.level(2.0)
    start, generator = noise(n), torch.Generator().manual_seed(7)
    chosen = torch.randint(len(x), (n,), generator=generator)
    data = x[chosen] + 0.2 * torch.randn(n, 64, generator=generator, dtype=torch.float64)
    mean_only = statistics().mean + (start - statistics().mean) * 2.0 / 80.0
    # Single precision: the distances are of the order of 1e-3 of 1e1.
    ours = run(model.denoiser(), gaussian_map(statistics(), start, TOP, level).float(), 2.0, 12).double()
    theirs = run(model.denoiser(), mean_only.float(), 2.0, 12).double()
    assert energy_distance(ours, data) < 0.003
    assert energy_distance(theirs, data) > 0.005


def test_rule_picks_a_level_where_teleporting_is_no_worse_than_solving():
    model = digits()[0].denoiser()
    whole = grid("karras", VE, 18)
    choice = choose_start(statistics(), solver("dpmpp-2m"), whole, model, noise(16))
    assert choice.level.noise_to_signal >= 5 * statistics().std
    assert 3 <= choice.index <= 9
    _, gap, error = choice.table[choice.index - 1]
    assert gap <= 2 * error
    assert np.isfinite(choice.table).all()


def test_rule_depends_on_the_scale_in_which_a_process_writes_its_states():
    """The same model and levels as VE and as VP: alpha shrinks the states up there, and must not lower the start."""
    model, vp = digits()[0].denoiser(), Process.vp("squaredcos_cap_v2")
    levels = [level.noise_to_signal for level in grid("karras", VE, 18).levels[:-1]]
    found = []
    for process in (VE, vp):
        inner = tuple(process.level(ratio) for ratio in levels)
        whole = Grid(process, (*inner, process.level(0.0)), "same levels")
        x = noise(16) / 80.0 * whole.levels[0].sigma
        found.append(choose_start(statistics(), solver("dpmpp-2m"), whole, model, x))
    assert found[0].index == found[1].index
