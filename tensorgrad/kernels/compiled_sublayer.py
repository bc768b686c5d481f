"""A transformer block's two sublayers, each as one task per thread and direction (extra `fast`), for small and middling
sizes.

In small ones a product takes some 500 us and waking a thread up to 100, so products that are operations of their own
spend a tenth of a step on waking. Here each thread takes its rows through all of it, and finds in its own cache what it
has just written: products, what stands between them, and in backward its share of the weights' gradients, which are
added up at the end.
"""

import numpy as np

from . import reference
from .blas import gemm
from .compiled import _gelu, _gelu_backward, _gelu_tanh, _gelu_tanh_backward, _silu, _silu_backward
from .compiled_attention import FEW, _backward, _forward, backward_arguments, forward_arguments
from .compiled_block import _places, _relu2, _relu2_backward, _swiglu, _swiglu_backward
from .compiled_math import F32
from .memory import empty
from .pool import pool
from .products import GRAIN

ROWS = 64  # fewer than these are not worth halving: reading the weights takes the time, and that is shared otherwise
LARGE = 1 << 31  # multiply-adds of a product from which it makes no difference


def pays(rows, *weights):
    """Are products of so many rows with each of these weights large enough for two threads, and small enough that it
    shows? (With more threads, each has a sum of its own for every weight's gradient.)"""
    sizes = [rows * weight.size for weight in weights]
    return pool().threads == 2 and rows >= ROWS and min(sizes) >= GRAIN and max(sizes) < LARGE


def attention_pays(texts, length, *weights):
    """The same, for attention: halves of so many texts of this length should take alike."""
    return length >= FEW and (texts % 2 == 0 or texts > 8) and pays(texts * length, *weights)


def _linear(x, weight, bias, out):
    gemm(x, weight.T, out)
    if bias is not None:
        out += bias


class _Sum:
    """The gradient of a weight, to which the two parts of `rows` rows add theirs: the last one in its place, `into`
    (array, add to what is there?), the other in an array of its own until `finish`."""

    def __init__(self, into, rows):
        (self.out, self.add), self.rows = into, rows
        self.other, self.used = empty(self.out.shape, F32), False

    def add_part(self, stop, g, x):
        if stop == self.rows:
            gemm(g.T, x, self.out, self.add)
        else:
            gemm(g.T, x, self.other)
            self.used = True

    def finish(self):
        if self.used:
            np.add(self.out, self.other, out=self.out)


# ---- feed-forward ----------------------------------------------------------------------------------------------------


def _flat(forward, backward):
    """Both directions of an activation whose kernels take flat arrays, for rows: (h, a) and (h, da, dh)."""
    return (
        lambda h, a: forward(0, h.size, h.reshape(-1), a.reshape(-1)),
        lambda h, da, dh: backward(0, h.size, h.reshape(-1), da.reshape(-1), dh.reshape(-1)),
    )


def _swiglu_rows(h, a):
    width = a.shape[1]
    _swiglu(0, len(h), width, *_places(h[:, :width], h[:, width:]), a.ctypes.data)


def _swiglu_rows_backward(h, da, dh):
    width = da.shape[1]
    gate, value = _places(h[:, :width], h[:, width:]), _places(dh[:, :width], dh[:, width:])
    _swiglu_backward(0, len(h), width, *gate, da.ctypes.data, *value)


ACTIVATIONS = {
    "gelu": _flat(_gelu, _gelu_backward),
    "gelu_tanh": _flat(_gelu_tanh, _gelu_tanh_backward),
    "silu": _flat(_silu, _silu_backward),
    "relu2": _flat(_relu2, _relu2_backward),
    "swiglu": (_swiglu_rows, _swiglu_rows_backward),
}


