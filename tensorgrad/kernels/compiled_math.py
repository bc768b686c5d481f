"""Functions of one float32 for the compiled kernels, written so that loops around them vectorise.

exp is a polynomial (2^n times a power series of the rest), because a call of the C library's does not vectorise; erf
comes from erf.py's coefficients.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from . import erf
from .erf import _erfc_scaled

EXACT = {"contract", "nsz", "arcp"}  # no reordering: exp splits a constant in two on purpose
_FILES = [Path(erf.__file__), *sorted(Path(__file__).parent.glob("compiled*.py"))]
_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in _FILES)).hexdigest()


def _compiled(fastmath):
    """The decorator of a kernel: compiled when first called, kept on disk, run without the GIL."""

    def decorate(function):
        kernel = njit(function, nogil=True, cache=True, fastmath=fastmath, error_model="numpy")  # x / 0 is not checked
        file = getattr(getattr(kernel, "_cache", None), "_cache_file", None)
        if hasattr(file, "_source_stamp"):  # Numba looks at the kernel's own file alone, not at those whose functions
            file._source_stamp = (file._source_stamp, _SOURCES)  # it calls, and would run outdated ones
        return kernel

    return decorate


njit_fast, njit_exact = _compiled(True), _compiled(EXACT)

F32 = np.float32
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = (
    F32(c)
    for c in np.polynomial.Chebyshev.interpolate(np.exp, 6, [-0.3466, 0.3466])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)
_P = tuple(F32(c) for c in _erfc_scaled(9, 0.0))
_LOG2E, _LN2_HIGH, _LN2_LOW = F32(1.44269504), F32(0.693359375), F32(-2.12194440e-4)
HALF, ONE, TWO = F32(0.5), F32(1), F32(2)
NOT_FINITE = np.int32(0x7F800000)
_SQRT_HALF, INV_SQRT_2PI = F32(math.sqrt(0.5)), F32(1 / math.sqrt(2 * math.pi))


@intrinsic
def _float_of_bits(typingctx, bits):
    """The float32 with these 32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _bits_of_float(typingctx, x):
    """The 32 bits of a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@njit_fast
def magnitude(x):
    """An integer that grows with |x|, and is at least NOT_FINITE for an infinity or nan, which comparisons of floats
    may overlook under fastmath."""
    return np.int32(_bits_of_float(x) & np.int32(0x7FFFFFFF))


@njit_fast
def ordered(x):
    """An integer with the order of the floats: of maxima, LLVM vectorises those of integers alone."""
    bits = _bits_of_float(x)
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@njit_fast
def from_ordered(key):
    """The float of which `ordered` made this integer."""
    return _float_of_bits(np.int32(key ^ np.int32((key >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@njit_fast
def largest(row):
    """The largest of a row of finite floats (or with infinities) that is not empty."""
    top = ordered(row[0])
    for j in range(row.size):
        top = max(top, ordered(row[j]))
    return from_ordered(np.int32(top))


@intrinsic
def pointer(typingctx, address):
    """The float32 pointer of an address; numba.carray makes an array of it."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.intp), codegen


@njit_exact
def exp(x):
    """exp of a float32, to 2 units in the last place; below -87 it is 0 to float32's precision."""
    x = min(max(x, F32(-87.0)), F32(88.0))
    n = np.floor(x * _LOG2E + HALF)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = _E0 + r * (_E1 + r * (_E2 + r * (_E3 + r * (_E4 + r * (_E5 + r * _E6)))))
    return p * _float_of_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))


@njit_exact
def shifted(x, top, rest):
    """x - top - rest, in this order: top is large and rest would drown in it."""
    return (x - top) - rest


@njit_exact
def exp_shifted(x, top, rest):
    """exp(x - top - rest), in the same order."""
    return exp(shifted(x, top, rest))


@njit_exact
def logistic(e):
    """s = 1 / (1 + e) and its slope s (1 - s) = (e s) s, in this order: 1 - s loses digits, e s s might overflow."""
    s = ONE / (ONE + e)
    return s, (e * s) * s


@njit_exact
def normal_tail(x, e):
    """1 - Phi(|x|) from x and e = exp(-x^2 / 2)."""
    t = TWO / (TWO + abs(x) * _SQRT_HALF)
    f = _P[0]
    f = f * t + _P[1]
    f = f * t + _P[2]
    f = f * t + _P[3]
    f = f * t + _P[4]
    f = f * t + _P[5]
    f = f * t + _P[6]
    f = f * t + _P[7]
    f = f * t + _P[8]
    f = f * t + _P[9]
    return e * f * HALF


@njit_fast
def hash32(number, multiplier, offset):
    """The bits that decide about dropout of one element; see reference.dropout_mask. Numba widens every result."""
    h = np.uint32(np.uint32(np.uint32(number) * multiplier) + offset)
    h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D))
    h = np.uint32((h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(h ^ (h >> np.uint32(16)))
