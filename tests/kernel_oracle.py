"""What the tests of kernels/ share: levels, pools of any size, layouts of arrays, float64 composed mathematics."""

import importlib

import numpy as np
import pytest

import tensorgrad as tg
from tensorgrad.kernels import pool as pools

CPU = tg.device("cpu")
LEVELS = ("reference", "threaded", "compiled_all")
LAYOUTS = ("contiguous", "transposed", "every other", "columns")
TOLERANCE = {np.dtype("float32"): 2e-5, np.dtype("float64"): 1e-12}  # of the largest magnitude of the result
SHAPES = [  # rows, width: nothing, single ones, odd sizes, and around the sizes where blocks and threads begin
    (0, 8), (1, 1), (1, 7), (5, 1), (3, 5), (63, 65), (129, 33), (1, 70001), (70001, 1), (257, 513), (6, 16411),
]

_pools = {}


def level(name):
    """The module of routines with this name; the test is skipped where what it needs is not installed."""
    if name.startswith("compiled"):
        pytest.importorskip("numba", reason="needs the extra fast")
    return importlib.import_module(f"tensorgrad.kernels.{name}")


def use_threads(monkeypatch, threads):
    """Let the package's pool have this many threads for the rest of the test."""
    if threads not in _pools:
        pools.pool()  # limits BLAS
        _pools[threads] = pools.Pool(threads)
    monkeypatch.setattr(pools, "_pool", _pools[threads])


def laid(array, layout):
    """The same values in memory of another layout."""
    if layout == "transposed":
        return np.asfortranarray(array)
    if layout == "every other":
        view = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)[..., ::2]
    elif layout == "columns":
        view = np.full((*array.shape[:-1], array.shape[-1] + 3), np.nan, array.dtype)[..., 1:-2]
    else:
        view = np.empty(array.shape, array.dtype)
    view[...] = array
    return view


def close(got, want, dtype, name="", tolerance=None):
    """`got` has the dtype and want's shape, and differs by at most the tolerance times want's largest magnitude."""
    want = np.asarray(want)
    assert got.dtype == dtype and got.shape == want.shape, f"{name}: {got.dtype} {got.shape}, not {want.shape}"
    if not got.size:
        return
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite].astype(dtype), err_msg=name)
    if not finite.any():
        return
    difference, largest = np.abs(got[finite] - want[finite]).max(), np.abs(want[finite]).max()
    tolerance = TOLERANCE[np.dtype(dtype)] if tolerance is None else tolerance
    assert difference <= tolerance * largest, f"{name}: off by {difference} where the largest is {largest}"


def composed(definition, inputs, g=None, **options):
    """definition(*inputs) in float64 Tensors, and the gradient of each floating input for the output's gradient g."""
    tensors = [
        None if a is None else tg.tensor(a.astype(np.float64), requires_grad=True) if a.dtype.kind == "f"
        else tg.tensor(a)
        for a in inputs
    ]
    y = definition(*tensors, **options)
    if g is not None:
        y.backward(tg.tensor(g.astype(np.float64)))
    return y.detach().numpy(), [t.grad.numpy() for t in tensors if t is not None and t.requires_grad and g is not None]


def unchanged(routine, *arguments, **options):
    """routine(*arguments), after which the arrays among the arguments are what they were."""
    before = [a.copy() if isinstance(a, np.ndarray) else None for a in arguments]
    result = routine(*arguments, **options)
    for a, b in zip(arguments, before, strict=True):
        if b is not None:
            np.testing.assert_array_equal(a, b)
    return result
