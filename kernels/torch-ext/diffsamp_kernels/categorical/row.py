"""How the kernels of the draw read a row: guidance, mask class, top-k and top-p, temperature."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_raw(c_ptr, u_ptr, params, offset, at, V: tl.constexpr, MASK_ID: tl.constexpr, CFG: tl.constexpr):
    """Guided logits before the temperature, float32; minus infinity outside the row and at the mask class."""
    ok = at < V
    y = tl.load(c_ptr + offset + at, mask=ok, other=float("-inf")).to(tl.float32)
    if CFG:
        u = tl.load(u_ptr + offset + at, mask=ok, other=float("-inf")).to(tl.float32)
        zero = (u == float("-inf")) | (y == float("-inf"))
        y = tl.where(zero, y, y + tl.load(params + 1).to(tl.float32) * (y - tl.where(zero, 0.0, u)))
    if MASK_ID >= 0:
        y = tl.where(at == MASK_ID, float("-inf"), y)
    return y


@triton.jit
def ordered(y, DROP: tl.constexpr):
    """Unsigned integers in the order of the floats, without the ``DROP`` lowest bits."""
    bits = tl.where(y == 0.0, 0.0, y).to(tl.uint32, bitcast=True)  # minus zero is zero
    key = tl.where(bits >= 2147483648, bits ^ 4294967295, bits | 2147483648)
    return key >> DROP


@triton.jit
def keep_allowed(y, at, cut_ptr, r, DROP: tl.constexpr):
    """Minus infinity for what lies under the row's threshold, or on it behind the last class that is kept."""
    key = ordered(y, DROP)
    threshold = tl.load(cut_ptr + 2 * r).to(tl.uint32)
    last = tl.load(cut_ptr + 2 * r + 1)
    return tl.where((key > threshold) | ((key == threshold) & (at <= last)), y, float("-inf"))


@triton.jit
def load_tile(
    c_ptr, u_ptr, params, cut_ptr, r, offset, at,
    V: tl.constexpr, MASK_ID: tl.constexpr, CFG: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Logits times log2(e)/temperature; ``CUT`` is 0, or 1 more than the number of dropped bits."""
    y = load_raw(c_ptr, u_ptr, params, offset, at, V, MASK_ID, CFG)
    if CUT > 0:
        y = keep_allowed(y, at, cut_ptr, r, CUT - 1)
    return y * tl.load(params).to(tl.float32)
