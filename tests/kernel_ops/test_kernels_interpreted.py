"""Every Triton kernel against its definition, in Triton's interpreter."""

from __future__ import annotations

import pytest
from kernel_runner import interpreted


@pytest.mark.parametrize("case", ["linear", "guided", "gather", "categorical", "cut"])
def test_kernel_differs_from_its_definition(case):
    interpreted(case)


@pytest.mark.parametrize(
    "case",
    [
        "race_is_invariant_to_tiles",
        "near_ties_of_a_race",
        "row_is_independent_of_batch",
        "draws_follow_the_law",
        "empty_and_dead_rows",
        "wide_offsets",
        "counter_on_the_device",
    ],
)
def test_kernel_breaks_a_promise(case):
    interpreted(case)
