"""Matrix products through cuBLAS: 2-D and strided-batched, any transposition without a copy, 16-bit inputs with float32
sums, and accumulation into the output (weight gradients go straight into float32 storage).

CuPy's own matmul copies transposed operands beyond two dimensions, computes float16 there in float32, and fails for
bfloat16; its 2-D product cannot write float32 from 16 bits. The raw calls have none of these limits."""

import math

import numpy as np

from ..precision import get_float32_matmul_precision
from .cublaslt import lt_for

_KINDS = {"float32": "CUDA_R_32F", "float64": "CUDA_R_64F", "float16": "CUDA_R_16F", "bfloat16": "CUDA_R_16BF"}
_OUTPUTS = {("float32", "float32"), ("float64", "float64"), ("float16", "float16"), ("bfloat16", "bfloat16"),
            ("float16", "float32"), ("bfloat16", "float32")}  # fmt: skip


def supported(a, b, out=None):
    """Does cuBLAS multiply these arrays (into that one)?"""
    pair = a.dtype.name, (b if out is None else out).dtype.name
    return a.dtype == b.dtype and pair in _OUTPUTS


def gemm(xp, a, b, out=None, alpha=1.0, beta=0.0, bias=None):
    """alpha * a @ b + beta * out + bias, into `out` (new unless given) for a (..., n, k), b (..., k, m) with equal
    leading sizes; `out` may be float32 for 16-bit inputs. Operands that cuBLAS cannot read in place are copied.
    `bias`: None or (m,) of out's dtype, for which cuBLASLt needs no pass of its own (`adds_bias`)."""
    if out is None:
        out = xp.empty((*a.shape[:-1], b.shape[-1]), a.dtype)
    if not out.size:
        return out
    if not a.shape[-1]:
        out[...] = 0 if beta == 0 else out * beta
        if bias is not None:
            out += bias
        return out
    place = _operand(out)
    if place is None or place[0]:  # its rows must lie one after the other in memory
        new = xp.ascontiguousarray(out) if beta else xp.empty(out.shape, out.dtype)
        out[...] = gemm(xp, a, b, new, alpha, beta, bias)
        return out
    left, right = _operand(a), _operand(b)
    if left is None:
        a = xp.ascontiguousarray(a)
        left = _operand(a)
    if right is None:
        b = xp.ascontiguousarray(b)
        right = _operand(b)
    _call(xp, a, b, out, left, right, place, alpha, beta, bias)
    return out


def adds_bias(xp, dtype):
    """Does the product itself add a bias?"""
    return dtype != np.float64 and lt_for(xp) is not None


def _operand(x):
    """(transposed?, leading dimension, batch stride) of an array (..., rows, columns) as cuBLAS reads it, in elements,
    or None where it cannot: columns (or rows) must be neighbours, and the batch evenly spaced."""
    (rows, columns), item = x.shape[-2:], x.itemsize
    row, column = x.strides[-2] // item, x.strides[-1] // item
    if columns == 1 or column == 1:
        transposed, leading = False, row if rows > 1 else columns
        if columns == 1 and column != 1 and rows > 1 and row == 1:
            transposed, leading = False, 1
        if leading < columns:
            return None
    elif rows == 1 or row == 1:
        transposed, leading = True, column if columns > 1 else rows
        if leading < rows:
            return None
    else:
        return None
    batch, expected = 0, None
    for size, stride in zip(reversed(x.shape[:-2]), reversed(x.strides[:-2]), strict=True):
        if size == 1:
            continue
        if expected is None:
            batch = stride // item
        elif stride != expected:
            return None
        expected = stride * size
    return transposed, leading, batch


def _call(xp, a, b, out, left, right, place, alpha, beta, bias):
    """Row-major out = a b is column-major out^T = b^T a^T: b comes first, and each is read as its own transpose."""
    cublas, runtime = xp.cuda.cublas, xp.cuda.runtime
    (n, k), m = a.shape[-2:], b.shape[-1]
    count = math.prod(out.shape[:-2])
    double = a.dtype == np.float64
    scalars = np.array([alpha, beta], np.float64 if double else np.float32)
    at = scalars.ctypes.data
    kind, kind_out = (getattr(runtime, _KINDS[x.dtype.name]) for x in (a, out))
    compute = cublas.CUBLAS_COMPUTE_64F if double else cublas.CUBLAS_COMPUTE_32F
    if a.dtype == np.float32 and get_float32_matmul_precision() != "highest":
        compute = cublas.CUBLAS_COMPUTE_32F_FAST_TF32
    if not double and (lt := lt_for(xp)) is not None:
        if lt.gemm(a, b, out, left, right, place, count, alpha, beta, compute, bias):
            return
    if bias is not None:  # cuBLASLt offers nothing for it
        _call(xp, a, b, out, left, right, place, alpha, beta, None)
        out += bias
        return
    handle = xp.cuda.device.get_cublas_handle()
    operations = [cublas.CUBLAS_OP_T if transposed else cublas.CUBLAS_OP_N for transposed, *_ in (right, left)]
    if count == 1:
        cublas.gemmEx(
            handle, *operations, m, n, k, at, b.data.ptr, kind, right[1], a.data.ptr, kind, left[1],
            at + scalars.itemsize, out.data.ptr, kind_out, place[1], compute, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip
    else:
        cublas.gemmStridedBatchedEx(
            handle, *operations, m, n, k, at, b.data.ptr, kind, right[1], right[2], a.data.ptr, kind, left[1], left[2],
            at + scalars.itemsize, out.data.ptr, kind_out, place[1], place[2], count, compute,
            cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip
