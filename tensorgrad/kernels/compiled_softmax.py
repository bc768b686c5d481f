"""Softmax, its logarithm and cross-entropy for float32 on a CPU, compiled by Numba; a row is read while in the cache.

The kernels are for finite numbers: each looks for others on the way and raises a flag; threaded.py then does it over.
"""

import numpy as np

from . import threaded
from .compiled import _rows, usable
from .compiled_math import (
    F32,
    NOT_FINITE,
    ONE,
    exp,
    exp_shifted,
    from_ordered,
    magnitude,
    njit_fast,
    ordered,
    shifted,
)
from .memory import empty_like

__all__ = [
    "cross_entropy",
    "cross_entropy_backward",
    "log_softmax",
    "log_softmax_backward",
    "softmax",
    "softmax_backward",
]


@njit_fast
def _largest(row, flag):
    """The largest of the row; flag[0] becomes 1 where a number is not finite."""
    top, worst = ordered(row[0]), np.int32(0)
    for j in range(row.size):
        top, worst = max(top, ordered(row[j])), max(worst, magnitude(row[j]))
    if worst >= NOT_FINITE:
        flag[0] = 1
    return from_ordered(np.int32(top))


@njit_fast
def _softmax(start, stop, x, y, flag):
    for i in range(start, stop):
        row, out = x[i], y[i]
        top, total = _largest(row, flag), F32(0)
        for j in range(row.size):
            e = exp(row[j] - top)
            out[j] = e
            total += e
        scale = ONE / total
        for j in range(row.size):
            out[j] *= scale


@njit_fast
def _softmax_backward(start, stop, y, g, dx):
    for i in range(start, stop):
        row, grad, out = y[i], g[i], dx[i]
        along = F32(0)
        for j in range(row.size):
            along += row[j] * grad[j]
        for j in range(row.size):
            out[j] = row[j] * (grad[j] - along)


@njit_fast
def _log_of_sum(row, top):
    """log(sum(exp(row - top)))."""
    total = F32(0)
    for j in range(row.size):
        total += exp(row[j] - top)
    return np.log(total)


@njit_fast
def _log_softmax(start, stop, x, y, flag):
    for i in range(start, stop):
        row, out = x[i], y[i]
        top = _largest(row, flag)
        rest = _log_of_sum(row, top)
        for j in range(row.size):
            out[j] = shifted(row[j], top, rest)


@njit_fast
def _log_softmax_backward(start, stop, y, g, dx, flag):
    for i in range(start, stop):
        row, grad, out = y[i], g[i], dx[i]
        _largest(row, flag)
        total = F32(0)
        for j in range(row.size):
            total += grad[j]
        for j in range(row.size):
            out[j] = grad[j] - exp(row[j]) * total


@njit_fast
def _log_sum_exp(start, stop, x, lse, flag):
    for i in range(start, stop):
        top = _largest(x[i], flag)
        lse[i, 0], lse[i, 1] = top, _log_of_sum(x[i], top)


@njit_fast
def _cross_entropy_backward(start, stop, x, target, lse, counted, g, dx):
    for i in range(start, stop):
        row, out = x[i], dx[i]
        if not counted[i]:
            out[:] = F32(0)
            continue
        s, top, rest = g[i], lse[i, 0], lse[i, 1]
        for j in range(row.size):
            out[j] = exp_shifted(row[j], top, rest) * s
        out[target[i]] -= s


@njit_fast
def _cross_entropy_in_place(start, stop, x, target, lse, counted, g):
    """The same over the logits: with one array, LLVM need not allow for two that overlap."""
    for i in range(start, stop):
        row = x[i]
        if not counted[i]:
            row[:] = F32(0)
            continue
        s, top, rest = g[i], lse[i, 0], lse[i, 1]
        for j in range(row.size):
            row[j] = exp_shifted(row[j], top, rest) * s
        row[target[i]] -= s


def _run(kernel, *arrays):
    """Run a kernel on the rows of C-ordered arrays along their last dimension, the last array being the result; None
    where it met numbers that are not finite."""
    flag = np.zeros(1, np.int8)
    _rows(kernel, *(a.reshape(-1, a.shape[-1]) for a in arrays), flag)
    return None if flag[0] else arrays[-1]


def _last(dim, *arrays):
    return dim == arrays[0].ndim - 1 and usable(*arrays)


def softmax(xp, x, dim):
    y = _run(_softmax, x, empty_like(x)) if _last(dim, x) else None
    return threaded.softmax(xp, x, dim) if y is None else y


def softmax_backward(xp, y, g, dim):
    if not _last(dim, y, g):
        return threaded.softmax_backward(xp, y, g, dim)
    dx = empty_like(y)
    _rows(_softmax_backward, *(a.reshape(-1, a.shape[-1]) for a in (y, g, dx)))
    return dx


def log_softmax(xp, x, dim):
    y = _run(_log_softmax, x, empty_like(x)) if _last(dim, x) else None
    return threaded.log_softmax(xp, x, dim) if y is None else y


def log_softmax_backward(xp, y, g, dim):
    dx = _run(_log_softmax_backward, y, g, empty_like(y)) if _last(dim, y, g) else None
    return threaded.log_softmax_backward(xp, y, g, dim) if dx is None else dx


def cross_entropy(xp, logits, target, ignore_index):
    lse = np.empty((len(logits), 2), F32)
    if not usable(logits) or _run(_log_sum_exp, logits, lse) is None:
        return threaded.cross_entropy(xp, logits, target, ignore_index)
    counted = target != ignore_index
    picked = logits[np.arange(len(target)), np.where(counted, target, 0)]
    return np.where(counted, (lse[:, 0] - picked) + lse[:, 1], F32(0)), lse, counted


def cross_entropy_backward(xp, logits, target, lse, counted, g, out=None):
    if not usable(logits) or target.dtype != np.int64 or not np.isfinite(lse).all():
        return threaded.cross_entropy_backward(xp, logits, target, lse, counted, g, out)
    arrays = logits, np.ascontiguousarray(target), lse, counted, np.ascontiguousarray(g)
    if out is logits:
        _rows(_cross_entropy_in_place, *arrays)
        return out
    dx = empty_like(logits) if out is None else out
    _rows(_cross_entropy_backward, *arrays, dx)
    return dx
