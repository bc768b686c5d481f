"""The fused routines on arrays, for NumPy and CuPy alike: forward and backward of each, in a few whole-array or
blocked passes. `ops/composed.py` holds the same mathematics in Tensor operations, as their oracle.

Conventions: rows are flattened, x is (n, width); `g` is the gradient of the output; arrays returned are new.
"""

import math

import numpy as np

from .blocks import blockwise
from .erf import erf
from .reference_block import *  # noqa: F403
from .reference_block import sigmoid
from .reference_update import *  # noqa: F403

# ---- linear ----------------------------------------------------------------------------------------------------------


def linear(xp, x, weight, bias):
    """x (n, in) @ weight (out, in)^T + bias (out) -> (n, out)."""
    y = x @ weight.T
    if bias is not None:
        y += bias
    return y


def linear_backward(xp, x, weight, g, needs, into=None):
    """Gradients (dx, dweight, dbias) of linear; None where `needs` (a flag per input) does not ask. `into`: None, or
    (array, add?), where dweight goes instead: added to what is there, or in its place."""
    dw = g.T @ x if needs[1] else None
    return (
        g @ weight if needs[0] else None,
        dw if into is None else put(dw, *into),
        column_sum(xp, g) if len(needs) > 2 and needs[2] else None,
    )


def put(value, array, add):
    """Add `value` to `array`, or write it there; returns None, for the gradient that is thereby delivered."""
    if add:
        array += value
    else:
        array[...] = value


def column_sum(xp, g):
    """The sum over the rows of g (n, width), as a product with ones: BLAS adds faster and more evenly than sum()."""
    return xp.ones(len(g), g.dtype) @ g


def matmul(xp, a, b):
    """a (..., n, k) @ b (..., k, m), leading sizes broadcast."""
    return a @ b


# ---- GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415) --------------------------------------------------------------


def gelu(xp, x, approximate):
    """x Phi(x), exactly or by tanh."""
    return blockwise(lambda v: _gelu(xp, v, approximate), xp.empty(x.shape, x.dtype), x)


def _gelu(xp, x, approximate):
    if approximate == "tanh":
        u = x * x
        u *= 0.044715 * math.sqrt(2 / math.pi)
        u += math.sqrt(2 / math.pi)
        u *= x
        y = xp.tanh(u)
    else:
        y = erf(xp, x * (1 / math.sqrt(2)))
    y += 1
    y *= x
    y *= 0.5
    return y


def gelu_backward(xp, x, y, g, approximate):
    """From the input and the output: Phi(x) = y / x, so that no second erf or tanh is needed."""
    return blockwise(lambda *a: _gelu_backward(xp, *a, approximate), xp.empty(x.shape, x.dtype), x, y, g)


def _gelu_backward(xp, x, y, g, approximate):
    tiny = xp.abs(x) < 4 * np.finfo(x.dtype).smallest_normal
    cdf = xp.where(tiny, 0.5, y / xp.where(tiny, 1, x)).astype(x.dtype, copy=False)
    if approximate == "tanh":  # t = 2 Phi - 1, so (1 - t^2) / 2 = 2 Phi (1 - Phi)
        du = x * x
        du *= 3 * 0.044715 * math.sqrt(2 / math.pi)
        du += math.sqrt(2 / math.pi)
        slope = 2 * cdf * (1 - cdf) * du
    else:
        slope = xp.exp(x * x * -0.5)
        slope *= 1 / math.sqrt(2 * math.pi)
    slope *= x
    slope += cdf
    slope *= g
    return slope


# ---- SiLU ------------------------------------------------------------------------------------------------------------


def silu(xp, x):
    return blockwise(lambda v: v * sigmoid(xp, v), xp.empty(x.shape, x.dtype), x)


def silu_backward(xp, x, g):
    return blockwise(lambda x, g: _silu_backward(xp, x, g), xp.empty(x.shape, x.dtype), x, g)


def _silu_backward(xp, x, g):
    s = sigmoid(xp, x)
    return g * s * (1 + x * (1 - s))


# ---- softmax ---------------------------------------------------------------------------------------------------------


def softmax(xp, x, dim):
    y = x - x.max(axis=dim, keepdims=True)
    xp.exp(y, out=y)
    y /= y.sum(axis=dim, keepdims=True)
    return y


def softmax_backward(xp, y, g, dim):
    dx = y * g
    dx -= y * dx.sum(axis=dim, keepdims=True)
    return dx


def log_softmax(xp, x, dim):
    y = x - x.max(axis=dim, keepdims=True)
    y -= xp.log(xp.exp(y).sum(axis=dim, keepdims=True))
    return y


def log_softmax_backward(xp, y, g, dim):
    return g - xp.exp(y) * g.sum(axis=dim, keepdims=True)


# ---- normalisation ---------------------------------------------------------------------------------------------------


