"""Walking over arrays in blocks that fit the cache, in one thread or over the pool."""

import numpy as np

from .pool import pool

# Elements per block of a multi-pass routine. Its temporaries should stay in the cache; on the other hand threads meet
# at the GIL after each pass, and the one that must wait and be woken loses the time of a pass over 65536 elements.
BLOCK = 1 << 17


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


def spread(function, out, *arrays):
    """out[...] = function(*arrays) in blocks over the pool, for contiguous arrays; else at once."""
    if out.size < 2 * BLOCK or not all(a.flags.c_contiguous for a in (out, *arrays)):
        return blockwise(function, out, *arrays)
    flat, parts = out.reshape(-1), [a.reshape(-1) for a in arrays]

    def part(start, stop):
        for i in range(start, stop, BLOCK):
            j = min(i + BLOCK, stop)
            flat[i:j] = function(*(p[i:j] for p in parts))

    pool().split(part, flat.size, grain=BLOCK, align=16)
    return out


def by_rows(function, rows, width):
    """function(start, stop) over blocks of rows, spread over the pool."""
    step = max(1, BLOCK // max(width, 1))

    def part(start, stop):
        for i in range(start, stop, step):
            function(i, min(i + step, stop))

    pool().split(part, rows, grain=max(1, BLOCK // max(width, 1)))
