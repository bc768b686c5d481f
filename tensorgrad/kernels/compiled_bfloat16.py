"""Rounding to bfloat16, compiled by Numba (extra `fast`)."""

import numpy as np

from .compiled_math import njit_fast

_HALF, _ONE, _ABS, _INF, _NAN, _16 = (np.uint32(v) for v in (0x7FFF, 1, 0x7FFFFFFF, 0x7F800000, 0x7FC0, 16))


@njit_fast
def round_bits(start, stop, bits, out):
    """See bfloat16._round_bits."""
    bits, out = bits[start:stop], out[start:stop]
    for i in range(bits.size):
        b = bits[i]
        rounded = np.uint32(b + np.uint32(_HALF + np.uint32(np.uint32(b >> _16) & _ONE))) >> _16
        out[i] = np.uint16(_NAN if np.uint32(b & _ABS) > _INF else rounded)
