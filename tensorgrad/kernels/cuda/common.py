"""What the CUDA routines share: which kernels an array can have, the layouts they want, sums over strips of rows."""

import numpy as np

from .. import reference
from ..half import HalfRoutines, is_half
from .launch import has_kernels, launch
from .signatures import CPP

_half = HalfRoutines(reference)


def other(x):
    """The reference's routines for arrays like `x`."""
    return _half if is_half(x.dtype) else reference


def kernels(xp, x):
    """The type of kernels for arrays like `x`, or None."""
    name = x.dtype.name
    return name if name in CPP and x.size and has_kernels(xp) else None


def rows(x):
    """(rows, width) of x flattened to a matrix, for what looks at elements one by one."""
    width = x.shape[-1] if x.ndim else 1
    return x.size // width, width


def whole(xp, x, dtype=None):
    """x, contiguous and of this dtype: itself where it is so already."""
    if not x.flags.c_contiguous:
        x = x.copy()
    return x if dtype is None or x.dtype == dtype else x.astype(dtype)


def float32(xp, x):
    return None if x is None else whole(xp, x, np.float32)


def finish(xp, partial):
    """The sum over strips, float32 (width,)."""
    out = xp.empty(partial.shape[1], np.float32)
    launch(xp, "column_sum_finish", (), partial, out, *partial.shape)
    return out
