"""The share of the guidance bias that K particles remove in 16 and 64 dimensions, by the benchmark's own function."""

import importlib.util
import json
from pathlib import Path

import pytest
import scipy.stats
from analytic_targets import FALSE_ALARM

ROOT = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("correctors_benchmark", ROOT / "correctors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(benchmark):
    rows = benchmark.dimensions(benchmark.GAUSSIAN_COUNTS, 2**17)
    return {key_of(r): r for r in rows}


def key_of(row):
    return row["kernel"], row["dims"], row["particles"]


def errors_of(row):
    """Standard errors that a mean over this many groups misses by chance in one of 1e5 runs (Student's law)."""
    return float(scipy.stats.t.isf(FALSE_ALARM / 2, row["groups"] - 1))


@pytest.mark.parametrize("dims", [16, 64])
@pytest.mark.parametrize("kernel", ["sde-dpmpp-2m", "adams-maruyama"])
def test_share_of_the_guidance_bias_removed_grows_with_particles_to_all_of_it(found, kernel, dims):
    rows = [found[kernel, dims, k] for k in (4, 16, 64, 256, 1024)]
    bounds = ((0.25, 0.75), (0.5, 1.0), (0.6, 1.25), (0.65, 1.3), (0.7, 1.3))
    for row, (low, high) in zip(rows, bounds, strict=True):
        reach = errors_of(row) * row["removed_se"]
        assert low < row["removed"] - reach and row["removed"] + reach < high, row
    assert rows[0]["removed"] < rows[1]["removed"] < rows[2]["removed"]


@pytest.mark.parametrize("dims", [16, 64])
def test_first_order_kernel_passes_the_target_by_its_own_step_error(found, dims):
    # About all at K = 8 in 16 dimensions, 83 % at 8 and 120 % at 32 in 64; then beyond it.
    for k, low, high in ((4, 0.3, 1.1), (16, 0.75, 1.5), (1024, 1.05, 2.0)):
        row = found["euler-maruyama", dims, k]
        reach = errors_of(row) * row["removed_se"]
        assert low < row["removed"] - reach and row["removed"] + reach < high, row


def test_in_more_dimensions_fewer_of_the_first_particles_have_descendants(found):
    for kernel in ("euler-maruyama", "adams-maruyama", "sde-dpmpp-2m"):
        for k in (8, 16, 64, 256):
            assert found[kernel, 64, k]["ancestors"] < found[kernel, 16, k]["ancestors"], (kernel, k)


def test_committed_table_is_what_the_benchmark_computes(benchmark, found):
    committed = json.loads((ROOT / "results" / "correctors.json").read_text(encoding="utf-8"))["dimensions"]
    assert {key_of(r) for r in committed} == set(found)
    for row in committed:
        again = found[key_of(row)]
        error = (row["removed_se"] ** 2 + again["removed_se"] ** 2) ** 0.5
        assert abs(row["removed"] - again["removed"]) < errors_of(again) * error, (row, again)
    text = (ROOT / "results" / "correctors.md").read_text(encoding="utf-8")
    for row in committed:
        assert f"{row['removed']:.2f} ± {row['removed_se']:.2f}" in text
