"""Attention as two batched products with a softmax kernel between them: runs on every GPU and for every size.

The scores (batch, heads, T, S) are kept for backward as probabilities, in the inputs' dtype. cudnn.py, where it can be
used, keeps none of them."""

import numpy as np

from ..reference import dropout_key
from .gemm import gemm
from .launch import launch

NO_DROPOUT = (0, 0, 0, 1.0)


def _noise(p, identity):
    """The kernels' arguments for dropout: multiplier, start, threshold, 1 / (1 - p)."""
    return NO_DROPOUT if identity is None else (*dropout_key(p, identity), 1 / (1 - p))


def folded(xp, x, groups):
    """x (B, H, T, d) as (B * groups, H / groups * T, d): a view of the part of a cache that is in use, a copy of heads
    that stand side by side in a packed projection."""
    (batch, heads, length, _), (of_text, of_head, of_token, of_number) = x.shape, x.strides
    texts_join = batch == 1 or heads == 1 or of_text == heads * of_head
    heads_join = heads == groups or length == 1 or of_head == length * of_token
    if not (texts_join and heads_join) and of_number == x.itemsize:
        x = _copied(xp, x)
    return x.reshape(batch * groups, -1, x.shape[-1])


def _copied(xp, x):
    y = xp.empty(x.shape, x.dtype)
    strides = [s // x.itemsize for a in (x, y) for s in a.strides[:3]]
    launch(xp, "copy_heads", x.dtype.name, x, y, *x.shape, *strides)
    return y


def attention(xp, q, k, v, mask, causal, scale, p, identity):
    """(out (B, H, T, e), what backward needs) for q (B, H, T, d), k (B, G, S, d), v (B, G, S, e) and mask (B, H, T, S),
    bool or to be added, or None; see reference.py."""
    (batch, heads, queries, _), (groups, keys, width) = q.shape, v.shape[1:]
    q, k, v = (folded(xp, x, groups) for x in (q, k, v))
    scores = gemm(xp, q, k.swapaxes(-1, -2), alpha=1.0 if mask is None else scale)  # (B * G, H / G * T, S)
    if mask is not None:
        if mask.dtype == bool:
            mask = xp.where(mask, np.float32(0), np.float32(-np.inf)).astype(scores.dtype, copy=False)
        masked = scores.reshape(mask.shape)  # a view
        masked += mask
        scale = 1.0
    dropped = None if identity is None else xp.empty(scores.shape, scores.dtype)
    rows, offset = batch * heads * queries, 0 if causal else keys
    launch(
        xp, "softmax_forward", scores.dtype.name,
        scores, dropped, rows, queries, keys, offset, scale, *_noise(p, identity),
    )  # fmt: skip
    out = gemm(xp, scores if dropped is None else dropped, v)
    kept = (scores,) if dropped is None else (scores, dropped)
    return out.reshape(batch, heads, queries, width), kept


def attention_backward(xp, q, k, v, kept, causal, scale, p, identity, g):
    """(dq, dk, dv); see reference.py."""
    (batch, heads, queries, _), (groups, keys, _) = q.shape, v.shape[1:]
    shapes = q.shape, k.shape, v.shape
    q, k, v, g = (folded(xp, x, groups) for x in (q, k, v, g.astype(q.dtype, copy=False)))
    probabilities, dropped = kept[0], kept[-1]
    dv = gemm(xp, dropped.swapaxes(-1, -2), g)  # sums over the heads that share keys as well
    ds = gemm(xp, g, v.swapaxes(-1, -2))
    rows, offset = batch * heads * queries, 0 if causal else keys
    launch(
        xp, "softmax_backward", ds.dtype.name,
        probabilities, ds, rows, queries, keys, offset, scale, *_noise(p, identity),
    )  # fmt: skip
    gradients = gemm(xp, ds, k), gemm(xp, ds.swapaxes(-1, -2), q), dv
    return tuple(x.reshape(shape) for x, shape in zip(gradients, shapes, strict=True))
