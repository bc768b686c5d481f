"""Attention for NumPy on a CPU: arguments and results as in reference.py.

Short sequences: some batch elements at a time, so that their scores fit the cache and NumPy's loops do the heads. Long
ones: head by head in tiles of queries that, where causal, see only the keys they may look at. Probabilities are kept
for backward, because NumPy reads them faster than it computes them again; what dropout did to them is drawn again.
"""

import numpy as np

from . import reference
from .blas import gemm
from .blocks import BLOCK
from .memory import empty
from .pool import pool
from .reference import causal_bias

TILE = 64
SHORT = 128 * 128  # scores of one head


def attention(device, q, k, v, mask, causal, scale, p, identity):
    (batch, heads, rows, _), (groups, columns) = q.shape, k.shape[1:3]
    if mask is not None or not q.size or not k.size:
        return reference.attention(device, q, k, v, mask, causal, scale, p, identity)
    drop = _Dropout(p, identity)
    share = heads // groups
    probabilities = empty((batch, groups, share, rows, columns), q.dtype)
    out = empty((batch, rows, heads, v.shape[3]), q.dtype).transpose(0, 2, 1, 3)  # heads side by side in memory

    def by_head(start, stop):
        for task in range(start, stop):
            b, h = divmod(task, heads)
            g = h // share
            weights = probabilities[b, g, h % share]
            for i, j, m in _tiles(rows, columns, causal):
                scores = weights[i:j, :m]
                np.matmul(q[b, h, i:j], k[b, g, :m].T, out=scores)
                scores *= scale
                if causal and m > i:
                    scores[:, i:] += causal_bias(np, j - i, m - i, q.dtype)
                _softmax_in_place(scores)
                if j == rows:
                    weights[i:, m:] = 0  # backward's first tile looks there too
                np.matmul(drop(scores, (task * rows + i) * columns, columns), v[b, g, :m], out=out[b, h, i:j])

    def by_batch(start, stop):
        for i, j in _chunks(start, stop, heads * rows * columns):
            queries, keys, values = reference._grouped(q[i:j], k[i:j], v[i:j])
            scores = probabilities[i:j]
            np.matmul(queries, keys.swapaxes(-1, -2), out=scores)
            scores *= scale
            if causal:
                scores += causal_bias(np, rows, columns, q.dtype)
            _softmax_in_place(scores)
            weights = drop(scores, i * heads * rows * columns, columns)
            np.matmul(weights, values, out=out[i:j].reshape(j - i, groups, share, rows, -1))

    if rows * columns <= SHORT:
        pool().split(by_batch, batch)
    else:
        pool().split(by_head, batch * heads)
    return out, (probabilities,)


def attention_backward(device, q, k, v, kept, causal, scale, p, identity, g):
    (probabilities,), (batch, heads, rows, _), (groups, columns) = kept, q.shape, k.shape[1:3]
    if not q.size or not k.size:
        return reference.attention_backward(device, q, k, v, kept, causal, scale, p, identity, g)
    drop = _Dropout(p, identity)
    dq, dk, dv = (
        empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype).transpose(0, 2, 1, 3) for x in (q, k, v)
    )

    def by_group(start, stop):
        for task in range(start, stop):
            b, group = divmod(task, groups)
            keys, values, dkeys, dvalues = (x[b, group] for x in (k, v, dk, dv))
            add = False  # the first tile covers all keys and overwrites, the others add
            for h in range(group * (heads // groups), (group + 1) * (heads // groups)):
                for i, j, m in _tiles(rows, columns, causal, backward=True):
                    weights, gradient = probabilities[b, group, h % (heads // groups), i:j, :m], g[b, h, i:j]
                    first = ((b * heads + h) * rows + i) * columns
                    gemm(drop(weights, first, columns).T, gradient, dvalues[:m], add)
                    ds = drop(gradient @ values[:m].T, first, columns)
                    _softmax_gradient(ds, weights, scale)
                    np.matmul(ds, keys[:m], out=dq[b, h, i:j])
                    gemm(ds.T, q[b, h, i:j], dkeys[:m], add)
                    add = True

    def by_batch(start, stop):
        for i, j in _chunks(start, stop, heads * rows * columns):
            queries, keys, values = reference._grouped(q[i:j], k[i:j], v[i:j])
            gradient = g[i:j].reshape(*queries.shape[:4], -1)
            weights, first = probabilities[i:j], i * heads * rows * columns
            _sum_heads(drop(weights, first, columns).swapaxes(-1, -2), gradient, dv[i:j])
            ds = drop(gradient @ values.swapaxes(-1, -2), first, columns)
            _softmax_gradient(ds, weights, scale)
            np.matmul(ds, keys, out=dq[i:j].reshape(queries.shape))
            _sum_heads(ds.swapaxes(-1, -2), queries, dk[i:j])

    if rows * columns <= SHORT:
        pool().split(by_batch, batch)
    else:
        pool().split(by_group, batch * groups)
    return dq, dk, dv


class _Dropout:
    """Dropout of scores whose rows begin at the elements numbered first, first + columns, ...; or nothing."""

    def __init__(self, p, identity):
        self.p, self.identity = p, identity

    def __call__(self, scores, first, columns):
        if self.identity is None:
            return scores
        starts = np.arange(first, first + scores.size // scores.shape[-1] * columns, columns).astype(np.uint32)
        numbers = starts[:, None] + np.arange(scores.shape[-1], dtype=np.uint32)
        kept = reference.dropout_kept(numbers, self.p, self.identity).reshape(scores.shape)
        dropped = scores * kept
        dropped *= scores.dtype.type(1 / (1 - self.p))
        return dropped


def _tiles(rows, columns, causal, backward=False):
    """(i, j, m): queries i..j-1 look at the first m keys. Backward, the last come first, and their tile takes all keys,
    as it writes where the others add."""
    starts = range(0, rows, TILE)
    for i in reversed(starts) if backward else starts:
        j = min(i + TILE, rows)
        everything = not causal or (backward and j == rows)
        yield i, j, columns if everything else min(j, columns)


def _chunks(start, stop, size):
    """Ranges of batch elements whose scores, `size` each, fit the cache."""
    step = max(1, BLOCK // size)
    return [(i, min(i + step, stop)) for i in range(start, stop, step)]


def _softmax_in_place(scores):
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores *= 1 / scores.sum(axis=-1, keepdims=True)


def _softmax_gradient(ds, weights, scale):
    """ds: the gradient of the probabilities `weights`, which becomes that of the unscaled scores."""
    ds -= np.einsum("...ij,...ij->...i", ds, weights)[..., None]
    ds *= weights
    ds *= scale


def _sum_heads(a, b, out):
    """out (B, G, S, e) = the sum over the query heads of a (B, G, H/G, S, T) @ b (B, G, H/G, T, e)."""
    if a.shape[2] == 1:
        np.matmul(a, b, out=out[:, :, None])
    else:
        np.sum(a @ b, axis=2, out=out)
