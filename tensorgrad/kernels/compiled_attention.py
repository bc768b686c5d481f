"""Causal and full attention for float32 on a CPU, compiled by Numba around BLAS products (extra `fast`).

Tiles of TILE queries see only the keys they may look at, so causal attention does half the work. Forward keeps the
output and two numbers per query, the largest score and the log of the sum of exponentials relative to it; backward
computes the probabilities again from these, so that no T x T matrix outlives a tile (Dao et al. 2022,
arXiv:2205.14135). One task is a batch element and a key head with all the query heads that share it; tasks are spread
over the pool and run without the GIL.
"""

import ctypes

import llvmlite.binding
import numpy as np
from numba import carray, types

from . import blas, threaded
from .compiled_math import F32, ONE, exp, exp_shifted, hash32, largest, njit_fast, pointer
from .memory import empty
from .pool import pool
from .reference import dropout_key

TILE = 64
_NO, _TRANS = 111, 112


def _bind():
    """Make BLAS's sgemm known to compiled code under a name of its own; None where there is no BLAS to bind."""
    function = blas._function("s")
    if function is None:
        return None
    llvmlite.binding.add_symbol("tensorgrad_cblas_sgemm", ctypes.cast(function, ctypes.c_void_p).value)
    integer, real, pointer = types.int64, types.float32, types.intp
    return types.ExternalFunction(
        "tensorgrad_cblas_sgemm",
        types.void(
            integer,
            integer,
            integer,
            integer,
            integer,
            integer,
            real,
            pointer,
            integer,
            pointer,
            integer,
            real,
            pointer,
            integer,
        ),
    )


_sgemm = _bind()


@njit_fast
def _drop(row, first, n, multiplier, offset, threshold, scale):
    """Dropout of row[:n], whose elements have the numbers first, first + 1, ...; see reference.dropout_mask."""
    for j in range(n):
        row[j] = row[j] * scale if hash32(first + j, multiplier, offset) >= threshold else F32(0)


@njit_fast
def _forward(start, stop, q, k, v, out, lse, strides, shape, causal, scale, drop, key, keep_scale):
    """q, k, v, out: addresses; strides (4, 3): of q, k, v, out over batch, head and row, in elements."""
    heads, groups, rows, columns, d, e = shape
    share = heads // groups
    scores = np.empty((TILE, columns), F32)
    for task in range(start, stop):
        b, group = task // groups, task % groups
        kp = k + 4 * (b * strides[1, 0] + group * strides[1, 1])
        vp = v + 4 * (b * strides[2, 0] + group * strides[2, 1])
        for h in range(group * share, (group + 1) * share):
            qp = q + 4 * (b * strides[0, 0] + h * strides[0, 1])
            op = out + 4 * (b * strides[3, 0] + h * strides[3, 1])
            for i in range(0, rows, TILE):
                n = min(TILE, rows - i)
                m = min(i + n, columns) if causal else columns
                _sgemm(
                    101,
                    _NO,
                    _TRANS,
                    n,
                    m,
                    d,
                    scale,
                    qp + 4 * i * strides[0, 2],
                    strides[0, 2],
                    kp,
                    strides[1, 2],
                    F32(0),
                    scores.ctypes.data,
                    columns,
                )
                for r in range(n):
                    row = scores[r]
                    last = min(i + r + 1, columns) if causal else columns
                    top = largest(row[:last])
                    total = F32(0)
                    for j in range(last):
                        x = exp(row[j] - top)
                        row[j] = x
                        total += x
                    inverse = ONE / total
                    for j in range(last):
                        row[j] *= inverse
                    for j in range(last, m):
                        row[j] = F32(0)
                    lse[b, h, i + r, 0], lse[b, h, i + r, 1] = top, np.log(total)
                    if drop:
                        _drop(row, ((b * heads + h) * rows + i + r) * columns, last, key[0], key[1], key[2], keep_scale)
                _sgemm(
                    101,
                    _NO,
                    _NO,
                    n,
                    e,
                    m,
                    ONE,
                    scores.ctypes.data,
                    columns,
                    vp,
                    strides[2, 2],
                    F32(0),
                    op + 4 * i * strides[3, 2],
                    strides[3, 2],
                )


