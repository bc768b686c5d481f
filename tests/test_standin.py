"""Everything above CUDA's kernels on the stand-in for CuPy: every row of the operation table forward and backward, and
that the stand-in itself is no more generous than CuPy."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import standin
from op_cases import CASES
from standin_device import OnDevice, gpu, kernels  # noqa: F401
from test_ops import array, differentiable, flat

import tensorgrad as tg

OWN = "ATOMIC COUNT SIGNATURES UFUNCS syncs alive counting contextmanager annotations".split()  # not CuPy's


def run(lib, case, sample):
    """(results, gradients) of a sample as NumPy arrays; inputs made by `lib`."""
    pairs = zip(sample.arrays("float32"), sample.inputs, strict=True)
    inputs = [lib.tensor(a, requires_grad=i.grad and a.dtype.kind == "f") for a, i in pairs]
    outs = flat(tg, case.call(lib, sample, inputs))
    rng = np.random.default_rng(1)
    wanted, roots = [x for x in inputs if x.requires_grad], differentiable(tg, outs)
    cotangents = [lib.tensor(rng.uniform(-1, 1, o.shape).astype(array(o).dtype)) for o in roots]
    found = tg.autograd.grad(roots, wanted, cotangents, allow_unused=True) if roots and wanted else []
    return outs, found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_operation(case, gpu):  # noqa: F811
    _every(case)


def _every(case):
    failures = []
    for number, sample in enumerate(case.samples):
        try:
            _same(run(tg, case, sample), run(OnDevice("cuda"), case, sample), case.name in ("cpu", "to"))
        except Exception as error:
            failures.append(f"sample {number}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("nn.functional") or c.name in (
    "matmul", "bmm", "softmax", "einsum")], ids=lambda case: case.name)
def test_operations_with_kernels(case, kernels):  # noqa: F811
    _every(case)


def _same(cpu, cuda, leaves):
    for ours, theirs in zip((cpu[0], cpu[1]), (cuda[0], cuda[1]), strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            if not isinstance(a, tg.Tensor):
                assert a == b or a != a
                continue
            assert b.device.type == "cuda" or leaves, f"the result is on {b.device}"
            assert a.dtype == b.dtype and a.shape == b.shape, f"{a.dtype} {a.shape} but {b.dtype} {b.shape}"
            np.testing.assert_allclose(array(b), array(a), rtol=2e-5, atol=2e-5)


def test_stand_in_refuses_what_cupy_refuses():
    x = standin.asarray(np.ones((2, 2, 2), np.float16))
    for refused in (lambda: x + np.ones(2, np.float32), lambda: standin.add(x, [1.0]), lambda: np.asarray(x),
                    lambda: x[np.array([0])], lambda: x[[0]], lambda: x @ x, lambda: standin.where([True], x, x),
                    lambda: x.max(axis=0, initial=0), lambda: standin.add(x, x, where=x), lambda: standin.sinc(x),
                    lambda: standin.concatenate([x, np.ones((2, 2, 2))]), lambda: np.ones(2) * x):
        with pytest.raises((TypeError, AttributeError, IndexError)):
            refused()
    whole = standin.asarray(np.zeros(3, np.int64))
    with pytest.raises(TypeError):
        standin.add.at(whole, standin.asarray(np.array([0])), standin.asarray(np.array([1])))
    with standin.counting() as waits:
        bool(x.sum()), float(x.sum()), x.sum().item(), standin.asnumpy(x), x[x > 0], standin.argwhere(x)
    assert waits == ["bool", "float", "item", "asnumpy", "mask", "argwhere"]
    assert isinstance(x.sum(), standin.ndarray) and whole[standin.asarray(np.array([7]))].shape == (1,)


def test_stand_in_has_nothing_that_cupy_lacks():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed to compare with")
    for name, ours in vars(standin).items():
        if name.startswith("_") or inspect.ismodule(ours) or name in OWN:
            continue
        assert hasattr(cupy, name), f"cupy has no {name}"
        if inspect.isfunction(ours) and name not in standin.SIGNATURES:
            theirs = getattr(cupy, name)
            if inspect.isfunction(theirs) and not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
                                                      for p in inspect.signature(theirs).parameters.values()):
                extra = set(inspect.signature(ours).parameters) - set(inspect.signature(theirs).parameters)
                assert not extra, f"cupy.{name} has no {extra}"
    for name, parameters in standin.SIGNATURES.items():
        theirs = inspect.signature(getattr(cupy, name)).parameters
        assert set(parameters.split()) <= set(theirs), f"cupy.{name} has {list(theirs)}"
    for name in vars(standin.ndarray):
        assert hasattr(cupy.ndarray, name) or name.startswith("__") or name == "_a", f"cupy.ndarray has no {name}"
