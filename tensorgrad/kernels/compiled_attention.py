"""Causal and full attention for float32 on a CPU, compiled by Numba (extra `fast`).

Queries see only the keys they may look at, four queries and WIDTH keys at a time, so causal attention does half the
work. Forward keeps the output and two numbers per query, the largest score and the log of the sum of exponentials
relative to it; backward computes the probabilities again from these, so that no T x T matrix outlives a tile of TILE
queries (Dao et al. 2022, arXiv:2205.14135). One task is a batch element and a key head with all the query heads that
share it; tasks are spread over the pool and run without the GIL.
"""

import numpy as np
from numba import carray

from . import threaded
from .compiled_math import F32, ONE, exp, exp_shifted, hash32, largest, njit_fast, pointer
from .compiled_tile import ROWS, WIDTH, pack, pack_transposed, room, tile
from .memory import empty
from .pool import pool
from .reference import dropout_key

TILE = 64
FEW = 8  # queries below which putting the keys in panels costs more than it saves


@njit_fast
def _drop(row, first, n, multiplier, offset, threshold, scale):
    """Dropout of row[:n], whose elements have the numbers first, first + 1, ...; see reference.dropout_mask."""
    for j in range(n):
        row[j] = row[j] * scale if hash32(first + j, multiplier, offset) >= threshold else F32(0)


@njit_fast
def _multiply(k, a, row, rows, step, panels, columns, c, c_row, scale, add):
    """ROWS rows of `columns` columns at c, `c_row` bytes apart: scale * A @ B, or += with `add`. A (ROWS, k): its first
    row at a, rows `row` bytes apart, of which only `rows` may be there (the last stands for the others), a row's
    numbers `step` bytes apart. B (k, columns) in `panels`: (the address of its first row in the first panel, rows of a
    panel, k or more)."""
    first, height = panels
    a1, a2, a3 = a + min(1, rows - 1) * row, a + min(2, rows - 1) * row, a + min(3, rows - 1) * row
    for j in range(0, columns, WIDTH):
        to = c + 4 * j
        tile(k, a, a1, a2, a3, step, first + 4 * j * height, to, to + c_row, to + 2 * c_row, to + 3 * c_row, scale, add)


@njit_fast
def _copy(source, step, rows, columns, target, target_step):
    """Rows of `columns` numbers from one address to another, steps in bytes."""
    for i in range(rows):
        row, out = carray(pointer(source + i * step), columns), carray(pointer(target + i * target_step), columns)
        for j in range(columns):
            out[j] = row[j]


@njit_fast
def _forward(start, stop, q, k, v, out, lse, strides, shape, causal, scale, drop, key, keep_scale):
    """q, k, v, out: addresses; strides (4, 3): of q, k, v, out over batch, head and row, in bytes."""
    heads, groups, rows, columns, d, e = shape
    share = heads // groups
    keys, values = np.empty(room(columns, d), F32), np.empty(room(e, columns), F32)  # (d, columns), (columns, e)
    scores, result = np.empty((ROWS, room(columns, 1)), F32), np.empty((ROWS, room(e, 1)), F32)
    s, s_row, y, y_row = scores.ctypes.data, scores.strides[0], result.ctypes.data, result.strides[0]
    for task in range(start, stop):
        b, group = task // groups, task % groups
        pack_transposed(k + b * strides[1, 0] + group * strides[1, 1], strides[1, 2], columns, d, keys)
        pack(v + b * strides[2, 0] + group * strides[2, 1], strides[2, 2], columns, e, values)
        for h in range(group * share, (group + 1) * share):
            for i in range(0, rows, ROWS):
                n = min(ROWS, rows - i)
                seen = min(i + ROWS, columns) if causal else columns  # by the last of these queries
                queries = q + b * strides[0, 0] + h * strides[0, 1] + i * strides[0, 2]
                _multiply(d, queries, strides[0, 2], n, 4, (keys.ctypes.data, d), seen, s, s_row, scale, False)
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
                    for j in range(last, seen):
                        row[j] = F32(0)
                    lse[b, h, i + r, 0], lse[b, h, i + r, 1] = top, np.log(total)
                    if drop:
                        _drop(row, ((b * heads + h) * rows + i + r) * columns, last, key[0], key[1], key[2], keep_scale)
                _multiply(seen, s, s_row, n, 4, (values.ctypes.data, columns), e, y, y_row, ONE, False)
                target = out + b * strides[3, 0] + h * strides[3, 1] + i * strides[3, 2]
                _copy(y, y_row, n, e, target, strides[3, 2])


