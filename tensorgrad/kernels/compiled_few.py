"""Products of few rows with a weight of any width, compiled by Numba (extra `fast`): bound by reading the weights,
which therefore happens once and in the width in which they are stored.

BLAS packs the weight before it multiplies, which pays off from some 16 rows on; below, four dot products at a time are
faster. Weights are float32, uint16 (bits of bfloat16), int16 (bits of float16) or int8; see packed.py.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import compiled
from .compiled_math import F32, njit_fast
from .packed import FEW
from .pool import pool

TILE = 16  # rows of the weight that stay in the cache while several rows of x meet them
WIDENED = 4  # rows of int8 that are widened at a time: they stay in the first-level cache
COLUMNS = 512  # results that stay in the cache while rows of a turned weight are added to them
GRAIN = 1 << 16  # elements of the weight from which a second thread pays off


@intrinsic
def wide(typingctx, value):
    """The float32 of a stored number."""

    def codegen(context, builder, signature, args):
        (stored,), kind = args, signature.args[0]
        if kind == types.float32:
            return stored
        if kind == types.uint16:
            word = ir.IntType(32)
            return builder.bitcast(builder.shl(builder.zext(stored, word), ir.Constant(word, 16)), ir.FloatType())
        if kind == types.int16:
            return builder.fpext(builder.bitcast(stored, ir.HalfType()), ir.FloatType())
        return builder.sitofp(stored, ir.FloatType())

    return types.float32(value), codegen


@njit_fast
def _four_by_one(r0, r1, r2, r3, x):
    """The dot products of four rows of the weight with x."""
    a, b, c, d = F32(0), F32(0), F32(0), F32(0)
    for j in range(x.size):
        v = x[j]
        a += wide(r0[j]) * v
        b += wide(r1[j]) * v
        c += wide(r2[j]) * v
        d += wide(r3[j]) * v
    return a, b, c, d


@njit_fast
def _two_by_four(r, s, x0, x1, x2, x3):
    """The dot products of two rows of the weight with four rows of x."""
    a, b, c, d, e, f, g, h = F32(0), F32(0), F32(0), F32(0), F32(0), F32(0), F32(0), F32(0)
    for j in range(x0.size):
        t, u = wide(r[j]), wide(s[j])
        a += t * x0[j]
        b += t * x1[j]
        c += t * x2[j]
        d += t * x3[j]
        e += u * x0[j]
        f += u * x1[j]
        g += u * x2[j]
        h += u * x3[j]
    return a, b, c, d, e, f, g, h


@njit_fast
def _widen(w, scale, out):
    """out[i] = w[i] times the scale of each group: int8 rows as float32, in the cache."""
    groups = scale.shape[1]
    size = w.shape[1] // groups
    for i in range(w.shape[0]):
        for group in range(groups):
            k, factor = group * size, scale[i, group]
            source, target = w[i, k : k + size], out[i, k : k + size]
            for j in range(size):
                target[j] = wide(source[j]) * factor


@njit_fast
def _tile(tile, x, first, y):
    """y[:, first : first + len(tile)] = x @ tile^T, for a few rows of the weight, which stay in the cache."""
    rows, n = tile.shape[0], x.shape[0]
    whole = n // 4 * 4
    for m in range(0, whole, 4):
        for i in range(0, rows, 2):
            p = min(i + 1, rows - 1)  # an odd last row is its own partner
            a, b, c, d, e, f, g, h = _two_by_four(tile[i], tile[p], x[m], x[m + 1], x[m + 2], x[m + 3])
            y[m, first + i], y[m + 1, first + i], y[m + 2, first + i], y[m + 3, first + i] = a, b, c, d
            y[m, first + p], y[m + 1, first + p], y[m + 2, first + p], y[m + 3, first + p] = e, f, g, h
    for m in range(whole, n):
        for i in range(0, rows, 4):
            p, q, r = min(i + 1, rows - 1), min(i + 2, rows - 1), min(i + 3, rows - 1)
            a, b, c, d = _four_by_one(tile[i], tile[p], tile[q], tile[r], x[m])
            y[m, first + i], y[m, first + p], y[m, first + q], y[m, first + r] = a, b, c, d


@njit_fast
def few(start, stop, x, w, y):
    """y[:, start:stop] = x @ w[start:stop]^T."""
    for first in range(start, stop, TILE):
        _tile(w[first : min(first + TILE, stop)], x, first, y)


@njit_fast
def few_int8(start, stop, x, w, scale, y):
    """The same for int8 rows with their scales."""
    widened = np.empty((WIDENED, x.shape[1]), F32)
    for first in range(start, stop, WIDENED):
        last = min(first + WIDENED, stop)
        tile = widened[: last - first]
        _widen(w[first:last], scale[first:last], tile)
        _tile(tile, x, first, y)


@njit_fast
def few_turned(start, stop, x, w, y):
    """The same for a weight that lies in memory as (in, out), as in GPT-2's files; w is that matrix."""
    n, k = x.shape
    for first in range(start, stop, COLUMNS):
        last = min(first + COLUMNS, stop)
        for m in range(n):
            y[m, first:last] = F32(0)
        for j in range(0, k // 4 * 4, 4):
            a, b, c, d = w[j, first:last], w[j + 1, first:last], w[j + 2, first:last], w[j + 3, first:last]
            for m in range(n):
                p, q, r, s, out = x[m, j], x[m, j + 1], x[m, j + 2], x[m, j + 3], y[m, first:last]
                for i in range(out.size):
                    out[i] += wide(a[i]) * p + wide(b[i]) * q + wide(c[i]) * r + wide(d[i]) * s
        for j in range(k // 4 * 4, k):
            a = w[j, first:last]
            for m in range(n):
                p, out = x[m, j], y[m, first:last]
                for i in range(out.size):
                    out[i] += wide(a[i]) * p


def stored(weight):
    """The weight as the kernels take it: bits of float16 as int16, which tells them from those of bfloat16."""
    return weight.view(np.int16) if weight.dtype == np.float16 else weight


def few_rows(x, weight, scale, bias):
    """x (n, in) @ weight (out, in)^T + bias (out) -> (n, out), float32, for a weight in C order, or without scale in
    Fortran's."""
    x, y = np.ascontiguousarray(x), np.empty((len(x), len(weight)), F32)
    kernel, arrays = (few, (stored(weight),)) if scale is None else (few_int8, (weight, scale))
    if not weight.flags.c_contiguous:
        kernel, arrays = few_turned, (stored(weight).T,)
    pool().split(kernel, len(weight), x, *arrays, y, grain=max(1, GRAIN // x.shape[1]), align=TILE)
    if bias is not None:
        y += bias
    return y


def linear(xp, x, weight, bias):
    """As reference.linear; few rows of float32 as above."""
    if 0 < len(x) <= FEW and weight.size >= GRAIN and weight.flags.forc and x.dtype == weight.dtype == F32:
        return few_rows(x, weight, None, bias)
    return compiled.linear(xp, x, weight, bias)
