"""What a transform of a plan needs to know: is the base a deterministic multistep solver with one call per step?"""

from __future__ import annotations

from ..errors import DiffsampError
from ..plan import Plan


def require_multistep(plan: Plan, method: str) -> None:
    """Refuse bases whose history is no sequence of outputs at falling noise levels, one per step.

    Raises:
        DiffsampError: the plan draws noise or calls the network more than once per step.
    """
    name = plan.solver or "this plan"
    if plan.stochastic:
        raise DiffsampError(
            f"{method}: {name} draws noise in every step, and differences of its outputs hold that noise; "
            "accepted: deterministic multistep solvers (ddim, dpmpp-2m, unipc, deis)"
        )
    base_at = plan.rows[0].level
    for i, row in enumerate(plan.rows):
        falls = row.level.noise_to_signal > row.next_level.noise_to_signal
        used = row.base_level if row.correct is not None else base_at
        assert used is not None and row.base_level is not None
        at_another_point = row.advance.base != 0.0 and used.noise_to_signal != row.level.noise_to_signal
        if not falls or at_another_point:
            raise DiffsampError(
                f"{method}: {name} is not a multistep solver (row {i} is a stage inside a step); "
                "accepted: solvers with one network call per step (ddim, dpmpp-2m, unipc, deis)"
            )
        base_at = row.base_level
