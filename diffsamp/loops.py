"""The loops of :mod:`diffsamp.fused`, compiled by numba at first use and kept on disk; imported where it is installed.

They take addresses of contiguous memory: making an array view of every register costs more than the arithmetic of a
small latent. ``kind`` is a zero of the element type; all arithmetic is in that type.

``convert_*`` writes the converted output and the next input, ``advance_*`` the next input alone, ``replace_*`` the
converted output over the last register: memory that was just read need not be fetched again to be written.
"""

# Numba compiles these bodies from the types of the arguments, so annotations would say nothing.
# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import numba
from numba.extending import intrinsic

compiled = numba.njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")


@intrinsic
def pointer(typing_context, address, kind):  # type: ignore[no-untyped-def]
    """The address as a pointer to elements of the type of ``kind``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.CPointer(kind)(address, kind), generate


@intrinsic
def cast(typing_context, value, kind):  # type: ignore[no-untyped-def]
    """A number in the type of ``kind``."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return context.cast(builder, arguments[0], signature.args[0], signature.return_type)

    return kind(value, kind), generate


@numba.njit(inline="always")
def at(address, size, kind):  # type: ignore[no-untyped-def]
    return numba.carray(pointer(address, kind), size)


@compiled
def convert_2(kind, n, px, pr, pa, pb, pm, py, p, q, u, v, wa, wb):  # type: ignore[no-untyped-def]
    x, raw, a, b = at(px, n, kind), at(pr, n, kind), at(pa, n, kind), at(pb, n, kind)
    m, y, p, q = at(pm, n, kind), at(py, n, kind), cast(p, kind), cast(q, kind)
    u, v, wa, wb = cast(u, kind), cast(v, kind), cast(wa, kind), cast(wb, kind)
    for i in range(n):
        m[i] = p * x[i] + q * raw[i]
        y[i] = u * x[i] + v * raw[i] + wa * a[i] + wb * b[i]


@compiled
def convert_4(kind, n, px, pr, pa, pb, pc, pd, pm, py, p, q, u, v, wa, wb, wc, wd):  # type: ignore[no-untyped-def]
    x, raw, a, b = at(px, n, kind), at(pr, n, kind), at(pa, n, kind), at(pb, n, kind)
    c, d, m, y = at(pc, n, kind), at(pd, n, kind), at(pm, n, kind), at(py, n, kind)
    p, q, u, v = cast(p, kind), cast(q, kind), cast(u, kind), cast(v, kind)
    wa, wb, wc, wd = cast(wa, kind), cast(wb, kind), cast(wc, kind), cast(wd, kind)
    for i in range(n):
        m[i] = p * x[i] + q * raw[i]
        y[i] = u * x[i] + v * raw[i] + wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i]


@compiled
def advance_2(kind, n, px, pr, pa, pb, py, u, v, wa, wb):  # type: ignore[no-untyped-def]
    x, raw, a, b, y = at(px, n, kind), at(pr, n, kind), at(pa, n, kind), at(pb, n, kind), at(py, n, kind)
    u, v, wa, wb = cast(u, kind), cast(v, kind), cast(wa, kind), cast(wb, kind)
    for i in range(n):
        y[i] = u * x[i] + v * raw[i] + wa * a[i] + wb * b[i]


@compiled
def advance_4(kind, n, px, pr, pa, pb, pc, pd, py, u, v, wa, wb, wc, wd):  # type: ignore[no-untyped-def]
    x, raw, a, b = at(px, n, kind), at(pr, n, kind), at(pa, n, kind), at(pb, n, kind)
    c, d, y, u, v = at(pc, n, kind), at(pd, n, kind), at(py, n, kind), cast(u, kind), cast(v, kind)
    wa, wb, wc, wd = cast(wa, kind), cast(wb, kind), cast(wc, kind), cast(wd, kind)
    for i in range(n):
        y[i] = u * x[i] + v * raw[i] + wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i]


@compiled
def replace_1(kind, n, px, pr, pa, py, p, q, u, v, wa):  # type: ignore[no-untyped-def]
    x, raw, a, y = at(px, n, kind), at(pr, n, kind), at(pa, n, kind), at(py, n, kind)
    p, q, u, v, wa = cast(p, kind), cast(q, kind), cast(u, kind), cast(v, kind), cast(wa, kind)
    for i in range(n):
        last = a[i]
        a[i] = p * x[i] + q * raw[i]
        y[i] = u * x[i] + v * raw[i] + wa * last


@compiled
def replace_2(kind, n, px, pr, pa, pb, py, p, q, u, v, wa, wb):  # type: ignore[no-untyped-def]
    x, raw, a, b, y = at(px, n, kind), at(pr, n, kind), at(pa, n, kind), at(pb, n, kind), at(py, n, kind)
    p, q, u, v, wa, wb = cast(p, kind), cast(q, kind), cast(u, kind), cast(v, kind), cast(wa, kind), cast(wb, kind)
    for i in range(n):
        last = b[i]
        b[i] = p * x[i] + q * raw[i]
        y[i] = u * x[i] + v * raw[i] + wa * a[i] + wb * last


@compiled
def replace_3(kind, n, px, pr, pa, pb, pc, py, p, q, u, v, wa, wb, wc):  # type: ignore[no-untyped-def]
    x, raw, a, b = at(px, n, kind), at(pr, n, kind), at(pa, n, kind), at(pb, n, kind)
    c, y, p, q = at(pc, n, kind), at(py, n, kind), cast(p, kind), cast(q, kind)
    u, v, wa, wb, wc = cast(u, kind), cast(v, kind), cast(wa, kind), cast(wb, kind), cast(wc, kind)
    for i in range(n):
        last = c[i]
        c[i] = p * x[i] + q * raw[i]
        y[i] = u * x[i] + v * raw[i] + wa * a[i] + wb * b[i] + wc * last
