"""Every Triton kernel against its definition, in Triton's interpreter."""

from __future__ import annotations

import pytest
from kernel_runner import interpreted


@pytest.mark.parametrize("case", ["linear", "guided", "gather", "categorical"])
def test_kernel_differs_from_its_definition(case):
    interpreted(case)


@pytest.mark.parametrize(
    "case", ["race_is_invariant_to_tiles", "row_is_independent_of_batch", "draws_follow_the_law", "empty_and_dead_rows"]
)
def test_draw_breaks_a_promise(case):
    interpreted(case)
