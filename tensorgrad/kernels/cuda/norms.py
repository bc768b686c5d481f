"""Norms, also of sums, and rotary positions: what stands between the products of a block, one kernel each way."""

import numpy as np

from .common import finish, float32, kernels, other, whole
from .launch import launch
from .signatures import norm_strips

__all__ = [
    "add_layer_norm", "add_layer_norm_backward", "add_rms_norm", "add_rms_norm_backward",
    "layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward", "rotary",
]  # fmt: skip


def layer_norm(xp, x, weight, bias, eps):
    kind = kernels(xp, x)
    if kind is None:
        return other(x).layer_norm(xp, x, weight, bias, eps)
    return _layer_norm(xp, kind, x, None, weight, bias, eps)[:3]


def add_layer_norm(xp, x, r, weight, bias, eps):
    kind = kernels(xp, x)
    if kind is None:
        return other(x).add_layer_norm(xp, x, r, weight, bias, eps)
    return _layer_norm(xp, kind, x, r, weight, bias, eps)


def _layer_norm(xp, kind, x, r, weight, bias, eps):
    """Result, statistics and the sum of x and r, None where r is."""
    x, r, total = _summands(xp, x, r)
    y, (mean, rstd) = xp.empty(x.shape, x.dtype), (xp.empty((len(x), 1), np.float32) for _ in range(2))
    weight, bias = float32(xp, weight), float32(xp, bias)
    launch(xp, "layer_norm_forward", kind, x, r, weight, bias, total, y, mean, rstd, *x.shape, eps)
    return y, mean, rstd, total


def _summands(xp, x, r):
    """Both, contiguous, and room for their sum."""
    x = whole(xp, x)
    return (x, None, None) if r is None else (x, whole(xp, r), xp.empty(x.shape, x.dtype))


def layer_norm_backward(xp, x, weight, mean, rstd, g, affine):
    kind = kernels(xp, x)
    if kind is None:
        return other(x).layer_norm_backward(xp, x, weight, mean, rstd, g, affine)
    return _layer_norm_backward(xp, kind, x, weight, mean, rstd, g, None, affine)


def add_layer_norm_backward(xp, total, weight, mean, rstd, g, gtotal, affine):
    kind = kernels(xp, total)
    if kind is None:
        return other(total).add_layer_norm_backward(xp, total, weight, mean, rstd, g, gtotal, affine)
    return _layer_norm_backward(xp, kind, total, weight, mean, rstd, g, whole(xp, gtotal, total.dtype), affine)


def _layer_norm_backward(xp, kind, x, weight, mean, rstd, g, gtotal, affine):
    x, g = whole(xp, x), whole(xp, g, x.dtype)
    dx, sums = xp.empty(x.shape, x.dtype), (None, None)
    if affine:
        sums = [xp.empty((norm_strips(len(x)), x.shape[1]), np.float32) for _ in range(2)]
    launch(
        xp, "layer_norm_backward", kind,
        x, float32(xp, weight), mean, rstd, g, gtotal, dx, *sums, *x.shape,
    )  # fmt: skip
    return dx, *(None if s is None else finish(xp, s) for s in sums)


def rms_norm(xp, x, weight, eps):
    kind = kernels(xp, x)
    if kind is None:
        return other(x).rms_norm(xp, x, weight, eps)
    return _rms_norm(xp, kind, x, None, weight, eps)[:2]


def add_rms_norm(xp, x, r, weight, eps):
    kind = kernels(xp, x)
    if kind is None:
        return other(x).add_rms_norm(xp, x, r, weight, eps)
    return _rms_norm(xp, kind, x, r, weight, eps)


def _rms_norm(xp, kind, x, r, weight, eps):
    x, r, total = _summands(xp, x, r)
    y, rstd = xp.empty(x.shape, x.dtype), xp.empty((len(x), 1), np.float32)
    launch(xp, "rms_norm_forward", kind, x, r, float32(xp, weight), total, y, rstd, *x.shape, eps)
    return y, rstd, total


def rms_norm_backward(xp, x, weight, rstd, g, affine):
    kind = kernels(xp, x)
    if kind is None:
        return other(x).rms_norm_backward(xp, x, weight, rstd, g, affine)
    return _rms_norm_backward(xp, kind, x, weight, rstd, g, None, affine)


def add_rms_norm_backward(xp, total, weight, rstd, g, gtotal, affine):
    kind = kernels(xp, total)
    if kind is None:
        return other(total).add_rms_norm_backward(xp, total, weight, rstd, g, gtotal, affine)
    return _rms_norm_backward(xp, kind, total, weight, rstd, g, whole(xp, gtotal, total.dtype), affine)


def _rms_norm_backward(xp, kind, x, weight, rstd, g, gtotal, affine):
    x, g = whole(xp, x), whole(xp, g, x.dtype)
    dx = xp.empty(x.shape, x.dtype)
    partial = xp.empty((norm_strips(len(x)), x.shape[1]), np.float32) if affine else None
    launch(
        xp, "rms_norm_backward", kind,
        x, float32(xp, weight), rstd, g, gtotal, dx, partial, *x.shape,
    )  # fmt: skip
    return dx, None if partial is None else finish(xp, partial)


# ---- rotary positions ------------------------------------------------------------------------------------------------


def rotary(xp, x, cos, sin, adjoint):
    kind, table = kernels(xp, x), x.shape[-2:]
    tables = cos.size == sin.size == table[0] * table[1] and cos.shape[-2:] == sin.shape[-2:] == table
    apart = x.ndim == 4 and cos.shape == sin.shape == (len(x), 1, *table) and table[0] == 1  # a position per row
    if kind is None or not (tables or apart) or x.ndim > 4 or table[1] % 2 or x.strides[-1] != x.itemsize:
        return other(x).rotary(xp, x, cos, sin, adjoint)  # among others, a table for each row of a batch
    y = xp.empty(x.shape, x.dtype)
    heads = [a.reshape((1,) * (4 - x.ndim) + x.shape) for a in (x, y)]
    if apart:
        heads = [a.swapaxes(0, 2) for a in heads]
    strides = [s // x.itemsize for a in heads for s in a.strides[:3]]
    sign = -1.0 if adjoint else 1.0
    launch(xp, "rotary", kind, heads[0], float32(xp, cos), float32(xp, sin), heads[1], *heads[0].shape, *strides, sign)
    return y
