"""Cascade polynomial regression: ratios for unseen (NFE, guidance scale), linear in their coefficients.

    rho_i = Σ_{k≤3, a≤2, b≤2} C[k, a, b]·x^k·g^a·n^b,   n = NFE/50, g = guidance scale/12, x = (i + 1)/NFE

for the interior steps. A cubic cannot follow "about 1, then a jump at the last step", so the last ratio is a polynomial
of its own in (NFE, guidance scale). Outside the fitted domain the ratios explode; it is refused.

Source: Zhao et al. 2024, arXiv:2409.03755, Section 3.4; the separate last ratio is this project's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DiffsampError


def _powers(nfe: float, scale: float) -> np.ndarray:
    n, g = nfe / 50, scale / 12
    return np.array([g**a * n**b for a in (2, 1, 0) for b in (2, 1, 0)])


@dataclass(frozen=True)
class Cascade:
    """Fitted coefficients.

    Attributes:
        interior: shape (4, 3, 3): power of x (rising), power of g (falling), power of n (falling).
        last: shape (3, 3) for the last ratio, or None to use the interior's there (the published form).
        nfe, guidance_scale: the fitted domain, inclusive.
    """

    interior: np.ndarray
    last: np.ndarray | None
    nfe: tuple[int, int]
    guidance_scale: tuple[float, float]

    @classmethod
    def published(cls, coefficients: Sequence[float] | np.ndarray) -> Cascade:
        """From the 36 coefficients that the authors publish for a model, in their order (float64).

        They explode outside 5 to 20 calls and guidance 1 to 12, so that is the domain. One model's coefficients do not
        fit another's.
        """
        flat = np.asarray(coefficients, dtype=np.float64).reshape(-1)
        if flat.size != 36 or not np.isfinite(flat).all():
            raise DiffsampError(f"coefficients: got {flat.size} numbers; accepted: 36 finite ones")
        return cls(flat.reshape(4, 3, 3), None, (5, 20), (1.0, 12.0))

    def ratios(self, nfe: int, guidance_scale: float, *, outside: str = "raise") -> tuple[float, ...]:
        """Ratios for a setting; the first two are 1.

        Args:
            outside: ``"raise"``, or ``"ones"`` to warn and return ones outside the fitted domain.
        """
        if outside not in ("raise", "ones"):
            raise DiffsampError(f"outside: got {outside!r}; accepted: raise, ones")
        inside = (
            self.nfe[0] <= nfe <= self.nfe[1] and self.guidance_scale[0] <= guidance_scale <= self.guidance_scale[1]
        )
        if not inside:
            message = (
                f"nfe, guidance_scale: got {nfe}, {guidance_scale:g}; the regression holds for NFE {self.nfe[0]} to "
                f"{self.nfe[1]} and guidance scale {self.guidance_scale[0]:g} to {self.guidance_scale[1]:g}"
            )
            if outside == "raise":
                raise DiffsampError(message)
            warnings.warn(f"{message}; using ratio 1", stacklevel=2)
            return (1.0,) * nfe
        powers = _powers(nfe, guidance_scale)
        c = self.interior.reshape(4, 9) @ powers
        values = [1.0 if i < 2 else float(sum(c[k] * ((i + 1) / nfe) ** k for k in range(4))) for i in range(nfe)]
        if self.last is not None:
            values[-1] = float(self.last.reshape(9) @ powers)
        return tuple(values)


def fit_cascade(table: Mapping[tuple[int, float], Sequence[float]], *, separate_last: bool = True) -> Cascade:
    """Least squares through searched ratios: ``table[(nfe, guidance scale)] = ratios``.

    Raises:
        DiffsampError: fewer than 2 values of NFE.
    """
    if len({n for n, _ in table}) < 2:
        raise DiffsampError(f"table: holds {len({n for n, _ in table})} value(s) of NFE; a regression needs at least 2")
    left, right, left_last, right_last = [], [], [], []
    for (nfe, scale), ratios in table.items():
        powers = _powers(nfe, scale)
        for i in range(2, nfe - 1 if separate_last else nfe):
            left.append(np.concatenate([((i + 1) / nfe) ** k * powers for k in range(4)]))
            right.append(ratios[i])
        left_last.append(powers)
        right_last.append(ratios[-1])
    interior = np.linalg.lstsq(np.array(left), np.array(right), rcond=1e-13)[0].reshape(4, 3, 3)
    last = np.linalg.lstsq(np.array(left_last), np.array(right_last), rcond=1e-13)[0].reshape(3, 3)
    nfes, scales = [n for n, _ in table], [g for _, g in table]
    return Cascade(
        interior, last if separate_last else None, (min(nfes), max(nfes)), (float(min(scales)), float(max(scales)))
    )
