"""kernels/cuda/gemm.py: what it tells cuBLAS, carried out on the addresses it gives (tests/standin.py)."""

from __future__ import annotations

import numpy as np
import pytest
import standin

import tensorgrad as tg
from tensorgrad.kernels.cuda.gemm import gemm, supported

ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def laid(rng, shape, layout, dtype):
    """Random numbers of this shape in memory of another layout, NaN between them."""
    *lead, n, m = shape
    if layout == "rows":
        whole = standin.empty((*lead, n, m), dtype)
        view = whole
    elif layout == "columns":
        view = standin.empty((*lead, m, n), dtype).swapaxes(-1, -2)
    elif layout == "pitch":
        view = standin.empty((*lead, n, m + 3), dtype)[..., 1:m + 1]
    elif layout == "pitched columns":
        view = standin.empty((*lead, m, n + 2), dtype)[..., :n].swapaxes(-1, -2)
    else:  # every other: cuBLAS cannot read that
        view = standin.empty((*lead, n, 2 * m), dtype)[..., ::2]
    view._a[...] = rng.standard_normal(shape)
    return view


LAYOUTS = ["rows", "columns", "pitch", "pitched columns", "every other"]


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_layouts(left, right, lead):
    rng = np.random.default_rng(0)
    for n, k, m in ((5, 4, 3), (1, 4, 3), (5, 1, 3), (5, 4, 1), (1, 1, 1), (1, 7, 1), (5, 1, 1), (1, 1, 6)):
        a, b = laid(rng, (*lead, n, k), left, np.float64), laid(rng, (*lead, k, m), right, np.float64)
        for place in LAYOUTS:
            out = laid(rng, (*lead, n, m), place, np.float64)
            want = 0.5 * (a._a @ b._a) + 2.0 * out._a
            assert gemm(standin, a, b, out, 0.5, 2.0) is out
            np.testing.assert_allclose(out._a, want, rtol=1e-12, err_msg=f"{n, k, m} into {place}")
            np.testing.assert_allclose(gemm(standin, a, b)._a, a._a @ b._a, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_accumulation(dtype):
    rng = np.random.default_rng(0)
    a, b = laid(rng, (6, 5), "rows", DTYPES[dtype]), laid(rng, (5, 4), "columns", DTYPES[dtype])
    exact = a._a.astype(np.float64) @ b._a.astype(np.float64)
    y = gemm(standin, a, b)
    assert y.dtype == DTYPES[dtype]
    np.testing.assert_allclose(y._a.astype(np.float64), exact, rtol=0.02, atol=0.02)
    if dtype in ("float16", "bfloat16"):  # a weight gradient, added to in float32
        total = standin.ones((6, 4), np.float32)
        assert supported(a, b, total)
        gemm(standin, a, b, total, beta=1.0)
        np.testing.assert_allclose(total._a, exact + 1, rtol=1e-5, atol=1e-5)
    assert not supported(a, b, standin.zeros((6, 4), np.int64)) and not supported(a, standin.zeros((5, 4), np.int64))


def test_no_copy_where_cublas_can_read():
    rng = np.random.default_rng(0)
    packed = laid(rng, (7, 12), "rows", np.float32)
    before = len(standin.alive)
    out = standin.empty((4, 4), np.float32)
    gemm(standin, packed[:, :4].T, packed[:, 4:8], out)
    np.testing.assert_allclose(out._a, packed._a[:, :4].T @ packed._a[:, 4:8], rtol=1e-5)
    assert len(standin.alive) <= before + 1


def test_empty_and_precision():
    zero = gemm(standin, standin.zeros((2, 0), np.float32), standin.zeros((0, 3), np.float32))
    assert zero.shape == (2, 3) and not zero._a.any()
    assert gemm(standin, standin.zeros((0, 2), np.float32), standin.zeros((2, 3), np.float32)).shape == (0, 3)
    a = standin.ones((2, 2), np.float32)
    try:
        for precision, compute in (("highest", 68), ("high", 77)):
            tg.set_float32_matmul_precision(precision)
            gemm(standin, a, a)
            assert standin.cuda.cublas.calls[-1][-1] == compute
    finally:
        tg.set_float32_matmul_precision("highest")


def test_cublas_calls_have_the_library_s_parameters():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        real = cupy.cuda.cublas
    except ImportError:
        pytest.skip("cuBLAS is not installed")
    for name in ("gemmEx", "gemmStridedBatchedEx"):
        function = getattr(type(standin.cuda.cublas), name)
        ours = function.__code__.co_varnames[1:function.__code__.co_argcount]
        theirs = [p.split()[-1] for p in getattr(real, name).__doc__.split("(")[1].split(")")[0].split(",")]
        assert list(ours) == theirs
    for name in ("CUBLAS_OP_N", "CUBLAS_OP_T", "CUBLAS_COMPUTE_32F", "CUBLAS_COMPUTE_64F",
                 "CUBLAS_COMPUTE_32F_FAST_TF32", "CUBLAS_GEMM_DEFAULT"):
        assert getattr(real, name) == getattr(standin.cuda.cublas, name)


def test_descriptions_that_the_real_cublaslt_accepts():
    """Everything but the search for an algorithm and the product, which need a GPU."""
    pytest.importorskip("cuda.pathfinder", reason="CuPy's way to find libraries is not installed")
    from ctypes import c_uint64, sizeof

    from tensorgrad.kernels.cuda import cublaslt

    try:
        lib = cublaslt.load()
    except Exception as error:
        pytest.skip(f"cuBLASLt is not installed: {str(error).splitlines()[0]}")
    assert sizeof(cublaslt._Result) == 96 and cublaslt._Result.workspace.offset == 8 * sizeof(c_uint64)
    plain, turned = (False, 768, 0), (True, 3072, 0)
    for kind, kind_out, bias in (("bfloat16", "bfloat16", True), ("bfloat16", "float32", False),
                                 ("float32", "float32", True), ("float16", "float16", False)):
        for left, right in ((plain, turned), (turned, plain), (plain, plain)):
            desc, layouts = cublaslt.describe(lib, 64, 768, 3072, left, right, (False, 3072, 0), 1, kind, kind_out, 68,
                                              bias)
            assert desc.value and all(layout.value for layout in layouts)
    assert cublaslt.prefer(lib, (256, 64, 16, 16)).value
    batched = (False, 64, 4096)
    assert cublaslt.describe(lib, 64, 64, 64, batched, batched, batched, 12, "float16", "float16", 68, False)
