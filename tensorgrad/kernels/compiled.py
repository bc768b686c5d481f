"""The fused routines for float32 on a CPU, compiled by Numba (extra `fast`): one pass over the memory each, vectorised,
without the GIL, rows spread over the pool. Same names and arguments as in reference.py; what is not redefined here, and
other dtypes, layouts and small arrays, are taken from threaded.py.
"""

import math

import numpy as np

from . import reference, threaded
from .compiled_math import F32, HALF, INV_SQRT_2PI, ONE, TWO, exp, hash32, logistic, njit_fast, normal_tail
from .memory import empty_like
from .pool import pool
from .reference import dropout_key
from .threaded import *  # noqa: F403

_TANH_A, _TANH_B = F32(math.sqrt(2 / math.pi)), F32(0.044715 * math.sqrt(2 / math.pi))


# ---- activations: x, g and the result are flat -----------------------------------------------------------------------
# Loops start at 0, over slices: an index that might be negative (and count from the end) turns loads into gathers.


@njit_fast
def _gelu(start, stop, x, y):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):
        v = x[i]
        q = normal_tail(v, exp(v * v * -HALF))
        y[i] = v * (ONE - q if v > 0 else q)


@njit_fast
def _gelu_backward(start, stop, x, g, dx):
    x, g, dx = x[start:stop], g[start:stop], dx[start:stop]
    for i in range(x.size):
        v = x[i]
        e = exp(v * v * -HALF)
        q = normal_tail(v, e)
        dx[i] = g[i] * ((ONE - q if v > 0 else q) + v * e * INV_SQRT_2PI)


@njit_fast
def _gelu_tanh(start, stop, x, y):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):  # (1 + tanh u) / 2 = sigmoid(2 u)
        v = x[i]
        y[i] = v / (ONE + exp(-TWO * v * (_TANH_A + _TANH_B * v * v)))


@njit_fast
def _gelu_tanh_backward(start, stop, x, g, dx):
    x, g, dx = x[start:stop], g[start:stop], dx[start:stop]
    for i in range(x.size):
        v = x[i]
        s, slope = logistic(exp(-TWO * v * (_TANH_A + _TANH_B * v * v)))
        dx[i] = g[i] * (s + slope * (v * TWO * (_TANH_A + F32(3) * _TANH_B * v * v)))


@njit_fast
def _silu(start, stop, x, y):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):
        y[i] = x[i] / (ONE + exp(-x[i]))


@njit_fast
def _silu_backward(start, stop, x, g, dx):
    x, g, dx = x[start:stop], g[start:stop], dx[start:stop]
    for i in range(x.size):
        s, slope = logistic(exp(-x[i]))
        dx[i] = g[i] * (s + x[i] * slope)


SMALL = 1 << 12  # elements below which NumPy's overhead and ours are alike


def usable(*arrays):
    """Do the compiled kernels take these arrays? (float32, C order, not tiny)"""
    return arrays[0].size >= SMALL and all(a.dtype == np.float32 and a.flags.c_contiguous for a in arrays)


def _flat(kernel, *arrays):
    """Run a flat kernel over the pool; the last array is the result."""
    flat = [a.reshape(-1) for a in arrays]
    pool().split(kernel, flat[0].size, *flat, grain=1 << 15, lead=1 << 15, align=16)
    return arrays[-1]


def gelu(xp, x, approximate):
    if not usable(x):
        return threaded.gelu(xp, x, approximate)
    return _flat(_gelu_tanh if approximate == "tanh" else _gelu, x, empty_like(x))


def gelu_backward(xp, x, y, g, approximate):
    if not usable(x, g):
        return threaded.gelu_backward(xp, x, y, g, approximate)
    return _flat(_gelu_tanh_backward if approximate == "tanh" else _gelu_backward, x, g, empty_like(x))


def silu(xp, x):
    return _flat(_silu, x, empty_like(x)) if usable(x) else threaded.silu(xp, x)


def silu_backward(xp, x, g):
    return _flat(_silu_backward, x, g, empty_like(x)) if usable(x, g) else threaded.silu_backward(xp, x, g)


# ---- norms: x (n, width) ---------------------------------------------------------------------------------------------


@njit_fast
def _layer_norm(start, stop, x, weight, bias, eps, y, mean, rstd):
    width = x.shape[1]
    for i in range(start, stop):
        row, out = x[i], y[i]
        total = F32(0)
        for j in range(width):
            total += row[j]
        m = total / F32(width)
        total = F32(0)
        for j in range(width):
            d = row[j] - m
            total += d * d
        r = ONE / np.sqrt(total / F32(width) + eps)
        for j in range(width):
            out[j] = (row[j] - m) * r * weight[j] + bias[j]
        mean[i, 0], rstd[i, 0] = m, r


