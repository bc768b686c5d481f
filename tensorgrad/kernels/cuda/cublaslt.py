"""cuBLASLt by ctypes: products whose algorithms are timed once per shape, with the bias added on the way out.

CuPy has no binding of it, and its cuBLAS calls cannot be captured into CUDA graphs; these can. Used inside
`tg.cuda.graph`, and everywhere with TENSORGRAD_CUBLASLT=1; what it refuses goes through cuBLAS (gemm.py)."""

import os
import warnings
from ctypes import (
    CDLL,
    Structure,
    byref,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
    sizeof,
)

import numpy as np

from ..precision import are_deterministic_algorithms_enabled

TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType
COMPUTE_32F, COMPUTE_TF32 = 68, 77
TRANS_A, TRANS_B, EPILOGUE, BIAS_POINTER, BIAS_TYPE = 3, 4, 7, 8, 26  # attributes of a product
BATCH_COUNT, BATCH_STRIDE = 5, 6  # of a layout
MAX_WORKSPACE = 1  # of a preference
ALIGNMENTS = 5, 6, 7, 8  # of a preference: bytes, of the operands and results
EPILOGUE_BIAS = 4
WORKSPACE = 32 << 20  # bytes
OFFERS, REPEATS = 8, 3  # algorithms that are timed, and how often each

_states = {}  # (array module, GPU) -> CublasLt or None
_captures = 0  # graphs being captured