def layer_norm(xp, x, weight, bias, eps):
    """(x - mean) / sqrt(var + eps) * weight + bias per row (Ba et al. 2016, arXiv:1607.06450); also mean and 1/std."""
    mean = x.mean(axis=1, keepdims=True)
    y = x - mean
    rstd = 1 / xp.sqrt(xp.einsum("ij,ij->i", y, y)[:, None] / x.shape[1] + eps)
    y *= rstd
    if weight is not None:
        y *= weight
    if bias is not None:
        y += bias
    return y, mean, rstd.astype(x.dtype, copy=False)


def layer_norm_backward(xp, x, weight, mean, rstd, g, affine):
    """Three terms for x: with h = g * weight, dx = (h - mean(h) - xhat * mean(h * xhat)) / std."""
    xhat = x - mean
    xhat *= rstd
    gw = xp.einsum("ij,ij->j", g, xhat) if affine else None
    gb = g.sum(axis=0) if affine else None
    h = g if weight is None else g * weight
    width = x.shape[1]
    along = xp.einsum("ij,ij->i", h, xhat)[:, None] / width
    dx = h - h.mean(axis=1, keepdims=True)
    xhat *= along
    dx -= xhat
    dx *= rstd
    return dx, gw, gb


def add_layer_norm(xp, x, r, weight, bias, eps):
    """layer_norm of the sum x + r: what that returns, and the sum."""
    total = x + r
    return *layer_norm(xp, total, weight, bias, eps), total


def add_layer_norm_backward(xp, total, weight, mean, rstd, g, gtotal, affine):
    """Gradients of (either summand, weight, bias); gtotal is the sum's own, beside what comes through the norm."""
    dx, gw, gb = layer_norm_backward(xp, total, weight, mean, rstd, g, affine)
    dx += gtotal
    return dx, gw, gb