@njit_fast
def _add_layer_norm(start, stop, x, r, weight, bias, eps, total, y, mean, rstd):
    for i in range(start, stop):
        a, b, out = x[i], r[i], total[i]
        for j in range(a.size):
            out[j] = a[j] + b[j]
        _layer_norm(i, i + 1, total, weight, bias, eps, y, mean, rstd)


@njit_fast
def _layer_norm_backward(start, stop, x, weight, mean, rstd, g, gtotal, add, dx, dweight, dbias, parts):
    """`add`: add gtotal to dx."""
    width = x.shape[1]
    dw, db = np.zeros(width, F32), np.zeros(width, F32)
    for i in range(start, stop):
        row, grad, out = x[i], g[i], dx[i]
        m, r = mean[i, 0], rstd[i, 0]
        first, second = F32(0), F32(0)
        for j in range(width):
            xhat = (row[j] - m) * r
            h = grad[j] * weight[j]
            dw[j] += grad[j] * xhat
            db[j] += grad[j]
            first += h
            second += h * xhat
        first /= F32(width)
        second /= F32(width)
        for j in range(width):
            xhat = (row[j] - m) * r
            out[j] = (grad[j] * weight[j] - first - xhat * second) * r
        if add:
            more = gtotal[i]
            for j in range(width):
                out[j] += more[j]
    part = start * parts // x.shape[0]  # which of the `parts`, all alike, this is: it has a row of its own
    dweight[part], dbias[part] = dw, db


def layer_norm(xp, x, weight, bias, eps):
    if not usable(x):
        return threaded.layer_norm(xp, x, weight, bias, eps)
    weight, bias = _affine(x, weight, bias)
    y, mean, rstd = empty_like(x), np.empty((len(x), 1), F32), np.empty((len(x), 1), F32)
    _rows(_layer_norm, x, weight, bias, F32(eps), y, mean, rstd)
    return y, mean, rstd


def add_layer_norm(xp, x, r, weight, bias, eps):
    if not usable(x, r):
        return threaded.add_layer_norm(xp, x, r, weight, bias, eps)
    weight, bias = _affine(x, weight, bias)
    y, total, mean, rstd = empty_like(x), empty_like(x), np.empty((len(x), 1), F32), np.empty((len(x), 1), F32)
    _rows(_add_layer_norm, x, r, weight, bias, F32(eps), total, y, mean, rstd)
    return y, mean, rstd, total


def layer_norm_backward(xp, x, weight, mean, rstd, g, affine):
    return add_layer_norm_backward(xp, x, weight, mean, rstd, g, None, affine)


def add_layer_norm_backward(xp, x, weight, mean, rstd, g, gtotal, affine):
    add = gtotal is not None
    if not usable(x, g) or (add and not usable(gtotal)):
        return threaded.add_layer_norm_backward(xp, x, weight, mean, rstd, g, gtotal, affine)
    weight, _ = _affine(x, weight, None)
    dx = empty_like(x)
    sums = _row_sums(_layer_norm_backward, 2, x, weight, mean, rstd, g, gtotal if add else g, add, dx)
    return (dx, *sums) if affine else (dx, None, None)


def _row_sums(kernel, count, x, *arrays):
    """Run a kernel that also adds up rows, into a row of `count` tables per thread; the tables' sums."""
    parts = pool().parts(len(x), _grain(x))
    tables = np.zeros((count, parts, x.shape[1]), F32)
    pool().split(kernel, len(x), x, *arrays, *tables, parts, grain=_grain(x))  # equal parts, without a lead
    return [table.sum(0) for table in tables]


@njit_fast
def _rms_norm(start, stop, x, weight, eps, y, rstd):
    width = x.shape[1]
    for i in range(start, stop):
        row, out = x[i], y[i]
        total = F32(0)
        for j in range(width):
            total += row[j] * row[j]
        r = ONE / np.sqrt(total / F32(width) + eps)
        for j in range(width):
            out[j] = row[j] * r * weight[j]
        rstd[i, 0] = r


@njit_fast
def _add_rms_norm(start, stop, x, r, weight, eps, total, y, rstd):
    for i in range(start, stop):
        a, b, out = x[i], r[i], total[i]
        for j in range(a.size):
            out[j] = a[j] + b[j]
        _rms_norm(i, i + 1, total, weight, eps, y, rstd)


