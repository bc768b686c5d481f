"""Products of float32 matrices in bfloat16, on processors that multiply it twice as fast or more (extra `bfloat16`).

Both operands are rounded to 16 bits on the way into the product and the sums are kept in float32, as PyTorch does under
`set_float32_matmul_precision("medium")`. Products run through oneDNN's `dnnl_gemm_bf16bf16f32` by ctypes. NumPy has no
bfloat16; here it is the upper half of a float32, held in uint16 arrays.
"""

import ctypes
import os
import sys
import threading
from functools import cache

import numpy as np

from .blas import TRANS, layout
from .pool import pool
from .precision import get_float32_matmul_precision

SMALL = 1 << 18  # multiply-adds below which rounding the operands costs more than it saves
_thread = threading.local()


@cache
def unavailable():
    """Why products on this CPU cannot be computed in bfloat16, one line; None where they can."""
    if os.environ.get("TENSORGRAD_BFLOAT16", "1") == "0":
        return "TENSORGRAD_BFLOAT16=0 says so"
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        flags = ""
    if not {"avx512_bf16", "amx_bf16"} & set(flags.split()):
        return "this processor has no bfloat16 products (avx512_bf16 or amx_bf16)"
    try:
        _library()
    except (OSError, AttributeError) as error:
        return str(error)
    return None


@cache
def _library():
    """oneDNN's product and OpenMP's thread setting. Raises OSError or AttributeError, saying what is missing."""
    path = os.path.join(sys.prefix, "lib", "libdnnl.so.3")
    if not os.path.exists(path):
        raise OSError('oneDNN is not installed: pip install -e ".[bfloat16]"')
    openmp, library = ctypes.CDLL("libgomp.so.1"), ctypes.CDLL(path)  # other builds of oneDNN start their own threads
    product = library.dnnl_gemm_bf16bf16f32
    openmp.omp_set_num_threads.argtypes = [ctypes.c_int]
    size, real, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    product.argtypes = [ctypes.c_char] * 2 + [size] * 3 + [real, pointer, size, pointer, size, real, pointer, size]
    product.restype = ctypes.c_int
    return product, openmp.omp_set_num_threads


def rounds(a, b):
    """Is the product of the matrices a and b computed in bfloat16? Small ones are not: rounding would cost more than it
    saves."""
    if get_float32_matmul_precision() != "medium" or a.dtype != np.float32 or b.dtype != np.float32 or unavailable():
        return False
    return a.size * b.shape[1] >= SMALL and min(*a.shape, b.shape[1]) >= 16


def rounded(a):
    """A float32 matrix rounded to bfloat16 (uint16); a transposed view gives a transposed view."""
    if not a.flags.c_contiguous and a.flags.f_contiguous:
        return rounded(a.T).T
    a = np.ascontiguousarray(a)
    out = np.empty(a.shape, np.uint16)
    pool().split(round_bits(), a.size, a.reshape(-1).view(np.uint32), out.reshape(-1), grain=1 << 15, align=16)
    return out


@cache
def round_bits():
    """round(start, stop, bits, out): the compiled one where Numba is, else NumPy's."""
    from . import LEVEL

    if LEVEL in ("fast", "numba"):
        try:
            from .compiled_bfloat16 import round_bits as compiled

            return compiled
        except ImportError:
            pass
    return _round_bits


def _round_bits(start, stop, bits, out):
    """out[start:stop] = float32s with these bits rounded to the nearest bfloat16, to even where two are as near; nan
    stays nan."""
    for i in range(start, stop, 1 << 15):
        j = min(i + (1 << 15), stop)
        b = bits[i:j]
        odd = (b >> np.uint32(16)) & np.uint32(1)
        odd += np.uint32(0x7FFF)
        odd += b
        odd >>= np.uint32(16)
        odd[(b & np.uint32(0x7FFFFFFF)) > 0x7F800000] = 0x7FC0
        out[i:j] = odd


def widen(bits):
    """The float32 values of bfloat16s (uint16)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def gemm(a, b, out, accumulate=False):
    """out (n, m) float32 = a (n, k) @ b (k, m) of bfloat16s, or += with `accumulate`. Transposed views are read in
    place."""
    (ta, lda), (tb, ldb), (_, ldc) = layout(a), layout(b), layout(out)
    product, set_threads = _library()
    if not getattr(_thread, "alone", False):  # OpenMP keeps one setting per thread: our pool is the only one
        set_threads(1)
        _thread.alone = True
    status = product(
        b"T" if ta == TRANS else b"N",
        b"T" if tb == TRANS else b"N",
        a.shape[0],
        b.shape[1],
        a.shape[1],
        1.0,
        a.ctypes.data,
        lda,
        b.ctypes.data,
        ldb,
        1.0 if accumulate else 0.0,
        out.ctypes.data,
        ldc,
    )
    if status:
        raise RuntimeError(f"oneDNN: dnnl_gemm_bf16bf16f32 failed with status {status}")
