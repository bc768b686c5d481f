"""The fused routines for NumPy on a CPU: the reference's mathematics, in blocks that fit the cache, over the pool.

Same names and arguments as in reference.py; what is not redefined here is taken from there."""

import numpy as np

from . import bfloat16, reference
from .blocks import BLOCK
from .blocks import by_rows as _by_rows
from .blocks import spread as _flat
from .memory import empty, empty_like
from .pool import pool
from .products import batched, product, run, run_pair, split_product
from .reference import *  # noqa: F403
from .threaded_attention import attention as attention
from .threaded_attention import attention_backward as attention_backward
from .threaded_block import *  # noqa: F403

# ---- linear ----------------------------------------------------------------------------------------------------------


def linear(xp, x, weight, bias):
    y = product(x, weight.T)
    if bias is not None:
        _by_rows(lambda i, j: np.add(y[i:j], bias, out=y[i:j]), len(y), y.shape[1])
    return y


def linear_backward(xp, x, weight, g, needs, into=None):
    """Gradients (dx, dweight, dbias) of linear, those that `needs` asks for. The two products run side by side."""
    dx = empty(x.shape, x.dtype) if needs[0] else None
    dw, add = (empty(weight.shape, weight.dtype) if needs[1] else None, False) if into is None else into
    db = reference.column_sum(np, g) if len(needs) > 2 and needs[2] else None
    if bfloat16.rounds(g, weight) and bfloat16.rounds(g.T, x):
        g = bfloat16.rounded(g)
        weight = weight if dx is None else bfloat16.rounded(weight)
        x = x if dw is None else bfloat16.rounded(x)
    first, second = (g, weight, dx, False), (g.T, x, dw, add)
    if dx is not None and dw is not None:
        run_pair(first, second)
    elif dx is not None:
        run(split_product(*first))
    elif dw is not None:
        run(split_product(*second))
    return dx, None if into else dw, db


def matmul(xp, a, b):
    return batched(a, b)


# ---- activations -----------------------------------------------------------------------------------------------------


def gelu(xp, x, approximate):
    return _flat(lambda v: reference._gelu(np, v, approximate), empty(x.shape, x.dtype), x)


def gelu_backward(xp, x, y, g, approximate):
    return _flat(lambda *a: reference._gelu_backward(np, *a, approximate), empty(x.shape, x.dtype), x, y, g)


def silu(xp, x):
    return _flat(lambda v: v * reference.sigmoid(np, v), empty(x.shape, x.dtype), x)


def silu_backward(xp, x, g):
    return _flat(lambda x, g: reference._silu_backward(np, x, g), empty(x.shape, x.dtype), x, g)


# ---- softmax, norms, loss: rows are independent ----------------------------------------------------------------------


def softmax(xp, x, dim):
    if dim != x.ndim - 1 or not x.flags.c_contiguous:
        return reference.softmax(xp, x, dim)
    return _along_rows(lambda x: reference.softmax(np, x, 1), x)


def log_softmax(xp, x, dim):
    if dim != x.ndim - 1 or not x.flags.c_contiguous:
        return reference.log_softmax(xp, x, dim)
    return _along_rows(lambda x: reference.log_softmax(np, x, 1), x)


def softmax_backward(xp, y, g, dim):
    if dim != y.ndim - 1 or not y.flags.c_contiguous or not g.flags.c_contiguous:
        return reference.softmax_backward(xp, y, g, dim)
    return _along_rows(lambda y, g: reference.softmax_backward(np, y, g, 1), y, g)


def log_softmax_backward(xp, y, g, dim):
    if dim != y.ndim - 1 or not y.flags.c_contiguous or not g.flags.c_contiguous:
        return reference.log_softmax_backward(xp, y, g, dim)
    return _along_rows(lambda y, g: reference.log_softmax_backward(np, y, g, 1), y, g)


def _along_rows(function, *arrays):
    """function(*arrays) of the arrays' rows along the last dimension, in blocks."""
    out = empty(arrays[0].shape, arrays[0].dtype)
    flat, target = [a.reshape(-1, a.shape[-1]) for a in arrays], out.reshape(-1, out.shape[-1])

    def block(i, j):
        target[i:j] = function(*(a[i:j] for a in flat))

    _by_rows(block, *target.shape)
    return out


def layer_norm(xp, x, weight, bias, eps):
    y, mean, rstd = empty(x.shape, x.dtype), np.empty((len(x), 1), x.dtype), np.empty((len(x), 1), x.dtype)

    def block(i, j):
        y[i:j], mean[i:j], rstd[i:j] = reference.layer_norm(np, x[i:j], weight, bias, eps)

    _by_rows(block, *x.shape)
    return y, mean, rstd


def add_layer_norm(xp, x, r, weight, bias, eps):
    y, total, mean, rstd = *(empty(x.shape, x.dtype) for _ in range(2)), *np.empty((2, len(x), 1), x.dtype)

    def block(i, j):
        part = np.add(x[i:j], r[i:j], out=total[i:j])
        y[i:j], mean[i:j], rstd[i:j] = reference.layer_norm(np, part, weight, bias, eps)

    _by_rows(block, *x.shape)
    return y, mean, rstd, total