def rms_norm(xp, x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight per row (Zhang and Sennrich 2019, arXiv:1910.07467); also 1/rms."""
    rstd = (1 / xp.sqrt(xp.einsum("ij,ij->i", x, x)[:, None] / x.shape[1] + eps)).astype(x.dtype, copy=False)
    y = x * rstd
    if weight is not None:
        y *= weight
    return y, rstd


def rms_norm_backward(xp, x, weight, rstd, g, affine):
    xhat = x * rstd
    gw = xp.einsum("ij,ij->j", g, xhat) if affine else None
    h = g if weight is None else g * weight
    along = xp.einsum("ij,ij->i", h, xhat)[:, None] / x.shape[1]
    xhat *= along
    dx = h - xhat
    dx *= rstd
    return dx, gw


def add_rms_norm(xp, x, r, weight, eps):
    """rms_norm of the sum x + r: what that returns, and the sum."""
    total = x + r
    return *rms_norm(xp, total, weight, eps), total


def add_rms_norm_backward(xp, total, weight, rstd, g, gtotal, affine):
    """As add_layer_norm_backward, of (either summand, weight)."""
    dx, gw = rms_norm_backward(xp, total, weight, rstd, g, affine)
    dx += gtotal
    return dx, gw


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


def cross_entropy(xp, logits, target, ignore_index):
    """Loss per row, -log softmax(logits)[target], 0 where ignored; also log-sum-exp per row, as the largest logit
    and the rest (their sum would lose digits of the rest), and what counts."""
    counted = target != ignore_index
    safe = xp.where(counted, target, 0)
    top = logits.max(axis=1, keepdims=True)
    rest = xp.log(xp.exp(logits - top).sum(axis=1, keepdims=True))
    loss = (top[:, 0] - logits[xp.arange(len(target)), safe]) + rest[:, 0]
    lse = xp.concatenate([top, rest], axis=1)
    return xp.where(counted, loss, 0).astype(logits.dtype, copy=False), lse, counted


def cross_entropy_backward(xp, logits, target, lse, counted, g, out=None):
    """(softmax - one_hot) * g per row, from the logits; g (n,) is the gradient of each row's loss. `out` may be the
    logits themselves."""
    g = xp.where(counted, g, 0).astype(logits.dtype, copy=False)
    dx = xp.subtract(logits, lse[:, :1], out=out)
    dx -= lse[:, 1:]
    xp.exp(dx, out=dx)
    dx[xp.arange(len(target)), xp.where(counted, target, 0)] -= 1
    dx *= g[:, None]
    return dx


# ---- embedding -------------------------------------------------------------------------------------------------------


def embedding(xp, weight, ids):
    """The rows of `weight` (rows, width) with the numbers `ids` (any shape): ids.shape + (width,)."""
    return xp.take(weight, ids, axis=0)


def embedding_backward(device, ids, g, rows, into=None):
    """Sum the rows of g (n, width) that belong to each of `rows` embeddings: a one-hot product for small tables,
    else scattered additions on the flattened table (repeated ids add up either way). `into` as in linear_backward."""
    xp, width = device.xp, g.shape[1]
    if rows <= 256:
        one_hot = xp.zeros((len(ids), rows), g.dtype)
        one_hot[xp.arange(len(ids)), ids] = 1
        return one_hot.T @ g if into is None else put(one_hot.T @ g, *into)
    out = table(xp, rows, width, g.dtype, into)
    if g.size:
        device.scatter_add(out.reshape(-1), (ids[:, None] * width + xp.arange(width)).reshape(-1), g.reshape(-1))
    return out


def table(xp, rows, width, dtype, into):
    """The table (rows, width) to which an embedding's gradient is added: new, or that of `into`."""
    if into is None:
        return xp.zeros((rows, width), dtype)
    array, add = into
    if not add:
        array[...] = 0
    return array


# ---- dropout ---------------------------------------------------------------------------------------------------------


def dropout_key(p, identity):
    """(multiplier, offset, threshold), uint32, of the stream `identity` = (seed, number) for probability p."""
    seed, number = identity
    z = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the mixer of SplitMix64
        z = (z ^ (z >> shift)) * factor % 2**64
    z ^= z >> 31
    return np.uint32((z | 1) % 2**32), np.uint32(z >> 32), np.uint32(min(round(p * 2**32), 2**32 - 1))


def dropout_mask(xp, shape, p, identity, start=0):
    """What is kept (bool): element i, counted in C order from `start`, is kept where hash(i) >= p * 2^32. The hash is
    an integer mixer (Wellons' lowbias32) behind a multiplier and an offset of the stream's own, so that any element
    can be drawn at any time, on any device, in any order: nothing is stored for backward."""
    numbers = xp.arange(math.prod(shape), dtype=xp.uint32)
    numbers += np.uint32(start % 2**32)
    return dropout_kept(numbers, p, identity).reshape(shape)


def dropout_kept(h, p, identity):
    """dropout_mask of the elements whose numbers are h (uint32, overwritten)."""
    multiplier, offset, threshold = dropout_key(p, identity)
    h *= multiplier
    h += offset
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
    h ^= h >> np.uint32(16)
    return h >= threshold


def dropout(device, x, p, identity):
    """x / (1 - p) where kept, else 0."""
    y = x * dropout_mask(device.xp, x.shape, p, identity)
    y *= x.dtype.type(1 / (1 - p))
    return y


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(device, q, k, v, mask, causal, scale, p, identity):
    """softmax(scale q k^T + mask) v (Vaswani et al. 2017, arXiv:1706.03762) for q (B, H, T, d), k (B, G, S, d) and
    v (B, G, S, e), H a multiple of G; and what backward needs, a tuple. `identity`: the stream that drops probabilities
    with probability p, or None. A row that is masked altogether gives zeros."""
    xp = device.xp
    q, k, v = _grouped(q, k, v)
    scores = (q * scale) @ k.swapaxes(-1, -2)  # (B, G, H/G, T, S)
    if causal:
        scores += causal_bias(xp, *scores.shape[-2:], scores.dtype)
    if mask is not None:
        mask = mask.reshape(scores.shape)
        scores = xp.where(mask, scores, -xp.inf).astype(q.dtype) if mask.dtype == bool else scores + mask
    if scores.shape[-1]:  # a maximum of nothing is an error, and CuPy takes no `initial`
        top = scores.max(axis=-1, keepdims=True)
        scores -= xp.where(xp.isfinite(top), top, 0).astype(scores.dtype, copy=False)
    xp.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    scores /= xp.where(total == 0, 1, total)
    out = _dropped(device, scores, p, identity) @ v
    return out.reshape(out.shape[0], q.shape[1] * q.shape[2], *out.shape[3:]), (scores,)


def attention_backward(device, q, k, v, kept, causal, scale, p, identity, g):
    """With P the probabilities and D what dropout made of them: dV = D^T g, dP = dropout(g V^T),
    dS = P (dP - sum(dP P)), dQ = scale dS K, dK = scale dS^T Q."""
    (probabilities,), heads = kept, q.shape[1]
    q, k, v = _grouped(q, k, v)
    g = g.reshape(q.shape[:4] + g.shape[-1:])
    dv = _dropped(device, probabilities, p, identity).swapaxes(-1, -2) @ g
    ds = _dropped(device, g @ v.swapaxes(-1, -2), p, identity)
    ds = ds - (ds * probabilities).sum(axis=-1, keepdims=True)
    ds *= probabilities
    ds *= scale
    dq, dk = ds @ k, ds.swapaxes(-1, -2) @ q
    return dq.reshape(dq.shape[0], heads, *dq.shape[3:]), dk.sum(axis=2), dv.sum(axis=2)


def _grouped(q, k, v):
    """q (B, G, H/G, T, d), k (B, G, 1, S, d), v (B, G, 1, S, e): the heads beside the keys that they share."""
    share = q.shape[1] // max(k.shape[1], 1)
    return q.reshape(q.shape[0], k.shape[1], share, *q.shape[2:]), k[:, :, None], v[:, :, None]


def _dropped(device, x, p, identity):
    return x if identity is None else dropout(device, x, p, identity)


_causal = {}


def causal_bias(xp, rows, columns, dtype):
    """0 on and below the diagonal, -inf above, (rows, columns); kept for the next call."""
    key = (xp.__name__, rows, columns, dtype.name)
    if key not in _causal:
        if len(_causal) > 8:
            _causal.clear()
        _causal[key] = xp.where(xp.tri(rows, columns, dtype=bool), 0, -xp.inf).astype(dtype)
    return _causal[key]
