"""reference_block.py for float32 on a CPU, compiled by Numba, one pass over the memory each. What is strided is handed
over as addresses and strides: compiled code then sees contiguous rows, and its loops vectorise."""

import numpy as np
from numba import carray

from . import threaded_block as threaded
from .compiled import _flat, usable
from .compiled_math import F32, ONE, TWO, exp, logistic, njit_exact, njit_fast, pointer
from .memory import empty, empty_like
from .pool import pool

__all__ = ["relu2", "relu2_backward", "rotary", "swiglu", "swiglu_backward"]

ZERO = F32(0)


# ---- SwiGLU, squared ReLU --------------------------------------------------------------------------------------------


@njit_fast
def _swiglu(start, stop, width, gate, gate_step, value, value_step, y):
    """gate, value, y: addresses of rows `width` long; steps from row to row in bytes (of y: its width)."""
    for i in range(start, stop):
        a, b = carray(pointer(gate + i * gate_step), width), carray(pointer(value + i * value_step), width)
        out = carray(pointer(y + i * width * 4), width)
        for j in range(width):
            out[j] = a[j] / (ONE + exp(-a[j])) * b[j]


@njit_fast
def _swiglu_backward(start, stop, width, gate, gate_step, value, value_step, g, da, da_step, db, db_step):
    for i in range(start, stop):
        a, b = carray(pointer(gate + i * gate_step), width), carray(pointer(value + i * value_step), width)
        grad = carray(pointer(g + i * width * 4), width)
        dgate, dvalue = carray(pointer(da + i * da_step), width), carray(pointer(db + i * db_step), width)
        for j in range(width):
            x, u, v = a[j], b[j], grad[j]
            s, slope = logistic(exp(-x))
            dgate[j] = v * u * (s + x * slope)
            dvalue[j] = v * x * s


def _rows_of(*arrays):
    """Are these float32 matrices whose rows are contiguous each?"""
    return all(a.dtype == np.float32 and a.strides[-1] == 4 for a in arrays)


def _places(*arrays):
    """(address, step from row to row in bytes) of each array, one after the other."""
    return [n for a in arrays for n in (a.ctypes.data, a.strides[0])]


def _grain(width):
    return max(1, (1 << 16) // max(width, 1))


def swiglu(xp, gate, value):
    if not gate.size or not _rows_of(gate, value):
        return threaded.swiglu(xp, gate, value)
    y = empty(gate.shape, np.float32)
    rows, width = gate.shape
    pool().split(_swiglu, rows, width, *_places(gate, value), y.ctypes.data, grain=_grain(width), lead=_grain(width))
    return y


def swiglu_backward(xp, gate, value, g, dgate, dvalue):
    if not gate.size or not _rows_of(gate, value, g, dgate, dvalue) or not g.flags.c_contiguous:
        return threaded.swiglu_backward(xp, gate, value, g, dgate, dvalue)
    rows, width = gate.shape
    places = (*_places(gate, value), g.ctypes.data, *_places(dgate, dvalue))
    pool().split(_swiglu_backward, rows, width, *places, grain=_grain(width), lead=_grain(width))


@njit_exact
def _relu2(start, stop, x, y):
    x, y = x[start:stop], y[start:stop]
    for i in range(x.size):
        v = ZERO if x[i] < ZERO else x[i]  # in this form nan stays nan
        y[i] = v * v


@njit_exact
def _relu2_backward(start, stop, x, g, dx):
    x, g, dx = x[start:stop], g[start:stop], dx[start:stop]
    for i in range(x.size):
        dx[i] = (ZERO if x[i] < ZERO else x[i]) * TWO * g[i]


def relu2(xp, x):
    return _flat(_relu2, x, empty_like(x)) if usable(x) else threaded.relu2(xp, x)


def relu2_backward(xp, x, g):
    return _flat(_relu2_backward, x, g, empty_like(x)) if usable(x, g) else threaded.relu2_backward(xp, x, g)


# ---- rotary positions ------------------------------------------------------------------------------------------------


@njit_fast
def _rotary(start, stop, x, y, cos, sin, x_steps, y_steps, table_steps, heads, rows, half, adjoint):
    """Addresses; steps in bytes over batch, head and row (tables: batch and row)."""
    for task in range(start, stop):
        b, t = task // rows, task % rows
        place = b * table_steps[0] + t * table_steps[1]
        cos_low, cos_high = carray(pointer(cos + place), half), carray(pointer(cos + place + 4 * half), half)
        sin_low, sin_high = carray(pointer(sin + place), half), carray(pointer(sin + place + 4 * half), half)
        for h in range(heads):
            source = x + b * x_steps[0] + h * x_steps[1] + t * x_steps[2]
            target = y + b * y_steps[0] + h * y_steps[1] + t * y_steps[2]
            low, high = carray(pointer(source), half), carray(pointer(source + 4 * half), half)
            out_low, out_high = carray(pointer(target), half), carray(pointer(target + 4 * half), half)
            if adjoint:
                for j in range(half):
                    a, z = low[j], high[j]
                    out_low[j], out_high[j] = a * cos_low[j] + z * sin_high[j], z * cos_high[j] - a * sin_low[j]
            else:
                for j in range(half):
                    a, z = low[j], high[j]
                    out_low[j], out_high[j] = a * cos_low[j] - z * sin_low[j], z * cos_high[j] + a * sin_high[j]


def rotary(xp, x, cos, sin, adjoint):
    if x.ndim != 4 or not x.size or not _rows_of(x, cos, sin) or cos.strides != sin.strides:
        return threaded.rotary(xp, x, cos, sin, adjoint)
    batch, heads, rows, width = x.shape
    if cos.shape == (rows, width):
        table_steps = (0, cos.strides[0])
    elif cos.shape == (batch, 1, rows, width):
        table_steps = (cos.strides[0], cos.strides[2])
    else:
        return threaded.rotary(xp, x, cos, sin, adjoint)
    y = empty((batch, rows, heads, width), np.float32).transpose(0, 2, 1, 3)  # heads side by side in memory
    addresses = [a.ctypes.data for a in (x, y, cos, sin)]
    pool().split(
        _rotary,
        batch * rows,
        *addresses,
        x.strides[:3],
        y.strides[:3],
        table_steps,
        heads,
        rows,
        width // 2,
        adjoint,
        grain=_grain(heads * width),
        lead=_grain(heads * width),
    )
    return y