@njit_fast
def _rms_norm_backward(start, stop, x, weight, rstd, g, gtotal, add, dx, dweight, parts):
    """`add`: add gtotal to dx."""
    width = x.shape[1]
    dw = np.zeros(width, F32)
    for i in range(start, stop):
        row, grad, out = x[i], g[i], dx[i]
        r = rstd[i, 0]
        along = F32(0)
        for j in range(width):
            xhat = row[j] * r
            dw[j] += grad[j] * xhat
            along += grad[j] * weight[j] * xhat
        along /= F32(width)
        for j in range(width):
            out[j] = (grad[j] * weight[j] - row[j] * r * along) * r
        if add:
            more = gtotal[i]
            for j in range(width):
                out[j] += more[j]
    dweight[start * parts // x.shape[0]] = dw


def rms_norm(xp, x, weight, eps):
    if not usable(x):
        return threaded.rms_norm(xp, x, weight, eps)
    y, rstd = empty_like(x), np.empty((len(x), 1), F32)
    _rows(_rms_norm, x, _affine(x, weight, None)[0], F32(eps), y, rstd)
    return y, rstd


def add_rms_norm(xp, x, r, weight, eps):
    if not usable(x, r):
        return threaded.add_rms_norm(xp, x, r, weight, eps)
    y, total, rstd = empty_like(x), empty_like(x), np.empty((len(x), 1), F32)
    _rows(_add_rms_norm, x, r, _affine(x, weight, None)[0], F32(eps), total, y, rstd)
    return y, rstd, total


def rms_norm_backward(xp, x, weight, rstd, g, affine):
    return add_rms_norm_backward(xp, x, weight, rstd, g, None, affine)


def add_rms_norm_backward(xp, x, weight, rstd, g, gtotal, affine):
    add = gtotal is not None
    if not usable(x, g) or (add and not usable(gtotal)):
        return threaded.add_rms_norm_backward(xp, x, weight, rstd, g, gtotal, affine)
    dx, weight = empty_like(x), _affine(x, weight, None)[0]
    (dw,) = _row_sums(_rms_norm_backward, 1, x, weight, rstd, g, gtotal if add else g, add, dx)
    return dx, dw if affine else None


def _affine(x, weight, bias):
    """The weight and bias, ones and zeros where absent."""
    width = x.shape[1]
    return (
        np.ones(width, F32) if weight is None else np.ascontiguousarray(weight),
        np.zeros(width, F32) if bias is None else np.ascontiguousarray(bias),
    )


def _rows(kernel, x, *arrays):
    pool().split(kernel, len(x), x, *arrays, grain=_grain(x), lead=_grain(x))


def _grain(x):
    return max(1, (1 << 16) // x.shape[1])


# ---- embedding -------------------------------------------------------------------------------------------------------


@njit_fast
def _embedding_backward(start, stop, ids, g, out):
    for i in range(ids.shape[0]):  # every thread takes all rows, but its own columns: no two write one place
        source, target = g[i, start:stop], out[ids[i], start:stop]
        for j in range(source.size):
            target[j] += source[j]


def embedding_backward(device, ids, g, rows, into=None):
    if not usable(g) or ids.dtype != np.int64:
        return threaded.embedding_backward(device, ids, g, rows, into)
    out = reference.table(np, rows, g.shape[1], F32, into)
    grain = max(16, (1 << 17) // len(ids))
    pool().split(_embedding_backward, g.shape[1], np.ascontiguousarray(ids), g, out, grain=grain, align=16)
    return out


# ---- dropout ---------------------------------------------------------------------------------------------------------


@njit_fast
def _dropout(start, stop, x, y, multiplier, offset, threshold, scale):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):
        y[i] = x[i] * scale if hash32(start + i, multiplier, offset) >= threshold else F32(0)


def dropout(device, x, p, identity):
    if not usable(x):
        return threaded.dropout(device, x, p, identity)
    y = empty_like(x)
    multiplier, offset, threshold = dropout_key(p, identity)
    pool().split(
        _dropout,
        x.size,
        x.reshape(-1),
        y.reshape(-1),
        multiplier,
        offset,
        threshold,
        F32(1 / (1 - p)),
        grain=1 << 15,
        lead=1 << 15,
        align=16,
    )
    return y


# ---- optimizer -------------------------------------------------------------------------------------------------------


@njit_fast
def _adamw(start, stop, p, grad, m, v, decay, beta1, beta2, rate, correction, eps, scale):
    p, grad, m, v = p[start:stop], grad[start:stop], m[start:stop], v[start:stop]
    for i in range(p.size):
        g = grad[i] * scale
        a = m[i] + (ONE - beta1) * (g - m[i])
        b = beta2 * v[i] + (ONE - beta2) * g * g
        m[i], v[i] = a, b
        p[i] = p[i] * decay - rate * a / (np.sqrt(b) * correction + eps)


def adamw(xp, p, grad, m, v, **options):
    if not usable(p, grad, m, v):
        threaded.adamw(xp, p, grad, m, v, **options)
        return
    lr, betas, step = options["lr"], options["betas"], options["step"]
    numbers = (1 - lr * options["weight_decay"], *betas, lr / (1 - betas[0] ** step))
    numbers += (1 / math.sqrt(1 - betas[1] ** step), options["eps"], options.get("grad_scale", 1))
    pool().split(_adamw, p.size, p, grad, m, v, *map(F32, numbers), grain=1 << 15, lead=1 << 15, align=16)
