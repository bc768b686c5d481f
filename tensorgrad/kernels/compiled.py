"""The fused routines for float32 on a CPU, compiled by Numba (extra `fast`): one pass over the memory each, vectorised,
without the GIL, rows spread over the pool. Same names and arguments as in reference.py; what is not redefined here, and
other dtypes, layouts and small arrays, are taken from threaded.py.

exp is a polynomial (2^n times a power series of the rest), because a call of the C library's does not vectorise; erf
comes from erf.py's coefficients.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from . import threaded
from .erf import _erfc_scaled
from .pool import pool
from .reference import dropout_key
from .threaded import *  # noqa: F403

EXACT = {"contract", "nsz", "arcp"}  # no reordering: exp splits a constant in two on purpose
njit_fast = njit(nogil=True, cache=True, fastmath=True, error_model="numpy")  # a check for x / 0 would stop vectorising
njit_exact = njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")

_F = np.float32
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = (
    _F(c)
    for c in np.polynomial.Chebyshev.interpolate(np.exp, 6, [-0.3466, 0.3466])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)
_P = tuple(_F(c) for c in _erfc_scaled(9, 0.0))
_LOG2E, _LN2_HIGH, _LN2_LOW = _F(1.44269504), _F(0.693359375), _F(-2.12194440e-4)
_HALF, _ONE, _TWO = _F(0.5), _F(1), _F(2)
_SQRT_HALF, _INV_SQRT_2PI = _F(math.sqrt(0.5)), _F(1 / math.sqrt(2 * math.pi))
_TANH_A, _TANH_B = _F(math.sqrt(2 / math.pi)), _F(0.044715 * math.sqrt(2 / math.pi))


@intrinsic
def _float_of_bits(typingctx, bits):
    """The float32 with these 32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@njit_exact
def _exp(x):
    """exp of a float32, to 2 units in the last place; below -87 it is 0 to float32's precision."""
    x = min(max(x, _F(-87.0)), _F(88.0))
    n = np.floor(x * _LOG2E + _HALF)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = _E0 + r * (_E1 + r * (_E2 + r * (_E3 + r * (_E4 + r * (_E5 + r * _E6)))))
    return p * _float_of_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))


@njit_exact
def _exp_shifted(x, top, rest):
    """exp(x - top - rest), in this order: top is large and rest would drown in it."""
    return _exp((x - top) - rest)


@njit_exact
def _logistic(e):
    """s = 1 / (1 + e) and its slope s (1 - s) = (e s) s, in this order: 1 - s loses digits, e s s might overflow."""
    s = _ONE / (_ONE + e)
    return s, (e * s) * s


@njit_exact
def _tail(x, e):
    """1 - Phi(|x|) from x and e = exp(-x^2 / 2)."""
    t = _TWO / (_TWO + abs(x) * _SQRT_HALF)
    f = _P[0]
    f = f * t + _P[1]
    f = f * t + _P[2]
    f = f * t + _P[3]
    f = f * t + _P[4]
    f = f * t + _P[5]
    f = f * t + _P[6]
    f = f * t + _P[7]
    f = f * t + _P[8]
    f = f * t + _P[9]
    return e * f * _HALF


# ---- activations: x, g and the result are flat -----------------------------------------------------------------------
# Loops start at 0, over slices: an index that might be negative (and count from the end) turns loads into gathers.


@njit_fast
def _gelu(start, stop, x, y):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):
        v = x[i]
        q = _tail(v, _exp(v * v * -_HALF))
        y[i] = v * (_ONE - q if v > 0 else q)


@njit_fast
def _gelu_backward(start, stop, x, g, dx):
    x, g, dx = x[start:stop], g[start:stop], dx[start:stop]
    for i in range(x.size):
        v = x[i]
        e = _exp(v * v * -_HALF)
        q = _tail(v, e)
        dx[i] = g[i] * ((_ONE - q if v > 0 else q) + v * e * _INV_SQRT_2PI)


@njit_fast
def _gelu_tanh(start, stop, x, y):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):  # (1 + tanh u) / 2 = sigmoid(2 u)
        v = x[i]
        y[i] = v / (_ONE + _exp(-_TWO * v * (_TANH_A + _TANH_B * v * v)))


