"""The fused routines on arrays, for NumPy and CuPy alike: forward and backward of each, in a few whole-array or
blocked passes. `ops/composed.py` holds the same mathematics in Tensor operations, as their oracle.

Conventions: rows are flattened, x is (n, width); `g` is the gradient of the output; arrays returned are new.
"""

import math

import numpy as np

from .erf import erf

BLOCK = 65536  # elements per block of a multi-pass elementwise routine: its temporaries stay in the cache


def blockwise(function, out, *arrays):
    """out[...] = function(*arrays), block by block over the flattened arrays where that helps (NumPy, contiguous)."""
    if out.ndim == 0:  # NumPy would compute on scalars, which cannot be written in place
        blockwise(function, out.reshape(1), *(a.reshape(1) for a in arrays))
        return out
    if not isinstance(out, np.ndarray) or out.size <= BLOCK or not all(a.flags.c_contiguous for a in (out, *arrays)):
        out[...] = function(*arrays)
        return out
    flat, parts = out.reshape(-1), [a.reshape(-1) for a in arrays]
    for start in range(0, flat.size, BLOCK):
        flat[start : start + BLOCK] = function(*(p[start : start + BLOCK] for p in parts))
    return out


# ---- linear ----------------------------------------------------------------------------------------------------------


def linear(xp, x, weight, bias):
    """x (n, in) @ weight (out, in)^T + bias (out) -> (n, out)."""
    y = x @ weight.T
    if bias is not None:
        y += bias
    return y


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


def sigmoid(xp, x):
    e = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1, e) / (1 + e)


def silu(xp, x):
    return blockwise(lambda v: v * sigmoid(xp, v), xp.empty(x.shape, x.dtype), x)


def silu_backward(xp, x, g):
    def block(x, g):
        s = sigmoid(xp, x)
        return g * s * (1 + x * (1 - s))

    return blockwise(block, xp.empty(x.shape, x.dtype), x, g)


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


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


def cross_entropy(xp, logits, target, ignore_index):
    """Loss per row, -log softmax(logits)[target], 0 where ignored; also log-sum-exp per row and what counts."""
    counted = target != ignore_index
    safe = xp.where(counted, target, 0)
    top = logits.max(axis=1, keepdims=True)
    lse = xp.log(xp.exp(logits - top).sum(axis=1, keepdims=True)) + top
    loss = lse[:, 0] - logits[xp.arange(len(target)), safe]
    return xp.where(counted, loss, 0).astype(logits.dtype, copy=False), lse, counted


def cross_entropy_backward(xp, logits, target, lse, counted, g):
    """(softmax - one_hot) * g per row, from the logits; g (n,) is the gradient of each row's loss."""
    g = xp.where(counted, g, 0).astype(logits.dtype, copy=False)
    dx = logits - lse
    xp.exp(dx, out=dx)
    dx[xp.arange(len(target)), xp.where(counted, target, 0)] -= 1
    dx *= g[:, None]
    return dx


# ---- embedding -------------------------------------------------------------------------------------------------------


def embedding_backward(device, ids, g, rows):
    """Sum the rows of g (n, width) that belong to each of `rows` embeddings: a one-hot product for small tables,
    else scattered additions on the flattened table (repeated ids add up either way)."""
    xp, width = device.xp, g.shape[1]
    if rows <= 256:
        one_hot = xp.zeros((len(ids), rows), g.dtype)
        one_hot[xp.arange(len(ids)), ids] = 1
        return one_hot.T @ g
    out = xp.zeros((rows, width), g.dtype)
    if g.size:
        device.scatter_add(out.reshape(-1), (ids[:, None] * width + xp.arange(width)).reshape(-1), g.reshape(-1))
    return out


# ---- dropout ---------------------------------------------------------------------------------------------------------


def dropout_mask(device, shape, p, identity):
    """What is kept (bool) and the factor 1 / (1 - p); the same for the same stream `identity`. Random bits are dear, so
    p counts in steps of 2^-16, for small p of 2^-32."""
    from ..random import stream

    size = math.prod(shape)
    draw = np.uint16 if p > 1 / 64 else np.uint32
    each = 8 // draw().itemsize
    bits = stream(identity).bit_generator.random_raw(-(-size // each)).view(draw)[:size]
    threshold = draw(min(round(p * (np.iinfo(draw).max + 1)), np.iinfo(draw).max))
    return device.asarray((bits >= threshold).reshape(shape)), 1 / (1 - p)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(xp, q, k, v, mask, causal, scale, keep):
    """softmax(scale q k^T + mask) v (Vaswani et al. 2017, arXiv:1706.03762) for q (..., T, d), k (..., S, d),
    v (..., S, e); also the probabilities (..., T, S). `keep` multiplies them (dropout) or is None.
    A row that is masked altogether gives zeros."""
    scores = (q * scale) @ k.swapaxes(-1, -2)
    if causal:
        scores += causal_bias(xp, *scores.shape[-2:], scores.dtype)
    if mask is not None:
        if mask.dtype == bool:
            scores = xp.where(mask, scores, -xp.inf).astype(scores.dtype, copy=False)
        else:
            scores = scores + mask
    top = scores.max(axis=-1, keepdims=True, initial=-xp.inf)
    scores -= xp.where(xp.isfinite(top), top, 0).astype(scores.dtype, copy=False)
    xp.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    scores /= xp.where(total == 0, 1, total)
    return (scores if keep is None else scores * keep) @ v, scores


def attention_backward(xp, q, k, v, p, keep, scale, g):
    """With P the probabilities: dV = (P keep)^T g, dP = keep g V^T, dS = P (dP - sum(dP P)), dQ = dS K, dK = dS^T Q."""
    dv = (p if keep is None else p * keep).swapaxes(-1, -2) @ g
    ds = g @ v.swapaxes(-1, -2)
    if keep is not None:
        ds *= keep
    ds -= (ds * p).sum(axis=-1, keepdims=True)
    ds *= p
    ds *= scale
    return ds @ k, ds.swapaxes(-1, -2) @ q, dv


_causal = {}


def causal_bias(xp, rows, columns, dtype):
    """0 on and below the diagonal, -inf above, (rows, columns); kept for the next call."""
    key = (xp.__name__, rows, columns, dtype.name)
    if key not in _causal:
        if len(_causal) > 8:
            _causal.clear()
        _causal[key] = xp.where(xp.tri(rows, columns, dtype=bool), 0, -xp.inf).astype(dtype)
    return _causal[key]