@njit_fast
def _backward(start, stop, q, k, v, out, g, dq, dk, dv, lse, strides, shape, causal, scale, drop, key, keep_scale):
    """strides (8, 3): of q, k, v, out, g, dq, dk, dv."""
    heads, groups, rows, columns, d, e = shape
    share = heads // groups
    keys, keys_by_row = np.empty(room(columns, d), F32), np.empty(room(d, columns), F32)  # (d, columns), (columns, d)
    values = np.empty(room(columns, e), F32)  # (e, columns)
    queries, gradients = np.empty(room(d, TILE), F32), np.empty(room(e, TILE), F32)  # (TILE, d), (TILE, e)
    across = room(columns, 1) + WIDTH  # rows a power of two apart would all fall on the same lines of the cache
    p, ds = np.empty((TILE, across), F32), np.empty((TILE, across), F32)
    dkeys, dvalues = np.empty((columns + ROWS, room(d, 1)), F32), np.empty((columns + ROWS, room(e, 1)), F32)
    result = np.empty((ROWS, room(d, 1)), F32)
    width = p.strides[0]
    for task in range(start, stop):
        b, group = task // groups, task % groups
        kp, vp = k + b * strides[1, 0] + group * strides[1, 1], v + b * strides[2, 0] + group * strides[2, 1]
        pack_transposed(kp, strides[1, 2], columns, d, keys)
        pack_transposed(vp, strides[2, 2], columns, e, values)
        pack(kp, strides[1, 2], columns, d, keys_by_row)
        dkeys[:], dvalues[:] = F32(0), F32(0)
        for h in range(group * share, (group + 1) * share):
            for i in range(0, rows, TILE):
                n = min(TILE, rows - i)
                qp = q + b * strides[0, 0] + h * strides[0, 1] + i * strides[0, 2]
                op = out + b * strides[3, 0] + h * strides[3, 1] + i * strides[3, 2]
                gp = g + b * strides[4, 0] + h * strides[4, 1] + i * strides[4, 2]
                dqp = dq + b * strides[5, 0] + h * strides[5, 1] + i * strides[5, 2]
                pack(qp, strides[0, 2], n, d, queries)
                pack(gp, strides[4, 2], n, e, gradients)
                for r in range(0, n, ROWS):
                    m = min(ROWS, n - r)
                    seen = min(i + r + ROWS, columns) if causal else columns
                    pp, dsp = p.ctypes.data + r * width, ds.ctypes.data + r * width
                    _multiply(d, qp + r * strides[0, 2], strides[0, 2], m, 4, (keys.ctypes.data, d), seen, pp, width,
                              scale, False)
                    _multiply(e, gp + r * strides[4, 2], strides[4, 2], m, 4, (values.ctypes.data, e), seen, dsp, width,
                              ONE, False)
                    for x in range(r, r + m):
                        row, grow = p[x], ds[x]
                        last = min(i + x + 1, columns) if causal else columns
                        top, rest = lse[b, h, i + x, 0], lse[b, h, i + x, 1]
                        o, do = carray(pointer(op + x * strides[3, 2]), e), carray(pointer(gp + x * strides[4, 2]), e)
                        delta = F32(0)  # sum(dP P) = sum(dO O)
                        for j in range(e):
                            delta += o[j] * do[j]
                        first = ((b * heads + h) * rows + i + x) * columns
                        if drop:
                            _drop(grow, first, last, key[0], key[1], key[2], keep_scale)
                        for j in range(last):
                            y = exp_shifted(row[j], top, rest)
                            row[j] = y
                            grow[j] = y * (grow[j] - delta) * scale
                        for j in range(last, seen):
                            row[j] = F32(0)
                            grow[j] = F32(0)
                        if drop:
                            _drop(row, first, last, key[0], key[1], key[2], keep_scale)
                    _multiply(seen, dsp, width, m, 4, (keys_by_row.ctypes.data, columns), d, result.ctypes.data,
                              result.strides[0], ONE, False)
                    _copy(result.ctypes.data, result.strides[0], m, d, dqp + r * strides[5, 2], strides[5, 2])
                for j in range(0, min(i + n, columns) if causal else columns, ROWS):
                    r = max(0, j - i) // ROWS * ROWS if causal else 0  # the first query that sees one of these keys
                    skip = 4 * r * WIDTH
                    _multiply(n - r, p.ctypes.data + r * width + 4 * j, 4, ROWS, width,
                              (gradients.ctypes.data + skip, n), e, dvalues[j].ctypes.data, dvalues.strides[0], ONE,
                              True)
                    _multiply(n - r, ds.ctypes.data + r * width + 4 * j, 4, ROWS, width,
                              (queries.ctypes.data + skip, n), d, dkeys[j].ctypes.data, dkeys.strides[0], ONE, True)
        _copy(dkeys.ctypes.data, dkeys.strides[0], columns, d, dk + b * strides[6, 0] + group * strides[6, 1],
              strides[6, 2])
        _copy(dvalues.ctypes.data, dvalues.strides[0], columns, e, dv + b * strides[7, 0] + group * strides[7, 1],
              strides[7, 2])


