"""Matrix products through the BLAS libraries at hand, by ctypes: NumPy's own OpenBLAS, or MKL (extra `mkl`).

Called directly for what NumPy does not offer: adding into an existing array (beta = 1), MKL, and the number of threads.
ctypes releases the GIL during a call.
"""

import ctypes
import glob
import os
import platform
import sys
from functools import cache

import numpy as np

ROW_MAJOR, NO_TRANS, TRANS = 101, 111, 112


@cache
def _openblas():
    """NumPy's bundled OpenBLAS with the suffix of its symbols, or (None, "")."""
    folder = os.path.dirname(os.path.dirname(np.__file__))
    patterns = ("numpy.libs/*openblas*", "numpy/.dylibs/*openblas*")
    for path in (p for pattern in patterns for p in glob.glob(os.path.join(folder, pattern))):
        library = ctypes.CDLL(path)
        for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("", "")):
            if hasattr(library, f"{prefix}cblas_sgemm{suffix}"):
                return library, prefix, suffix
    return None, "", ""


def _mkl_is_fast():
    """On Intel's processors MKL beats OpenBLAS by about a tenth; on others it runs code that is half as fast. A rule
    and not a timing, because the two differ in the last bits and a run must repeat."""
    try:
        with open("/proc/cpuinfo") as file:
            return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in file)
    except OSError:  # no Linux
        return "GenuineIntel" in platform.processor()


@cache
def mkl():
    """MKL's single dynamic library, sequential, or None: where it is installed and fast, or TENSORGRAD_BLAS says mkl
    (openblas: never)."""
    choice = os.environ.get("TENSORGRAD_BLAS", "")
    if choice not in ("", "mkl", "openblas"):
        raise ValueError(f"TENSORGRAD_BLAS must be mkl or openblas, not {choice!r}")
    if choice == "openblas" or not (choice or _mkl_is_fast()):
        return None
    for folder in (os.path.join(sys.prefix, "lib"), os.path.join(sys.prefix, "Library", "bin")):
        for path in sorted(
            glob.glob(os.path.join(folder, "libmkl_rt.so*")) + glob.glob(os.path.join(folder, "mkl_rt*.dll"))
        ):
            try:
                library = ctypes.CDLL(path)
                library.MKL_Set_Threading_Layer(1)  # sequential: our pool is the only one
                return library
            except OSError:
                continue
    return None


def limit_threads():
    """Let NumPy's BLAS run in the calling thread alone: parallel work is split by the pool."""
    library, prefix, suffix = _openblas()
    if library is not None:
        getattr(library, f"{prefix}openblas_set_num_threads{suffix}")(1)
    elif "threadpoolctl" in sys.modules:
        sys.modules["threadpoolctl"].threadpool_limits(1, "blas")


@cache
def _function(kind):
    """cblas_sgemm / cblas_dgemm, of MKL where there, else of OpenBLAS; None without either."""
    library = mkl()
    integer = ctypes.c_int32
    if library is not None:
        function = getattr(library, f"cblas_{kind}gemm")
    else:
        library, prefix, suffix = _openblas()
        if library is None:
            return None
        function = getattr(library, f"{prefix}cblas_{kind}gemm{suffix}")
        integer = ctypes.c_int64 if suffix == "64_" else ctypes.c_int32
    real = ctypes.c_float if kind == "s" else ctypes.c_double
    function.argtypes = (
        [ctypes.c_int] * 3
        + [integer] * 3
        + [real, ctypes.c_void_p, integer, ctypes.c_void_p, integer, real, ctypes.c_void_p, integer]
    )
    function.restype = None
    return function


def layout(a):
    """(transposed?, leading dimension) of a matrix that BLAS reads without a copy, or None."""
    size, (rows, columns) = a.itemsize, a.shape
    s0, s1 = a.strides
    if s1 == size and s0 >= columns * size and s0 % size == 0:
        return NO_TRANS, max(s0 // size, 1)
    if s0 == size and s1 >= rows * size and s1 % size == 0:
        return TRANS, max(s1 // size, 1)
    return None


def gemm(a, b, out, accumulate=False):
    """out (n, m) = a (n, k) @ b (k, m), or += with `accumulate`; transposed views are read in place."""
    if a.shape[1] != b.shape[0] or out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"gemm: {a.shape} @ {b.shape} does not fit {out.shape}")
    if not accumulate and mkl() is None:
        np.matmul(a, b, out=out)  # the same function of OpenBLAS, 8 us sooner
        return
    function = (
        _function("s" if a.dtype == np.float32 else "d")
        if a.dtype == b.dtype == out.dtype and a.dtype.char in "fd"
        else None
    )
    layouts = (layout(a), layout(b), layout(out))
    if function is None or None in layouts or layouts[2][0] != NO_TRANS or not a.size or not b.size:
        if accumulate:
            out += a @ b
        else:
            np.matmul(a, b, out=out)
        return
    (ta, lda), (tb, ldb), (_, ldc) = layouts
    function(
        ROW_MAJOR,
        ta,
        tb,
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
