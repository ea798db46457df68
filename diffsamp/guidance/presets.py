"""Settings of adaptive projected guidance that are on record, by model family, each with its source.

    sdxl          r = 15, beta = -0.5, eta = 0     diffusers pull request 9626, quoting the paper's Table 10
    edm2          r = 2.5, eta = 0                 pull request 1 of the ComfyUI-APG node: "from 2.5 in EDM2-XL to 15 in
                                                   SDXL"; its momentum is not on record, so none is set
    infinitetalk  r = 55, beta = -0.75             defaults in the InfiniteTalk code base; eta as recommended (0)
    sdxl-rms      r = 15 at 4x128x128 as rms       15/sqrt(4·128·128); the same strength at any latent size

The paper's rows for DiT, Stable Diffusion 2.1 and 3 are not on record here, so there is no preset for them: start from
``sdxl-rms``, which does not depend on the size of the latent.
"""

from __future__ import annotations

import math

from ..errors import DiffsampError
from .apg import APG

PRESETS: dict[str, APG] = {
    "sdxl": APG(eta=0.0, norm=15.0, momentum=-0.5),
    "sdxl-rms": APG(eta=0.0, norm=15.0 / math.sqrt(4 * 128 * 128), momentum=-0.5, norm_kind="rms"),
    "edm2": APG(eta=0.0, norm=2.5, momentum=0.0),
    "infinitetalk": APG(eta=0.0, norm=55.0, momentum=-0.75),
}


def preset(family: str, guidance_scale: float | None = None) -> APG:
    """The recorded setting of a model family, with a scale (which none of the sources fixes)."""
    if family not in PRESETS:
        raise DiffsampError(f"preset: {family!r} is not known; accepted: {', '.join(sorted(PRESETS))}")
    found = PRESETS[family]
    return found if guidance_scale is None else found.with_scale(guidance_scale)