def _readable(*arrays):
    """float32 arrays whose last dimension is contiguous?"""
    return all(a.dtype == F32 and a.ndim == 4 and a.strides[3] == 4 for a in arrays)


def usable(q, k, v, mask):
    return mask is None and min(q.size, k.size, v.size) > 0 and q.shape[2] >= FEW and _readable(q, k, v)


def _strides(*arrays):
    return np.array([a.strides[:3] for a in arrays], np.int64)


def _common(q, k, v, causal, scale, p, identity):
    """What both kernels take after addresses, `lse` and strides."""
    drop = identity is not None
    key = dropout_key(p, identity) if drop else (np.uint32(0),) * 3
    return _shape(q, k, v), causal, F32(scale), drop, key, F32(1 / (1 - p))


def _shape(q, k, v):
    return q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]


def forward_arguments(q, k, v, out, lse, causal, scale, p, identity):
    """What `_forward` takes after start and stop."""
    arrays = (q, k, v, out)
    return *(a.ctypes.data for a in arrays), lse, _strides(*arrays), *_common(q, k, v, causal, scale, p, identity)


def backward_arguments(q, k, v, out, g, dq, dk, dv, lse, causal, scale, p, identity):
    """What `_backward` takes after start and stop."""
    arrays = (q, k, v, out, g, dq, dk, dv)
    return *(a.ctypes.data for a in arrays), lse, _strides(*arrays), *_common(q, k, v, causal, scale, p, identity)


def attention(device, q, k, v, mask, causal, scale, p, identity):
    if not usable(q, k, v, mask):
        return threaded.attention(device, q, k, v, mask, causal, scale, p, identity)
    batch, heads, rows = q.shape[:3]
    out = empty((batch, rows, heads, v.shape[3]), F32).transpose(0, 2, 1, 3)  # heads side by side in memory
    lse = empty((batch, heads, rows, 2), F32)
    arguments = forward_arguments(q, k, v, out, lse, causal, scale, p, identity)
    pool().split(_forward, batch * k.shape[1], *arguments, lead=_lead(_shape(q, k, v)))
    return out, (out, lse)


def attention_backward(device, q, k, v, kept, causal, scale, p, identity, g):
    if len(kept) == 1:
        return threaded.attention_backward(device, q, k, v, kept, causal, scale, p, identity, g)
    out, lse = kept
    if not _readable(g):
        g = np.ascontiguousarray(g)
    gradients = gradients_like(q, k, v)
    arguments = backward_arguments(q, k, v, out, g, *gradients, lse, causal, scale, p, identity)
    pool().split(_backward, q.shape[0] * k.shape[1], *arguments, lead=_lead(_shape(q, k, v)))
    return gradients


def _lead(shape):
    """Tasks that take as long as waking a thread; most often none."""
    heads, groups, rows, columns, d, _ = shape
    return (1 << 17) // (heads // groups * rows * columns * d)


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