@njit_fast
def _backward(start, stop, q, k, v, out, g, dq, dk, dv, lse, strides, shape, causal, scale, drop, key, keep_scale):
    """strides (8, 3): of q, k, v, out, g, dq, dk, dv."""
    heads, groups, rows, columns, d, e = shape
    share = heads // groups
    p, ds = np.empty((TILE, columns), F32), np.empty((TILE, columns), F32)
    for task in range(start, stop):
        b, group = task // groups, task % groups
        kp = k + 4 * (b * strides[1, 0] + group * strides[1, 1])
        vp = v + 4 * (b * strides[2, 0] + group * strides[2, 1])
        dkp = dk + 4 * (b * strides[6, 0] + group * strides[6, 1])
        dvp = dv + 4 * (b * strides[7, 0] + group * strides[7, 1])
        beta = F32(0)  # the first tile covers all keys and overwrites, the others add
        for h in range(group * share, (group + 1) * share):
            qp = q + 4 * (b * strides[0, 0] + h * strides[0, 1])
            dqp = dq + 4 * (b * strides[5, 0] + h * strides[5, 1])
            op = out + 4 * (b * strides[3, 0] + h * strides[3, 1])
            gp = g + 4 * (b * strides[4, 0] + h * strides[4, 1])
            tiles = (rows + TILE - 1) // TILE
            for t in range(tiles):
                i = (tiles - 1 - t) * TILE
                n = min(TILE, rows - i)
                m = min(i + n, columns) if causal and t > 0 else columns
                _sgemm(
                    101,
                    _NO,
                    _TRANS,
                    n,
                    m,
                    d,
                    scale,
                    qp + 4 * i * strides[0, 2],
                    strides[0, 2],
                    kp,
                    strides[1, 2],
                    F32(0),
                    p.ctypes.data,
                    columns,
                )
                _sgemm(
                    101,
                    _NO,
                    _TRANS,
                    n,
                    m,
                    e,
                    ONE,
                    gp + 4 * i * strides[4, 2],
                    strides[4, 2],
                    vp,
                    strides[2, 2],
                    F32(0),
                    ds.ctypes.data,
                    columns,
                )
                for r in range(n):
                    row, grow = p[r], ds[r]
                    last = min(i + r + 1, columns) if causal else columns
                    top, rest = lse[b, h, i + r, 0], lse[b, h, i + r, 1]
                    o = carray(pointer(op + 4 * (i + r) * strides[3, 2]), e)
                    do = carray(pointer(gp + 4 * (i + r) * strides[4, 2]), e)
                    delta = F32(0)  # sum(dP P) = sum(dO O)
                    for j in range(e):
                        delta += o[j] * do[j]
                    first = ((b * heads + h) * rows + i + r) * columns
                    if drop:
                        _drop(grow, first, last, key[0], key[1], key[2], keep_scale)
                    for j in range(last):
                        x = exp_shifted(row[j], top, rest)
                        row[j] = x
                        grow[j] = x * (grow[j] - delta) * scale
                    for j in range(last, m):
                        row[j] = F32(0)
                        grow[j] = F32(0)
                    if drop:
                        _drop(row, first, last, key[0], key[1], key[2], keep_scale)
                _sgemm(
                    101,
                    _NO,
                    _NO,
                    n,
                    d,
                    m,
                    ONE,
                    ds.ctypes.data,
                    columns,
                    kp,
                    strides[1, 2],
                    F32(0),
                    dqp + 4 * i * strides[5, 2],
                    strides[5, 2],
                )
                _sgemm(
                    101,
                    _TRANS,
                    _NO,
                    m,
                    d,
                    n,
                    ONE,
                    ds.ctypes.data,
                    columns,
                    qp + 4 * i * strides[0, 2],
                    strides[0, 2],
                    beta,
                    dkp,
                    strides[6, 2],
                )
                _sgemm(
                    101,
                    _TRANS,
                    _NO,
                    m,
                    e,
                    n,
                    ONE,
                    p.ctypes.data,
                    columns,
                    gp + 4 * i * strides[4, 2],
                    strides[4, 2],
                    beta,
                    dvp,
                    strides[7, 2],
                )
                beta = ONE


