"""One new token for each of a few texts through a transformer's block, compiled by Numba (extra `fast`).

Decoding reads every weight once and does next to nothing with it, so what is beside the reading shows: as Tensor
operations a block is some twenty calls with an array each. Here it is four kernels, each one task per thread: `attend`
(norm, projection to queries, keys and values, rotary positions, the cache, attention), `add_product` (projection and
residual), `expand` (norm, first layer of the feed-forward, activation), `add_product` again. Threads take heads or rows
of weights; the norm of a few vectors is cheaper computed by each of them than handed over.

All arrays are C-contiguous float32 but for weights, which may be packed (packed.py) or, unscaled, in Fortran order.
"""

import numpy as np
from numba import types
from numba.extending import overload

from .compiled_few import _four_by_one, few, few_int8, few_turned
from .compiled_math import F32, ONE, TWO, exp, njit_fast, normal_tail

GELU, GELU_TANH, RELU, RELU2, SWIGLU, NONE = range(6)
_TANH_A, _TANH_B = F32(np.sqrt(2 / np.pi)), F32(0.044715 * np.sqrt(2 / np.pi))
ZERO, HALF = F32(0), F32(0.5)


def product(start, stop, x, w, scale, y):
    """y[:, start:stop] = x @ w[start:stop]^T for a weight of any kind."""


@overload(product)
def _product(start, stop, x, w, scale, y):
    if w.layout == "F":
        return lambda start, stop, x, w, scale, y: few_turned(start, stop, x, w.T, y)
    if w.dtype == types.int8:
        return lambda start, stop, x, w, scale, y: few_int8(start, stop, x, w, scale, y)
    return lambda start, stop, x, w, scale, y: few(start, stop, x, w, y)


@njit_fast
def _norm(x, weight, bias, eps, rms, out):
    """LayerNorm, or RMSNorm, of each row."""
    width = x.shape[1]
    for m in range(x.shape[0]):
        row, y = x[m], out[m]
        mean = ZERO
        if not rms:
            for j in range(width):
                mean += row[j]
            mean /= F32(width)
        total = ZERO
        for j in range(width):
            total += (row[j] - mean) * (row[j] - mean)
        r = ONE / np.sqrt(total / F32(width) + eps)
        for j in range(width):
            y[j] = (row[j] - mean) * r * weight[j] + bias[j]


@njit_fast
def _turn(head, normed, weight, eps, rotary, cos, sin):
    """Normalize (QK-norm) and rotate one head's vector in place."""
    size = head.size
    if normed:
        total = ZERO
        for j in range(size):
            total += head[j] * head[j]
        r = ONE / np.sqrt(total / F32(size) + eps)
        for j in range(size):
            head[j] = head[j] * r * weight[j]
    if rotary:
        half = size // 2
        for j in range(half):
            a, b = head[j], head[half + j]
            head[j] = a * cos[j] - b * sin[j]
            head[half + j] = b * cos[half + j] + a * sin[half + j]


@njit_fast
def _look(q, keys, values, seen, scores, out):
    """out = softmax(q keys^T) values over the first `seen` slots; q is scaled already."""
    top = F32(-np.inf)
    last = seen - 1
    for s in range(0, seen, 4):
        b, c, d = min(s + 1, last), min(s + 2, last), min(s + 3, last)
        scores[s], scores[b], scores[c], scores[d] = _four_by_one(keys[s], keys[b], keys[c], keys[d], q)
    for s in range(seen):
        top = max(top, scores[s])
    total = ZERO
    for s in range(seen):
        scores[s] = exp(scores[s] - top)
        total += scores[s]
    size = out.size
    for j in range(size):
        out[j] = ZERO
    for s in range(seen):
        p, row = scores[s] / total, values[s]
        for j in range(size):
            out[j] += p * row[j]


@njit_fast
def attend(start, stop, part, x, norm_weight, norm_bias, eps, rms, w, scale, bias, heads, size, qk, q_weight, k_weight,
           rotary, cos, sin, keys, values, first, slots, seen, normed, qkv, scores, y):
    """Key heads start to stop with the queries that share them: x (n, C) -> y (n, heads * size), of which each text
    attends to the first seen[m] slots of its row of the cache, the new one, slots[m], among them."""
    n, groups, h = x.shape[0], keys.shape[1], normed[part]
    share = heads // groups
    _norm(x, norm_weight, norm_bias, eps, rms, h)
    for kind in range(3):  # queries, keys, values: rows of one matrix
        base = (0, heads, heads + groups)[kind]
        per = share if kind == 0 else 1
        low, high = (base + start * per) * size, (base + stop * per) * size
        product(low, high, h, w, scale, qkv)
        for m in range(n):
            for i in range(low, high):
                qkv[m, i] += bias[i]
    factor = ONE / np.sqrt(F32(size))
    for m in range(n):
        row = first + m
        for g in range(start, stop):
            at = (heads + g) * size
            key, value = qkv[m, at : at + size], qkv[m, at + groups * size : at + (groups + 1) * size]
            _turn(key, qk, k_weight, eps, rotary, cos[m], sin[m])
            new_key, new_value = keys[row, g, slots[m]], values[row, g, slots[m]]
            for j in range(size):
                new_key[j], new_value[j] = key[j], value[j]
            for head in range(g * share, (g + 1) * share):
                query = qkv[m, head * size : (head + 1) * size]
                _turn(query, qk, q_weight, eps, rotary, cos[m], sin[m])
                for j in range(size):
                    query[j] *= factor
                _look(query, keys[row, g], values[row, g], seen[m], scores[part], y[m, head * size : (head + 1) * size])


@njit_fast
def add_product(start, stop, y, w, scale, bias, scratch, x):
    """x[:, start:stop] += y @ w[start:stop]^T + bias[start:stop]."""
    product(start, stop, y, w, scale, scratch)
    for m in range(x.shape[0]):
        for i in range(start, stop):
            x[m, i] += scratch[m, i] + bias[i]


@njit_fast
def expand(start, stop, part, x, norm_weight, norm_bias, eps, rms, w, scale, bias, activation, normed, raw, y):
    """y[:, start:stop] = activation(norm(x) @ w^T + bias); `raw` (n, rows of w) is scratch, or y where there is no
    activation. SwiGLU's gate is in the first half of the rows, its value in the second."""
    h, hidden = normed[part], y.shape[1]
    _norm(x, norm_weight, norm_bias, eps, rms, h)
    product(start, stop, h, w, scale, raw)
    if activation == SWIGLU:
        product(start + hidden, stop + hidden, h, w, scale, raw)
    for m in range(x.shape[0]):
        source, target = raw[m], y[m]
        if activation == NONE:
            for i in range(start, stop):
                target[i] = source[i] + bias[i]
        elif activation == GELU:
            for i in range(start, stop):
                v = source[i] + bias[i]
                q = normal_tail(v, exp(v * v * -HALF))
                target[i] = v * (ONE - q if v > 0 else q)
        elif activation == GELU_TANH:
            for i in range(start, stop):
                v = source[i] + bias[i]
                target[i] = v / (ONE + exp(-TWO * v * (_TANH_A + _TANH_B * v * v)))
        elif activation == RELU:
            for i in range(start, stop):
                target[i] = max(source[i] + bias[i], ZERO)
        elif activation == RELU2:
            for i in range(start, stop):
                v = max(source[i] + bias[i], ZERO)
                target[i] = v * v
        else:
            for i in range(start, stop):
                a, b = source[i] + bias[i], source[hidden + i] + bias[hidden + i]
                target[i] = a / (ONE + exp(-a)) * b
