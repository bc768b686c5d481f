"""reference_block.py for NumPy on a CPU, in blocks that fit the cache, over the pool."""

import numpy as np

from . import reference_block as reference
from .blocks import BLOCK, by_rows, spread
from .memory import empty
from .pool import pool

__all__ = ["relu2", "relu2_backward", "rotary", "swiglu", "swiglu_backward"]


def swiglu(xp, gate, value):
    y = empty(gate.shape, gate.dtype)

    def block(i, j):
        y[i:j] = reference.swiglu(np, gate[i:j], value[i:j])

    by_rows(block, *gate.shape)
    return y


def swiglu_backward(xp, gate, value, g, dgate, dvalue):
    by_rows(
        lambda i, j: reference.swiglu_backward(np, *(a[i:j] for a in (gate, value, g, dgate, dvalue))), *gate.shape
    )


def relu2(xp, x):
    return spread(lambda v: reference._relu2(np, v), empty(x.shape, x.dtype), x)


def relu2_backward(xp, x, g):
    return spread(lambda x, g: reference._relu2_backward(np, x, g), empty(x.shape, x.dtype), x, g)


def rotary(xp, x, cos, sin, adjoint):
    if x.ndim != 4 or x.size <= BLOCK // 4 or not (cos.ndim == 2 or cos.shape[:2] == (x.shape[0], 1)):
        return reference.rotary(xp, x, cos, sin, adjoint)
    batch, heads, rows, width = x.shape
    y = empty((batch, rows, heads, width), x.dtype).transpose(0, 2, 1, 3)  # heads side by side in memory

    def part(start, stop):
        for task in range(start, stop):
            b, h = divmod(task, heads)
            tables = (cos, sin) if cos.ndim == 2 else (cos[b, 0], sin[b, 0])
            y[b, h] = reference.rotary(np, x[b, h], *tables, adjoint)

    pool().split(part, batch * heads)
    return y
