"""kernels/cuda/cublaslt.py on a library that understands its descriptions and carries them out on their addresses:
which algorithm is taken, the bias, and what happens where nothing is offered."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import standin
from standin_device import gpu, kernels  # noqa: F401

import tensorgrad as tg
from tensorgrad.kernels.cuda import cublaslt
from tensorgrad.kernels.cuda.gemm import gemm
from tensorgrad.nn import functional as F


class Library:
    """Offers algorithms 0, 1, ...: `times` says how long each takes, None that it fails; nothing for what `refused`."""

    def __init__(self, times, refused=lambda desc: False):
        self.times, self.refused, self.objects, self.runs = times, refused, {}, []
        self.numbers = itertools.count(1)

    def _new(self, out, **fields):
        out._obj.value = number = next(self.numbers)
        self.objects[number] = fields
        return 0

    def _set(self, handle, attribute, value, size):
        assert ctypes.sizeof(value._obj) == size.value
        self.objects[handle.value][attribute] = value._obj.value
        return 0

    cublasLtMatmulDescSetAttribute = cublasLtMatrixLayoutSetAttribute = cublasLtMatmulPreferenceSetAttribute = _set

    def cublasLtCreate(self, out):
        return self._new(out)

    def cublasLtMatmulDescCreate(self, out, compute, scale):
        return self._new(out, compute=compute.value)

    def cublasLtMatrixLayoutCreate(self, out, kind, rows, columns, leading):
        return self._new(out, kind=kind.value, rows=rows.value, columns=columns.value, leading=leading.value)

    def cublasLtMatmulPreferenceCreate(self, out):
        return self._new(out)

    def cublasLtMatmulPreferenceDestroy(self, preference):
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, handle, desc, a, b, c, d, preference, wanted, results, found):
        wishes = self.objects[preference.value]
        assert wishes[1] == cublaslt.WORKSPACE and all(0 < wishes[i] <= 256 for i in (5, 6, 7, 8))
        described = self.objects[desc.value]
        if cublaslt.EPILOGUE in described:
            assert not described[cublaslt.BIAS_POINTER] % wishes[8], "the bias is known, and as aligned as is said"
        count = 0 if self.refused(described) else min(wanted, len(self.times))
        for i in range(count):
            results[i].algo[0] = i
        found._obj.value = count
        return 0

    def cublasLtMatmul(self, handle, desc, alpha, A, a, B, b, beta, C, c, D, d, algo, workspace, size, stream):
        number = algo._obj[0]
        self.runs.append(number)
        if self.times[number] is None:
            return 15
        desc, a, b, d = (self.objects[x.value] for x in (desc, a, b, d))
        batches = d.get(cublaslt.BATCH_COUNT, 1)
        for i in range(batches):
            A_i, B_i, D_i = (p.value + i * x.get(cublaslt.BATCH_STRIDE, 0) * standin._CUDA_DTYPES[x["kind"]].itemsize
                             for p, x in ((A, a), (B, b), (D, d)))
            inner = a["rows"] if desc[cublaslt.TRANS_A] else a["columns"]
            standin.cuda.cublas._multiply(
                desc[cublaslt.TRANS_A], desc[cublaslt.TRANS_B], d["rows"], d["columns"], inner,
                ctypes.addressof(alpha._obj), A_i, a["kind"], a["leading"], B_i, b["kind"], b["leading"],
                ctypes.addressof(beta._obj), D_i, d["kind"], d["leading"], desc["compute"])
            if desc.get(cublaslt.EPILOGUE) == cublaslt.EPILOGUE_BIAS:
                assert desc[cublaslt.BIAS_TYPE] == d["kind"]
                bias, _ = standin._memory(desc[cublaslt.BIAS_POINTER], d["kind"], d["rows"], 1)
                out, dtype = standin._memory(D_i, d["kind"], d["leading"], d["columns"])
                out[:d["rows"]] = (standin._wide(out[:d["rows"]]) + standin._wide(bias)).astype(dtype)
        return 0


class Event:
    """Of a clock that each run of the library moves on."""

    def __init__(self, block=False, disable_timing=False):
        assert not disable_timing

    def record(self, stream=None):
        lib = cublaslt._states[standin, 0].lib
        self.at = sum(lib.times[i] or 0.0 for i in lib.runs)

    def synchronize(self):
        pass


@pytest.fixture
def lt(gpu, monkeypatch):  # noqa: F811
    """install(library) lets products go through it."""
    monkeypatch.setenv("TENSORGRAD_CUBLASLT", "1")
    monkeypatch.setattr(standin.cuda, "Event", Event)
    monkeypatch.setattr(standin.cuda, "get_elapsed_time", lambda a, b: b.at - a.at, raising=False)
    monkeypatch.setattr(standin._Stream, "is_capturing", lambda self: False, raising=False)

    def install(lib):
        monkeypatch.setattr(cublaslt, "_states", {(standin, 0): cublaslt.CublasLt(standin, lib)})
        standin.cuda.cublas.calls.clear()
        return lib

    return install


def normal(*shape, dtype=np.float32):
    return standin.asarray(np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype))


def test_the_fastest_algorithm_is_kept(lt, monkeypatch):
    monkeypatch.setattr(cublaslt, "_alignment", lambda x: 16)  # NumPy's memory lies anyhow
    lib = lt(Library([3.0, 1.0, 2.0]))
    a, b = normal(5, 4), normal(4, 3)
    np.testing.assert_allclose(gemm(standin, a, b)._a, a._a @ b._a, rtol=1e-5)
    assert set(lib.runs) == {0, 1, 2} and lib.runs[-1] == 1, "all are tried, the last run is the product"
    before = len(lib.runs)
    gemm(standin, a, b)
    assert lib.runs[before:] == [1], "timed once per shape"
    gemm(standin, normal(6, 4), b)
    assert len(lib.runs) > before + 2 and standin.cuda.cublas.calls == []
    monkeypatch.setattr(cublaslt, "_alignment", lambda x: 4)
    before = len(lib.runs)
    gemm(standin, a, b)
    assert len(lib.runs) > before + 2, "algorithms may want other addresses"


def test_what_fails_or_is_not_offered(lt):
    a, b = normal(5, 4), normal(4, 3)
    lib, want = lt(Library([None, 2.0])), a._a @ b._a
    np.testing.assert_allclose(gemm(standin, a, b)._a, want, rtol=1e-5)
    assert lib.runs[-1] == 1 and standin.cuda.cublas.calls == []
    for lib in (Library([None]), Library([])):
        lt(lib)
        np.testing.assert_allclose(gemm(standin, a, b)._a, want, rtol=1e-5)
        assert len(standin.cuda.cublas.calls) == 1, "cuBLAS instead"


def test_timing_adds_nothing_to_what_is_added_to(lt):
    lt(Library([2.0, 1.0]))
    a, b = normal(5, 4), normal(4, 3)
    for out in (standin.ones((5, 3), np.float32), standin.ones((5, 7), np.float32)[:, 2:5]):
        gemm(standin, a, b, out, beta=1.0)
        np.testing.assert_allclose(out._a, a._a @ b._a + 1, rtol=1e-5)


def test_deterministic_takes_the_first(lt):
    lib = lt(Library([3.0, 1.0]))
    tg.use_deterministic_algorithms(True)
    try:
        gemm(standin, normal(5, 4), normal(4, 3))
    finally:
        tg.use_deterministic_algorithms(False)
    assert set(lib.runs) == {0}


def test_nothing_is_timed_while_a_graph_is_recorded(lt, monkeypatch):
    lib = lt(Library([3.0, 1.0]))
    monkeypatch.setattr(standin._Stream, "is_capturing", lambda self: True)
    monkeypatch.setattr(standin.cuda, "Event", None)
    gemm(standin, normal(5, 4), normal(4, 3))
    assert lib.runs == [0]


@pytest.mark.parametrize("offered", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bias_is_added_by_the_product(dtype, offered, lt, monkeypatch):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    lib = lt(Library([1.0, 2.0], lambda desc: not offered and cublaslt.EPILOGUE in desc))
    rng, found = np.random.default_rng(0), []
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 8), (12, 8), (12,))]
    for device in ("cpu", "cuda"):
        x, w, b = (tg.tensor(a, device=device, requires_grad=True) for a in arrays)
        with tg.autocast(dtype=dtype if dtype != "float32" else "float16", enabled=dtype != "float32"):
            y = F.linear(x, w, b)
        y.float().sum().backward()
        found.append([t.detach().cpu().double().numpy() for t in (y, x.grad, w.grad, b.grad)])
    for cpu, cuda in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, cpu, rtol=1e-5 if dtype == "float32" else 0.02, atol=0.05)
    assert lib.runs and standin.cuda.cublas.calls == []
    assert any(cublaslt.EPILOGUE in fields for fields in lib.objects.values())


def test_batched_and_turned(lt):
    lt(Library([1.0]))
    a, b = normal(2, 3, 5, 4), normal(2, 3, 6, 4)
    np.testing.assert_allclose(gemm(standin, a, b.swapaxes(-1, -2))._a, a._a @ b._a.swapaxes(-1, -2), rtol=1e-4)
    np.testing.assert_allclose(gemm(standin, a[0, 0].T, a[0, 1])._a, a._a[0, 0].T @ a._a[0, 1], rtol=1e-4)
    assert standin.cuda.cublas.calls == []