@njit_fast
def _gelu_tanh_backward(start, stop, x, g, dx):
    x, g, dx = x[start:stop], g[start:stop], dx[start:stop]
    for i in range(x.size):
        v = x[i]
        s, slope = _logistic(_exp(-_TWO * v * (_TANH_A + _TANH_B * v * v)))
        dx[i] = g[i] * (s + slope * (v * _TWO * (_TANH_A + _F(3) * _TANH_B * v * v)))


@njit_fast
def _silu(start, stop, x, y):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):
        y[i] = x[i] / (_ONE + _exp(-x[i]))


@njit_fast
def _silu_backward(start, stop, x, g, dx):
    x, g, dx = x[start:stop], g[start:stop], dx[start:stop]
    for i in range(x.size):
        s, slope = _logistic(_exp(-x[i]))
        dx[i] = g[i] * (s + x[i] * slope)


SMALL = 1 << 12  # elements below which NumPy's overhead and ours are alike


def usable(*arrays):
    """Do the compiled kernels take these arrays? (float32, C order, not tiny)"""
    return arrays[0].size >= SMALL and all(a.dtype == np.float32 and a.flags.c_contiguous for a in arrays)


def _flat(kernel, *arrays):
    """Run a flat kernel over the pool; the last array is the result."""
    flat = [a.reshape(-1) for a in arrays]
    pool().split(kernel, flat[0].size, *flat, grain=1 << 14, align=16)
    return arrays[-1]


def gelu(xp, x, approximate):
    if not usable(x):
        return threaded.gelu(xp, x, approximate)
    return _flat(_gelu_tanh if approximate == "tanh" else _gelu, x, np.empty_like(x))


def gelu_backward(xp, x, y, g, approximate):
    if not usable(x, g):
        return threaded.gelu_backward(xp, x, y, g, approximate)
    return _flat(_gelu_tanh_backward if approximate == "tanh" else _gelu_backward, x, g, np.empty_like(x))


def silu(xp, x):
    return _flat(_silu, x, np.empty_like(x)) if usable(x) else threaded.silu(xp, x)


def silu_backward(xp, x, g):
    return _flat(_silu_backward, x, g, np.empty_like(x)) if usable(x, g) else threaded.silu_backward(xp, x, g)


# ---- norms: x (n, width) ---------------------------------------------------------------------------------------------


@njit_fast
def _layer_norm(start, stop, x, weight, bias, eps, y, mean, rstd):
    width = x.shape[1]
    for i in range(start, stop):
        row, out = x[i], y[i]
        total = _F(0)
        for j in range(width):
            total += row[j]
        m = total / _F(width)
        total = _F(0)
        for j in range(width):
            d = row[j] - m
            total += d * d
        r = _ONE / np.sqrt(total / _F(width) + eps)
        for j in range(width):
            out[j] = (row[j] - m) * r * weight[j] + bias[j]
        mean[i, 0], rstd[i, 0] = m, r


@njit_fast
def _layer_norm_backward(start, stop, x, weight, mean, rstd, g, dx, dweight, dbias, parts):
    width = x.shape[1]
    dw, db = np.zeros(width, _F), np.zeros(width, _F)
    for i in range(start, stop):
        row, grad, out = x[i], g[i], dx[i]
        m, r = mean[i, 0], rstd[i, 0]
        first, second = _F(0), _F(0)
        for j in range(width):
            xhat = (row[j] - m) * r
            h = grad[j] * weight[j]
            dw[j] += grad[j] * xhat
            db[j] += grad[j]
            first += h
            second += h * xhat
        first /= _F(width)
        second /= _F(width)
        for j in range(width):
            xhat = (row[j] - m) * r
            out[j] = (grad[j] * weight[j] - first - xhat * second) * r
    part = start * parts // x.shape[0]  # which of the `parts` this is: it has a row of its own
    dweight[part], dbias[part] = dw, db


def layer_norm(xp, x, weight, bias, eps):
    if not usable(x):
        return threaded.layer_norm(xp, x, weight, bias, eps)
    weight, bias = _affine(x, weight, bias)
    y, mean, rstd = np.empty_like(x), np.empty((len(x), 1), _F), np.empty((len(x), 1), _F)
    _rows(_layer_norm, x, weight, bias, _F(eps), y, mean, rstd)
    return y, mean, rstd