class _Result(Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


def capturing(change):
    """Count a capture in (1) or out (-1)."""
    global _captures
    _captures += change


def lt_for(xp):
    """The CublasLt of the current GPU where it is to be used, else None."""
    if not _captures and os.environ.get("TENSORGRAD_CUBLASLT", "0") != "1":
        return None
    key = xp, xp.cuda.Device().id
    if key not in _states:
        try:
            _states[key] = CublasLt(xp, load())
        except Exception as error:
            _states[key] = None
            warnings.warn(f"cuBLASLt cannot be used: {str(error).splitlines()[0]}", stacklevel=2)
    return _states[key]


def load():
    """The library, where CuPy finds it too."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)


def check(status):
    if status:
        raise RuntimeError(f"cuBLASLt: status {status}")


class CublasLt:
    """Products on one GPU. `plans` keeps descriptions and algorithms by shape."""

    def __init__(self, xp, library):
        self.xp, self.lib, self.plans = xp, library, {}
        self.handle = c_void_p()
        check(library.cublasLtCreate(byref(self.handle)))
        self.workspace = xp.empty(WORKSPACE, np.uint8)

    def gemm(self, a, b, out, left, right, place, count, alpha, beta, compute, bias=None):
        """As gemm.py's `_call`: operands as (transposed?, leading dimension, batch stride). False where no algorithm is
        offered. `bias`: an array (m,) of out's dtype."""
        (n, k), m = a.shape[-2:], b.shape[-1]
        aligned = tuple(map(_alignment, (b, a, out, out)))  # parts of flat buffers and packed projections are views
        if bias is not None:  # there is no wish of its own for it
            aligned = *aligned[:3], min(aligned[3], _alignment(bias))
        key = (n, k, m, left, right, place, count, a.dtype.name, out.dtype.name, compute, beta != 0, bias is not None,
               aligned)  # fmt: skip
        if key not in self.plans:
            plan = self._plan(n, k, m, left, right, place, count, a, out, compute, bias, aligned)
            if plan is not None and self.xp.cuda.get_current_stream().is_capturing():
                return self._run(plan[0], plan[1], plan[2][0], a, b, out, alpha, beta, bias) == 0  # none can be timed
            self.plans[key] = None if plan is None else self._fastest(*plan, a, b, out, alpha, beta, bias)
        plan = self.plans[key]
        if plan is None:
            return False
        check(self._run(*plan, a, b, out, alpha, beta, bias))
        return True

    def _run(self, desc, layouts, result, a, b, out, alpha, beta, bias):
        """The product by the algorithm `result`; its status."""
        if bias is not None:
            self._set_desc(desc, BIAS_POINTER, c_void_p(bias.data.ptr))
        one, two = c_float(alpha), c_float(beta)
        return self.lib.cublasLtMatmul(
            self.handle, desc, byref(one), c_void_p(b.data.ptr), layouts[0], c_void_p(a.data.ptr), layouts[1],
            byref(two), c_void_p(out.data.ptr), layouts[2], c_void_p(out.data.ptr), layouts[2], byref(result.algo),
            c_void_p(self.workspace.data.ptr), c_size_t(WORKSPACE),
            c_void_p(self.xp.cuda.get_current_stream().ptr),
        )  # fmt: skip

    def _fastest(self, desc, layouts, results, a, b, out, alpha, beta, bias):
        """(desc, layouts, the algorithm that is fastest here), None where none works; waits for the GPU, once per
        shape. Deterministic algorithms: the one offered first, since clocks do not repeat themselves."""
        if beta:  # must not be added to yet; without, `out` is written anew anyway
            out = self._room_like(out)
        cuda, times = self.xp.cuda, []
        for i, result in enumerate(results):
            if self._run(desc, layouts, result, a, b, out, alpha, beta, bias):
                continue
            if are_deterministic_algorithms_enabled():
                return desc, layouts, result
            start, end = cuda.Event(), cuda.Event()
            start.record()
            for _ in range(REPEATS):
                self._run(desc, layouts, result, a, b, out, alpha, beta, bias)
            end.record()
            end.synchronize()
            times.append((cuda.get_elapsed_time(start, end), i))
        return (desc, layouts, results[min(times)[1]]) if times else None

    def _room_like(self, x):
        """Memory for an array of x's shape and strides."""
        span = sum((size - 1) * stride for size, stride in zip(x.shape, x.strides, strict=True)) // x.itemsize + 1
        flat = self.xp.zeros(span, x.dtype)
        return self.xp.lib.stride_tricks.as_strided(flat, x.shape, x.strides)

    def _plan(self, n, k, m, left, right, place, count, a, out, compute, bias, aligned):
        """(desc, layouts, the algorithms that cuBLASLt offers), None where it offers none."""
        desc, layouts = self.describe(n, k, m, left, right, place, count, a.dtype.name, out.dtype.name, compute, bias)
        if bias is not None:  # an algorithm may be asked whether it can read it
            self._set_desc(desc, BIAS_POINTER, c_void_p(bias.data.ptr))
        preference = prefer(self.lib, aligned)
        results, found = (_Result * OFFERS)(), c_int()
        status = self.lib.cublasLtMatmulAlgoGetHeuristic(
            self.handle, desc, layouts[0], layouts[1], layouts[2], layouts[2], preference, OFFERS, results, byref(found)
        )
        self.lib.cublasLtMatmulPreferenceDestroy(preference)
        offered = [] if status else [r for r in results[: found.value] if not r.status and r.workspace <= WORKSPACE]
        return (desc, layouts, offered) if offered else None

    def describe(self, n, k, m, left, right, place, count, kind, kind_out, compute, bias):
        """(description, layouts of b, a and out): row-major out = a b is column-major out^T = b^T a^T."""
        return describe(self.lib, n, k, m, left, right, place, count, kind, kind_out, compute, bias is not None)

    def _set_desc(self, desc, attribute, value):
        check(self.lib.cublasLtMatmulDescSetAttribute(desc, attribute, byref(value), c_size_t(sizeof(value))))


def _alignment(x):
    """A power of two up to 256 that divides x's address; few are told apart, since each means another plan."""
    largest = x.data.ptr & -x.data.ptr
    return 256 if largest >= 256 else min(largest, 16)


def prefer(lib, aligned):
    """What algorithms may need: WORKSPACE, and addresses of b, a and out (twice) aligned to so many bytes."""
    preference, size = c_void_p(), c_uint64(WORKSPACE)
    check(lib.cublasLtMatmulPreferenceCreate(byref(preference)))
    check(lib.cublasLtMatmulPreferenceSetAttribute(preference, MAX_WORKSPACE, byref(size), c_size_t(8)))
    for attribute, value in zip(ALIGNMENTS, map(c_uint32, aligned), strict=True):
        check(lib.cublasLtMatmulPreferenceSetAttribute(preference, attribute, byref(value), c_size_t(4)))
    return preference


def describe(lib, n, k, m, left, right, place, count, kind, kind_out, compute, has_bias):
    """See CublasLt.describe; needs no GPU."""
    desc = c_void_p()
    check(lib.cublasLtMatmulDescCreate(byref(desc), c_int(compute), c_int(TYPES["float32"])))
    attributes = {TRANS_A: c_int32(right[0]), TRANS_B: c_int32(left[0])}
    if has_bias:
        attributes |= {EPILOGUE: c_uint32(EPILOGUE_BIAS), BIAS_TYPE: c_int32(TYPES[kind_out])}
    for attribute, value in attributes.items():
        check(lib.cublasLtMatmulDescSetAttribute(desc, attribute, byref(value), c_size_t(sizeof(value))))
    layouts = []
    for (transposed, leading, batch), rows, columns, dtype in (
        (right, m, k, kind), (left, k, n, kind), (place, m, n, kind_out),
    ):  # fmt: skip
        rows, columns = (columns, rows) if transposed else (rows, columns)
        layout = c_void_p()
        sizes = c_uint64(rows), c_uint64(columns), c_int64(leading)
        check(lib.cublasLtMatrixLayoutCreate(byref(layout), c_int(TYPES[dtype]), *sizes))
        for attribute, value in ((BATCH_COUNT, c_int32(count)), (BATCH_STRIDE, c_int64(batch))) if count > 1 else ():
            check(lib.cublasLtMatrixLayoutSetAttribute(layout, attribute, byref(value), c_size_t(sizeof(value))))
        layouts.append(layout)
    return desc, layouts