def layer_norm_backward(xp, x, weight, mean, rstd, g, affine):
    return add_layer_norm_backward(xp, x, weight, mean, rstd, g, None, affine)


def add_layer_norm_backward(xp, x, weight, mean, rstd, g, gtotal, affine):
    dx, sums = empty(x.shape, x.dtype), []

    def block(i, j):
        dx[i:j], gw, gb = reference.layer_norm_backward(np, x[i:j], weight, mean[i:j], rstd[i:j], g[i:j], affine)
        if gtotal is not None:
            dx[i:j] += gtotal[i:j]
        sums.append((i, gw, gb))

    _by_rows(block, *x.shape)
    if not affine:
        return dx, None, None
    sums.sort(key=lambda s: s[0])  # the same order of additions whatever thread came first
    return dx, *(sum((s[k] for s in sums), np.zeros(x.shape[1], x.dtype)) for k in (1, 2))


def rms_norm(xp, x, weight, eps):
    y, rstd = empty(x.shape, x.dtype), np.empty((len(x), 1), x.dtype)

    def block(i, j):
        y[i:j], rstd[i:j] = reference.rms_norm(np, x[i:j], weight, eps)

    _by_rows(block, *x.shape)
    return y, rstd


def add_rms_norm(xp, x, r, weight, eps):
    y, total, rstd = *(empty(x.shape, x.dtype) for _ in range(2)), np.empty((len(x), 1), x.dtype)

    def block(i, j):
        part = np.add(x[i:j], r[i:j], out=total[i:j])
        y[i:j], rstd[i:j] = reference.rms_norm(np, part, weight, eps)

    _by_rows(block, *x.shape)
    return y, rstd, total


def rms_norm_backward(xp, x, weight, rstd, g, affine):
    return add_rms_norm_backward(xp, x, weight, rstd, g, None, affine)


def add_rms_norm_backward(xp, x, weight, rstd, g, gtotal, affine):
    dx, sums = empty(x.shape, x.dtype), []

    def block(i, j):
        dx[i:j], gw = reference.rms_norm_backward(np, x[i:j], weight, rstd[i:j], g[i:j], affine)
        if gtotal is not None:
            dx[i:j] += gtotal[i:j]
        sums.append((i, gw))

    _by_rows(block, *x.shape)
    sums.sort(key=lambda s: s[0])
    return dx, sum((s[1] for s in sums), np.zeros(x.shape[1], x.dtype)) if affine else None


def cross_entropy(xp, logits, target, ignore_index):
    n = len(target)
    loss, lse, counted = np.empty(n, logits.dtype), np.empty((n, 2), logits.dtype), np.empty(n, bool)

    def block(i, j):
        loss[i:j], lse[i:j], counted[i:j] = reference.cross_entropy(np, logits[i:j], target[i:j], ignore_index)

    _by_rows(block, *logits.shape)
    return loss, lse, counted


def cross_entropy_backward(xp, logits, target, lse, counted, g, out=None):
    dx = empty(logits.shape, logits.dtype) if out is None else out

    def block(i, j):
        part = (a[i:j] for a in (logits, target, lse, counted, g, dx))
        reference.cross_entropy_backward(np, *part)

    _by_rows(block, *logits.shape)
    return dx


# ---- dropout ---------------------------------------------------------------------------------------------------------


def dropout(device, x, p, identity):
    if x.size <= BLOCK // 4 or not x.flags.c_contiguous:
        return reference.dropout(device, x, p, identity)
    y, flat, scale = empty_like(x), x.reshape(-1), x.dtype.type(1 / (1 - p))
    out = y.reshape(-1)

    def part(start, stop):
        for i in range(start, stop, BLOCK):
            j = min(i + BLOCK, stop)
            np.multiply(flat[i:j], reference.dropout_mask(np, (j - i,), p, identity, i), out=out[i:j])
            out[i:j] *= scale

    pool().split(part, x.size, grain=BLOCK)
    return y


# ---- optimizer, gradient norm, sums of large arrays ------------------------------------------------------------------


def adamw(xp, p, grad, exp_avg, exp_avg_sq, **options):
    def part(start, stop):
        span = slice(start, stop)
        reference.adamw(np, p[span], grad[span], exp_avg[span], exp_avg_sq[span], **options)

    pool().split(part, p.size, grain=BLOCK, align=16)


def sum_of_squares(xp, x):
    totals = []

    def part(start, stop):
        totals.append((start, reference.sum_of_squares(np, x[start:stop])))

    pool().split(part, x.size, grain=2 * BLOCK, align=16)
    return sum(total for _, total in sorted(totals))


def scale(xp, x, factor):
    pool().split(lambda i, j: np.multiply(x[i:j], factor, out=x[i:j]), x.size, grain=2 * BLOCK, align=16)


def add(a, b, out=None):
    if a.size < 4 * BLOCK or a.shape != b.shape or not (a.flags.c_contiguous and b.flags.c_contiguous):
        return reference.add(a, b, out)
    out = empty(a.shape, np.result_type(a, b)) if out is None else out
    x, y, z = a.reshape(-1), b.reshape(-1), out.reshape(-1)
    pool().split(lambda i, j: np.add(x[i:j], y[i:j], out=z[i:j]), x.size, grain=2 * BLOCK, align=16)
    return out
