"""Linear layers whose weight is stored narrow and computes as float32.

A packed weight is an array (out, in) of uint16, which are the bits of bfloat16, of float16, or of int8; int8 comes with
`scale` (out, groups), float32: each of `groups` equal parts of a row counts so many times its integers (None for the
16-bit types). Reading the weights is what a product with few rows costs, so half or a quarter of the bytes is twice or
four times the speed at most; the whole matrix is never widened, only a block that fits the cache.
"""

import numpy as np

from . import LEVEL, routines
from .blas import gemm
from .pool import pool

BLOCK = 1 << 17  # elements that are widened at a time
FEW = 16  # rows of x up to which a product is bound by reading the weights


def widen(xp, weight, scale=None):
    """The float32 values of a packed weight, or of some of its rows with their scales."""
    if weight.dtype == np.uint16:
        bits = weight.astype(xp.uint32)
        bits <<= 16  # bfloat16 is the upper half of float32
        return bits.view(xp.float32)
    values = weight.astype(xp.float32)
    if scale is not None:
        values.reshape(*scale.shape, -1)[...] *= scale[..., None]
    return values


def linear(device, x, weight, scale, bias):
    """x (n, in) @ weight (out, in)^T + bias (out) -> (n, out) float32."""
    if device.type != "cpu" or LEVEL in ("composed", "reference"):
        y = x @ widen(device.xp, weight, scale).T
        return y if bias is None else y + bias
    few = getattr(routines(device), "few_rows", None) if 0 < len(x) <= FEW else None
    if few is not None and weight.flags.c_contiguous:
        return few(x, weight, scale, bias)
    y = np.empty((len(x), len(weight)), np.float32)

    def part(start, stop):
        for i, j in _blocks(start, stop, weight.shape[1]):
            block = widen(np, weight[i:j], None if scale is None else scale[i:j]).T
            if len(x) == 1:
                np.matmul(x, block, out=y[:, i:j])  # as a matrix-vector product
            else:
                gemm(x, block, y[:, i:j])
            if bias is not None:
                y[:, i:j] += bias[i:j]

    pool().split(part, len(weight), grain=max(1, BLOCK // max(weight.shape[1], 1)), align=16)
    return y


def linear_transposed(device, g, weight, scale):
    """g (n, out) @ weight (out, in) -> (n, in) float32: the gradient of `linear` with regard to x."""
    if device.type != "cpu" or LEVEL in ("composed", "reference"):
        return g @ widen(device.xp, weight, scale)
    rows, width = weight.shape
    out = np.zeros((len(g), width), np.float32)

    def part(start, stop):
        """Some of the result's columns: whole groups of the weight's columns, so that no two threads write one."""
        columns = slice(start * size, stop * size)
        for i, j in _blocks(0, rows, (stop - start) * size):
            own = None if scale is None else scale[i:j, start:stop]
            gemm(g[:, i:j], widen(np, weight[i:j, columns], own), out[:, columns], i > 0)

    if scale is not None and scale.shape[1] == 1:  # one scale per row: it may as well go to g
        g, scale = g * scale[:, 0], None
    size = 1 if scale is None else width // scale.shape[1]
    if out.size and rows:
        pool().split(part, width // size, grain=max(1, BLOCK // (rows * size)))
    return out


def _blocks(start, stop, width):
    step = max(16, BLOCK // max(width, 1))
    return [(i, min(i + step, stop)) for i in range(start, stop, step)]


def pack_int8(weight, group=None):
    """(int8 array, scale (out, groups)) of a float32 weight (out, in): each group of `group` numbers of a row (None:
    the whole row) is rounded to 255 steps between minus and plus its largest magnitude."""
    out, width = weight.shape
    groups = weight.reshape(out, -1, group or max(width, 1))  # (out, groups, group)
    scale = np.abs(groups).max(axis=2, initial=0).astype(np.float32) / np.float32(127)
    steps = groups / np.where(scale == 0, 1, scale)[..., None]
    return np.rint(steps, out=steps).astype(np.int8).reshape(out, width), scale


def pack_bfloat16(weight):
    """The bits (uint16) of the bfloat16 numbers nearest to float32 ones, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(weight), np.uint16(0x7FC0), rounded)