def layer_norm_backward(xp, x, weight, mean, rstd, g, affine):
    if not usable(x, g):
        return threaded.layer_norm_backward(xp, x, weight, mean, rstd, g, affine)
    weight, _ = _affine(x, weight, None)
    dx = np.empty_like(x)
    sums = _row_sums(_layer_norm_backward, 2, x, weight, mean, rstd, g, dx)
    return (dx, *sums) if affine else (dx, None, None)


def _row_sums(kernel, count, x, *arrays):
    """Run a kernel that also adds up rows, into a row of `count` tables per thread; the tables' sums."""
    parts = pool().parts(len(x), _grain(x))
    tables = np.zeros((count, parts, x.shape[1]), _F)
    _rows(kernel, x, *arrays, *tables, parts)
    return [table.sum(0) for table in tables]


@njit_fast
def _rms_norm(start, stop, x, weight, eps, y, rstd):
    width = x.shape[1]
    for i in range(start, stop):
        row, out = x[i], y[i]
        total = _F(0)
        for j in range(width):
            total += row[j] * row[j]
        r = _ONE / np.sqrt(total / _F(width) + eps)
        for j in range(width):
            out[j] = row[j] * r * weight[j]
        rstd[i, 0] = r


@njit_fast
def _rms_norm_backward(start, stop, x, weight, rstd, g, dx, dweight, parts):
    width = x.shape[1]
    dw = np.zeros(width, _F)
    for i in range(start, stop):
        row, grad, out = x[i], g[i], dx[i]
        r = rstd[i, 0]
        along = _F(0)
        for j in range(width):
            xhat = row[j] * r
            dw[j] += grad[j] * xhat
            along += grad[j] * weight[j] * xhat
        along /= _F(width)
        for j in range(width):
            out[j] = (grad[j] * weight[j] - row[j] * r * along) * r
    dweight[start * parts // x.shape[0]] = dw


def rms_norm(xp, x, weight, eps):
    if not usable(x):
        return threaded.rms_norm(xp, x, weight, eps)
    y, rstd = np.empty_like(x), np.empty((len(x), 1), _F)
    _rows(_rms_norm, x, _affine(x, weight, None)[0], _F(eps), y, rstd)
    return y, rstd


def rms_norm_backward(xp, x, weight, rstd, g, affine):
    if not usable(x, g):
        return threaded.rms_norm_backward(xp, x, weight, rstd, g, affine)
    dx = np.empty_like(x)
    (dw,) = _row_sums(_rms_norm_backward, 1, x, _affine(x, weight, None)[0], rstd, g, dx)
    return dx, dw if affine else None


def _affine(x, weight, bias):
    """The weight and bias, ones and zeros where absent."""
    width = x.shape[1]
    return (
        np.ones(width, _F) if weight is None else np.ascontiguousarray(weight),
        np.zeros(width, _F) if bias is None else np.ascontiguousarray(bias),
    )


def _rows(kernel, x, *arrays):
    pool().split(kernel, len(x), x, *arrays, grain=_grain(x))


def _grain(x):
    return max(1, (1 << 14) // x.shape[1])


# ---- softmax and loss ------------------------------------------------------------------------------------------------


@njit_fast
def _softmax(start, stop, x, y):
    width = x.shape[1]
    for i in range(start, stop):
        row, out = x[i], y[i]
        top = row[0]
        for j in range(width):
            top = max(top, row[j])
        total = _F(0)
        for j in range(width):
            e = _exp(row[j] - top)
            out[j] = e
            total += e
        scale = _ONE / total
        for j in range(width):
            out[j] *= scale


@njit_fast
def _log_sum_exp(start, stop, x, lse):
    width = x.shape[1]
    for i in range(start, stop):
        row = x[i]
        top = row[0]
        for j in range(width):
            top = max(top, row[j])
        total = _F(0)
        for j in range(width):
            total += _exp(row[j] - top)
        lse[i, 0], lse[i, 1] = top, np.log(total)


@njit_fast
def _cross_entropy_backward(start, stop, x, target, lse, counted, g, dx):
    width = x.shape[1]
    for i in range(start, stop):
        row, out = x[i], dx[i]
        if not counted[i]:
            for j in range(width):
                out[j] = _F(0)
            continue
        s, top, rest = g[i], lse[i, 0], lse[i, 1]
        for j in range(width):
            out[j] = _exp_shifted(row[j], top, rest) * s
        out[target[i]] -= s


def _ordinary(x):
    """Softmax's fast path needs finite rows; min and max find out in one pass."""
    return bool(np.isfinite(x.min()) and np.isfinite(x.max()))


def softmax(xp, x, dim):
    if dim != x.ndim - 1 or not usable(x) or not _ordinary(x):
        return threaded.softmax(xp, x, dim)
    y = np.empty_like(x)
    rows = x.reshape(-1, x.shape[-1])
    _rows(_softmax, rows, y.reshape(rows.shape))
    return y


def cross_entropy(xp, logits, target, ignore_index):
    if not usable(logits) or not _ordinary(logits):
        return threaded.cross_entropy(xp, logits, target, ignore_index)
    lse = np.empty((len(logits), 2), _F)
    _rows(_log_sum_exp, logits, lse)
    counted = target != ignore_index
    picked = logits[np.arange(len(target)), np.where(counted, target, 0)]
    return np.where(counted, (lse[:, 0] - picked) + lse[:, 1], _F(0)), lse, counted


def cross_entropy_backward(xp, logits, target, lse, counted, g):
    if not usable(logits) or target.dtype != np.int64 or not _ordinary(lse):
        return threaded.cross_entropy_backward(xp, logits, target, lse, counted, g)
    dx = np.empty_like(logits)
    _rows(_cross_entropy_backward, logits, np.ascontiguousarray(target), lse, counted, np.ascontiguousarray(g), dx)
    return dx


# ---- embedding -------------------------------------------------------------------------------------------------------


@njit_fast
def _embedding_backward(start, stop, ids, g, out):
    for i in range(ids.shape[0]):  # every thread takes all rows, but its own columns: no two write one place
        source, target = g[i, start:stop], out[ids[i], start:stop]
        for j in range(source.size):
            target[j] += source[j]


def embedding_backward(device, ids, g, rows):
    if not usable(g) or ids.dtype != np.int64:
        return threaded.embedding_backward(device, ids, g, rows)
    out = np.zeros((rows, g.shape[1]), _F)
    pool().split(_embedding_backward, g.shape[1], np.ascontiguousarray(ids), g, out, grain=16, align=16)
    return out


# ---- dropout ---------------------------------------------------------------------------------------------------------


@njit_fast
def _dropout(start, stop, x, y, multiplier, offset, threshold, scale):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):
        h = np.uint32(np.uint32(np.uint32(start + i) * multiplier) + offset)  # Numba widens every result
        h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D))
        h = np.uint32((h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B))
        h = np.uint32(h ^ (h >> np.uint32(16)))
        y[i] = x[i] * scale if h >= threshold else _F(0)


