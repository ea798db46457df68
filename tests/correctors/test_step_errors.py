"""What is left of the error when particles are many: the step's. Exact for annealed Gaussians, without any chance.

A Gaussian stays one under linear rows and quadratic log-weights, so the covariance of (sample, output before) is
carried through the rows of a plan, the mixed prediction and the rate of the target, each as the code gives it at x = 1.
"""

import math

import numpy as np
import pytest
import torch
from analytic_targets import karras, process_of

import diffsamp
from diffsamp.correctors import Corrector, adams_maruyama, annealed, euler_maruyama
from diffsamp.correctors.spans import power_gains, spans
from diffsamp.errors import DiffsampError

KERNELS = {
    "euler-maruyama": lambda process, grid: euler_maruyama(process, grid, z=2.0),
    "adams-maruyama": lambda process, grid: adams_maruyama(process, grid, z=2.0),
    "sde-dpmpp-1": diffsamp.solver("sde-dpmpp-1"),
    "sde-dpmpp-2m": diffsamp.solver("sde-dpmpp-2m", lower_order_final=False),
}
BETAS = (0.5, 2.0, 3.0)


def variance_error(plan, beta, *, weighted=True):
    """Variance at the end of infinitely many particles minus that of N(0, 1)^beta; VE plans."""
    target, one = annealed(beta), torch.ones(1, 1, dtype=torch.float64)
    s = plan.first_level.noise_to_signal
    found = np.diag([s * s / beta, 0.0])

    def rate(level):
        return float(target.rate((one / (1 + level.sigma**2),), one, level)) if weighted else 0.0

    def tilted(c, w):
        # N(0, c) times exp(w x²) in the first coordinate.
        return c + np.outer(c[:, 0], c[:, 0]) * 2 * w / (1 - 2 * w * c[0, 0])

    for row, span in zip(plan.rows, spans(plan), strict=True):
        half = 0.5 * math.log(span.start / span.stop)
        gain = power_gains(beta, span.stop / span.start, span.churn)
        assert gain == (beta, 1.0), "the step is long; take more of them"
        m = float(target.mix((one / (1 + row.level.sigma**2),), one, row.level))
        if plan.form == "epsilon":
            m = (1.0 - m) / row.level.sigma
        weights = (*row.advance.m, 0.0)
        moved = np.array([[row.advance.base + row.advance.input + weights[0] * m, weights[1]], [m, 0.0]])
        found = tilted(found, half * rate(row.level))
        found = moved @ found @ moved.T + np.diag([row.advance.noise**2, 0.0])
        found = tilted(found, half * rate(row.next_level))
    return found[0, 0] - (1 + plan.last_level.noise_to_signal ** 2) / beta


def made(kernel, n):
    process = process_of("ve")
    return KERNELS[kernel](process, karras(process, n))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_error_of_many_particles_falls_with_the_order_of_the_kernel(kernel, beta):
    fine, finer = (variance_error(made(kernel, n), beta) for n in (400, 800))
    assert math.log2(fine / finer) > made(kernel, 4).order - 0.1, (fine, finer)


@pytest.mark.parametrize("beta", BETAS)
def test_two_step_kernel_leaves_a_thousandth_where_the_first_order_one_leaves_its_bar(beta):
    assert abs(variance_error(made("adams-maruyama", 200), beta)) < 5e-4
    assert abs(variance_error(made("euler-maruyama", 200), beta)) > 20 * 5e-4
    assert abs(variance_error(made("adams-maruyama", 200), beta)) < abs(variance_error(made("sde-dpmpp-2m", 200), beta))


@pytest.mark.parametrize("z", [1 / 3, 1.0, 2.0, 4.0])
def test_two_step_kernel_without_weights_has_the_closed_limit_of_its_drift(z):
    process = process_of("ve")
    plan = adams_maruyama(process, karras(process, 400), z=z)
    found = variance_error(plan, 3.0, weighted=False) + (1 + 0.02**2) / 3
    assert abs(found - z / (3 * (1 + z) - 1)) < 1e-3


@pytest.mark.parametrize("kernel", [euler_maruyama, adams_maruyama])
@pytest.mark.parametrize("kind", ["ve", "vp", "flow"])
def test_churn_of_a_row_is_the_noise_that_the_kernel_was_asked_for(kernel, kind):
    process = process_of(kind)
    plan = kernel(process, karras(process, 50), z=1.7)
    assert np.allclose([span.churn for span in spans(plan)], 1.7, atol=1e-9)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5, 3.0])
def test_two_step_kernel_on_a_coarse_grid_to_the_data_stays_on_its_scale(beta):
    process = process_of("ve")
    grid = diffsamp.Grid(process, tuple(process.level(s) for s in (4000.0, 6.0, 3.0, 1.5, 0.7, 0.3, 0.1, 0.0)))
    generator = torch.Generator().manual_seed(0)
    x = 4000.0 * torch.randn(64, 50, generator=generator, dtype=torch.float64)
    predict = lambda x, level: x / (1 + level.sigma**2)  # noqa: E731
    result = Corrector(annealed(beta), 8).run(adams_maruyama(process, grid), predict, x, generator=generator)
    assert 1 / 3 < math.sqrt(beta) * float(result.samples.std()) < 3


@pytest.mark.parametrize("kernel", [euler_maruyama, adams_maruyama])
def test_bad_noise_and_a_start_without_signal_are_refused_in_one_line(kernel):
    process = process_of("flow")
    grid = diffsamp.Grid(process, tuple(process.level(s) for s in (math.inf, 1.0, 0.1)))
    for arguments, match in (((karras(process, 4), 0.0), "z: got 0"), ((karras(process, 4), math.nan), "z: got nan"),
                             ((grid, 1.0), "alpha = 0")):  # fmt: skip
        with pytest.raises(DiffsampError, match=match) as error:
            kernel(process, arguments[0], z=arguments[1])
        assert "\n" not in str(error.value)
