"""Store with round-to-nearest-even. Triton's interpreter truncates float32 to bfloat16, so it is done on bits there."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store(pointer, value, mask, INTERPRET: tl.constexpr):
    if INTERPRET and pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        odd = (bits >> 16) & 1
        value = ((bits + odd + 32767) & 4294901760).to(tl.float32, bitcast=True)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)