def dropout(device, x, p, identity):
    if not usable(x):
        return threaded.dropout(device, x, p, identity)
    y = np.empty_like(x)
    multiplier, offset, threshold = dropout_key(p, identity)
    pool().split(
        _dropout,
        x.size,
        x.reshape(-1),
        y.reshape(-1),
        multiplier,
        offset,
        threshold,
        _F(1 / (1 - p)),
        grain=1 << 14,
        align=16,
    )
    return y


# ---- optimizer -------------------------------------------------------------------------------------------------------


@njit_fast
def _adamw(start, stop, p, grad, m, v, decay, beta1, beta2, rate, correction, eps):
    p, grad, m, v = p[start:stop], grad[start:stop], m[start:stop], v[start:stop]
    for i in range(p.size):
        g = grad[i]
        a = m[i] + (_ONE - beta1) * (g - m[i])
        b = beta2 * v[i] + (_ONE - beta2) * g * g
        m[i], v[i] = a, b
        p[i] = p[i] * decay - rate * a / (np.sqrt(b) * correction + eps)


def adamw(xp, p, grad, m, v, *, lr, betas, eps, weight_decay, step):
    if not usable(p, grad, m, v):
        threaded.adamw(xp, p, grad, m, v, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step)
        return
    numbers = (1 - lr * weight_decay, *betas, lr / (1 - betas[0] ** step), 1 / math.sqrt(1 - betas[1] ** step), eps)
    pool().split(_adamw, p.size, p, grad, m, v, *map(_F, numbers), grain=1 << 14, align=16)