def feed_forward(x, up, down, up_bias, down_bias, activation):
    """(y, h, a) of x (n, in): h = x @ up^T + up_bias, a = activation(h), y = a @ down^T + down_bias."""
    n, activate = len(x), ACTIVATIONS[activation][0]
    h, a, y = (empty((n, width), F32) for width in (len(up), down.shape[1], len(down)))

    def part(start, stop):
        rows = slice(start, stop)
        _linear(x[rows], up, up_bias, h[rows])
        activate(h[rows], a[rows])
        _linear(a[rows], down, down_bias, y[rows])

    pool().split(part, n, lead=GRAIN // (2 * up.size), align=16)
    return y, h, a


def feed_forward_backward(x, up, down, h, a, g, activation, need_x, into, biased):
    """(dx or None, [gradient of a bias or None, twice]); those of the weights go `into` two (array, add?)."""
    n, differentiate = len(x), ACTIVATIONS[activation][1]
    dx, da, dh = empty(x.shape, F32) if need_x else None, empty(a.shape, F32), empty(h.shape, F32)
    dup, ddown = (_Sum(place, n) for place in into)

    def part(start, stop):
        rows = slice(start, stop)
        gemm(g[rows], down, da[rows])
        ddown.add_part(stop, g[rows], a[rows])
        differentiate(h[rows], da[rows], dh[rows])
        dup.add_part(stop, dh[rows], x[rows])
        if need_x:
            gemm(dh[rows], up, dx[rows])

    pool().split(part, n, lead=GRAIN // (3 * up.size), align=16)
    dup.finish()
    ddown.finish()
    return dx, [reference.column_sum(np, d) if wanted else None for d, wanted in zip((dh, g), biased, strict=True)]


# ---- self-attention --------------------------------------------------------------------------------------------------


def _heads(packed, length, heads, groups):
    """Queries (B, H, T, d), keys and values (B, G, T, d) in rows (B * T, (H + 2 G) d)."""
    each = packed.reshape(-1, length, heads + 2 * groups, packed.shape[1] // (heads + 2 * groups)).swapaxes(1, 2)
    return each[:, :heads], each[:, heads : heads + groups], each[:, heads + groups :]


def self_attention(x, qkv, proj, qkv_bias, proj_bias, length, heads, groups, options):
    """(y, packed, out, lse) of x (B * T, in): packed = x @ qkv^T + qkv_bias, out (B * T, H d) = attention of its heads,
    y = out @ proj^T + proj_bias. options: causal, scale, dropout's p and identity."""
    n = len(x)
    packed, out, y = (empty((n, width), F32) for width in (len(qkv), proj.shape[1], len(proj)))
    q, k, v = _heads(packed, length, heads, groups)
    lse = empty((*q.shape[:3], 2), F32)
    arguments = forward_arguments(q, k, v, _heads(out, length, heads, 0)[0], lse, *options)

    def part(start, stop):
        rows = slice(start * length, stop * length)
        _linear(x[rows], qkv, qkv_bias, packed[rows])
        _forward(start * groups, stop * groups, *arguments)
        _linear(out[rows], proj, proj_bias, y[rows])

    texts = n // length
    pool().split(part, texts, lead=texts % 2)
    return y, packed, out, lse


def self_attention_backward(x, qkv, proj, packed, out, lse, g, length, heads, groups, options, need_x, into, biased):
    """(dx or None, [gradient of a bias or None, twice]); those of the weights go `into` two (array, add?)."""
    n = len(x)
    dx, dpacked, dout = empty(x.shape, F32) if need_x else None, empty(packed.shape, F32), empty(out.shape, F32)
    dqkv, dproj = (_Sum(place, n) for place in into)
    arguments = backward_arguments(
        *_heads(packed, length, heads, groups),
        *(_heads(rows, length, heads, 0)[0] for rows in (out, dout)),
        *_heads(dpacked, length, heads, groups),
        lse,
        *options,
    )

    def part(start, stop):
        rows = slice(start * length, stop * length)
        gemm(g[rows], proj, dout[rows])
        dproj.add_part(rows.stop, g[rows], out[rows])
        _backward(start * groups, stop * groups, *arguments)
        dqkv.add_part(rows.stop, dpacked[rows], x[rows])
        if need_x:
            gemm(dpacked[rows], qkv, dx[rows])

    texts = n // length
    pool().split(part, texts, lead=texts % 2)
    dqkv.finish()
    dproj.finish()
    return dx, [reference.column_sum(np, d) if wanted else None for d, wanted in zip((dpacked, g), biased, strict=True)]