def _readable(*arrays):
    """float32 arrays whose last dimension is contiguous and whose rows BLAS can step over."""
    return all(
        a.dtype == F32
        and a.ndim == 4
        and a.strides[3] == 4
        and a.strides[2] >= 4 * a.shape[3]
        and all(s % 4 == 0 for s in a.strides)
        for a in arrays
    )


def usable(q, k, v, mask):
    return _sgemm is not None and mask is None and min(q.size, k.size, v.size) > 0 and _readable(q, k, v)


def _strides(*arrays):
    return np.array([[s // 4 for s in a.strides[:3]] for a in arrays], np.int64)


def _options(q, k, v, scale, p, identity):
    shape = (q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    drop = identity is not None
    key = dropout_key(p, identity) if drop else (np.uint32(0),) * 3
    return shape, F32(scale), drop, key, F32(1 / (1 - p))


def attention(device, q, k, v, mask, causal, scale, p, identity):
    if not usable(q, k, v, mask):
        return threaded.attention(device, q, k, v, mask, causal, scale, p, identity)
    shape, scale, drop, key, keep_scale = _options(q, k, v, scale, p, identity)
    batch, heads, rows = q.shape[:3]
    out = empty((batch, rows, heads, v.shape[3]), F32).transpose(0, 2, 1, 3)  # heads side by side in memory
    lse = empty((batch, heads, rows, 2), F32)
    pool().split(
        _forward,
        batch * k.shape[1],
        *(a.ctypes.data for a in (q, k, v, out)),
        lse,
        _strides(q, k, v, out),
        shape,
        causal,
        scale,
        drop,
        key,
        keep_scale,
    )
    return out, (out, lse)


def attention_backward(device, q, k, v, kept, causal, scale, p, identity, g):
    if len(kept) == 1:
        return threaded.attention_backward(device, q, k, v, kept, causal, scale, p, identity, g)
    out, lse = kept
    if not _readable(g):
        g = np.ascontiguousarray(g)
    shape, scale, drop, key, keep_scale = _options(q, k, v, scale, p, identity)
    dq, dk, dv = gradients_like(q, k, v)
    arrays = (q, k, v, out, g, dq, dk, dv)
    pool().split(
        _backward,
        q.shape[0] * k.shape[1],
        *(a.ctypes.data for a in arrays),
        lse,
        _strides(*arrays),
        shape,
        causal,
        scale,
        drop,
        key,
        keep_scale,
    )
    return dq, dk, dv


def gradients_like(q, k, v):
    """Arrays for the gradients of q, k, v; where these lie side by side in the rows of one packed projection
    (B, T, (H + 2 G) d), so do the gradients, and the projection's backward needs no copy."""
    (batch, heads, rows, d), groups = q.shape, k.shape[1]
    width = (heads + 2 * groups) * d
    if (
        q.strides == k.strides == v.strides == (4 * rows * width, 4 * d, 4 * width, 4)
        and v.shape[3] == d
        and k.ctypes.data - q.ctypes.data == 4 * heads * d
        and v.ctypes.data - k.ctypes.data == 4 * groups * d
    ):
        packed = empty((batch, rows, heads + 2 * groups, d), F32).transpose(0, 2, 1, 3)
        return packed[:, :heads], packed[:, heads : heads + groups], packed[:, heads + groups :]
    return tuple(
        empty((*a.shape[:1], a.shape[2], a.shape[1], a.shape[3]), F32).transpose(0, 2, 1, 3) for a in (q, k, v)
    )
