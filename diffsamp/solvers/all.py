"""A whole calibrated table: noise levels, told times and every weight, found together for one model and one setting.

Not a formula but numbers: `diffsamp calibrate all` finds them, from the base solver. Without them it is the base.
The table visits levels of its own; the run must start at the same noise.

Order: none in the sense of many steps; a table belongs to its number of calls. The family is that of Shaul et al. 2024
(Bespoke Non-Stationary Solvers, arXiv:2403.01329, Section 3), trained there by back-propagation; the search is ours.

@inproceedings{shaul2024bespoke,
  title={Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models},
  author={Shaul, Neta and Singer, Uriel and Chen, Ricky T. Q. and Le, Matthew and Thabet, Ali and Pumarola, Albert and
    Lipman, Yaron},
  booktitle={International Conference on Machine Learning},
  year={2024}
}
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import DiffsampError
from ..plan import Plan
from ..registry import register_solver


@register_solver("all", transform=True, base="unipc")
def calibrated(plan: Plan, *, values: Sequence[float] | None = None) -> Plan:
    """A whole calibrated table in place of a base solver.

    Args:
        plan: the base on any grid; its process, number of calls and first level are used.
        values: n+1 ratios sigma/alpha, n told times and n(n+1)/2 weights, as an artifact of `diffsamp calibrate all`
            holds them. None: the base itself.

    Raises:
        DiffsampError: a table of another number of calls, or a run that starts at another noise level.

    Source: Shaul et al. 2024, arXiv:2403.01329, Section 3 (the family); the numbers are calibrated.

    @inproceedings{shaul2024bespoke,
      title={Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models},
      author={Shaul, Neta and Singer, Uriel and Chen, Ricky T. Q. and Le, Matthew and Thabet, Ali and Pumarola, Albert
        and Lipman, Yaron},
      booktitle={International Conference on Machine Learning},
      year={2024}
    }
    """
    if values is None:
        return plan
    from ..calibrate.table import unpack

    made = unpack(plan.process, plan.nfe, values)
    ours, given = made.first_level.noise_to_signal, plan.first_level.noise_to_signal
    if abs(ours - given) > 1e-6 * given and not (ours > 1e9 and given > 1e9):
        raise DiffsampError(
            f"values: the table starts at sigma/alpha {ours:.6g}, the run at {given:.6g}; both must start alike"
        )
    return made
