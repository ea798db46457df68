"""Plans: validated when built, printable, hashable, and never NaN."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diffsamp
from diffsamp.errors import DiffsampError
from diffsamp.plan import Mix

PROCESSES = {
    "sd": diffsamp.Process.vp("scaled_linear", 0.00085, 0.012),
    "cosine": diffsamp.Process.vp("squaredcos_cap_v2"),
    "zero-snr": diffsamp.Process.vp("scaled_linear", 0.00085, 0.012, rescale_betas_zero_snr=True),
    "edm": diffsamp.Process.ve(),
    "svd": diffsamp.Process.vp_continuous(),
    "flow": diffsamp.Process.flow(),
    "flow-shift-3": diffsamp.Process.flow(3.0),
}
GRIDS = {
    "vp": ("linspace", "trailing", "uniform", "karras", "exponential", "beta", "ays"),
    "flow": ("flow", "uniform", "linspace", "karras"),
}
# Every solver, with the options that change its table; transforms on the bases that they are meant for.
SETTINGS = [
    *((name, {}) for name in sorted(diffsamp.solvers())),
    *(("unipc", {"order": k, "variant": v}) for k in (1, 2, 3) for v in ("bh1", "bh2")),
    *(("unipc", {"order": k, "corrector": False}) for k in (2, 3)),
    *((name, {"lower_order_final": False}) for name in ("unipc", "dpmpp-2m", "dpmpp-3m", "deis", "sa-solver")),
    *(("deis", {"order": k}) for k in (1, 2, 3)),
    *(("ipndm", {"order": k}) for k in (1, 2, 3)),
    *((name, {"variant": "midpoint"}) for name in ("dpmpp-2s", "dpmpp-3s")),
    *(("sa-solver", {"predictor_order": k, "corrector_order": c}) for k in (1, 3) for c in (0, 3)),
    ("dpmpp-2m", {"variant": "heun"}), ("ddim", {"eta": 0.5}), ("sa-solver", {"tau": 0.0}),
    *((f"{name}(deis)", {}) for name in ("dc", "dualfast")), ("dc(dpmpp-2m)", {}),
]  # fmt: skip


@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    setting=st.sampled_from(SETTINGS),
    process=st.sampled_from(sorted(PROCESSES)),
    steps=st.integers(1, 100),
    pick=st.integers(0, 20),
)
def test_a_configuration_gives_nan_or_breaks_the_point_mass_invariant(setting, process, steps, pick):
    solver, options = setting
    chosen = PROCESSES[process]
    names = GRIDS["flow"] if chosen.kind == "flow" else (
        GRIDS["vp"] if chosen.clock == "discrete" else ("karras", "exponential", "logsnr")
    )  # fmt: skip
    # Building a plan checks both; a failure raises and names the row.
    plan = diffsamp.solver(solver, **options)(chosen, diffsamp.grid(names[pick % len(names)], chosen, steps))
    assert np.isfinite(plan.response("sample")).all()


def _plan(name="unipc", steps=6, **options):
    process = PROCESSES["sd"]
    return diffsamp.solver(name, **options)(process, diffsamp.grid("trailing", process, steps))


@pytest.mark.parametrize("change", ["sign", "index", "scale"])
def test_a_wrong_coefficient_is_let_through(change):
    plan = _plan()
    row = plan.rows[3]
    broken = {
        "sign": replace(row.advance, m=tuple(-v for v in row.advance.m)),
        "index": replace(row.advance, base=plan.rows[2].advance.base),
        "scale": replace(row.advance, m=tuple(1.001 * v for v in row.advance.m)),
    }[change]
    rows = [*plan.rows]
    rows[3] = replace(row, advance=broken)
    with pytest.raises(DiffsampError, match="row 3"):
        plan.with_rows(rows)


def test_a_coefficient_that_is_not_finite_is_let_through():
    plan = _plan()
    rows = [replace(plan.rows[0], advance=Mix(base=math.nan)), *plan.rows[1:]]
    with pytest.raises(DiffsampError, match="row 0.*not finite"):
        plan.with_rows(rows)


def test_a_row_reads_outputs_that_do_not_exist_yet():
    plan = _plan("dpmpp-2m")
    rows = [replace(plan.rows[0], advance=replace(plan.rows[0].advance, m=(0.1, 0.1))), *plan.rows[1:]]
    with pytest.raises(DiffsampError, match="row 0 reads 2"):
        plan.with_rows(rows)


def test_equal_plans_hash_differently_or_different_plans_alike():
    assert hash(_plan()) == hash(_plan()) and _plan() == _plan()
    assert _plan() != _plan(steps=7) and _plan() != _plan("dpmpp-2m") and len({_plan(), _plan(), _plan(order=3)}) == 2


def test_printing_a_plan_does_not_show_every_row():
    text = str(_plan(steps=5))
    assert text.count("input =") == 5 and "unipc" in text and "base" in text


def test_a_noisy_row_with_the_wrong_variance_is_let_through():
    plan = _plan("ddpm")
    rows = [*plan.rows]
    rows[2] = replace(rows[2], advance=replace(rows[2].advance, noise=1.01 * rows[2].advance.noise))
    with pytest.raises(DiffsampError, match="point-mass"):
        plan.with_rows(rows)
