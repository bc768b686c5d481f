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


def test_cupy_compiles_the_kernels_without_a_gpu():
    """The way CupyLauncher's modules are compiled, with CuPy's own options and headers, up to the driver."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from cupy._core import core
    from cupy.cuda import compiler

    from tensorgrad.kernels.cuda.signatures import KERNELS, source

    for name in ("layer_norm_forward", "softmax_backward", "adamw", "note_outside"):
        kernel = KERNELS[name]
        expression = kernel.expression(kernel.types[-1])
        try:
            options = core.assemble_cupy_compiler_options(("-std=c++17",))
            program = compiler._NVRTCProgram(source(kernel.source), "k.cu", name_expressions=(expression,),
                                             method="cubin")
        except Exception as error:
            pytest.skip(f"NVRTC is not installed: {str(error).splitlines()[0]}")
        cubin, mapping = program.compile((*options, "-arch=sm_90"))
        assert len(cubin) > 1000 and expression in mapping


def test_launcher_gives_cupy_what_it_takes():
    """Grid, block, null pointers and the dtype of every number, as RawKernel wants them; compiled once."""
    from tensorgrad.kernels.cuda.launch import CupyLauncher

    calls, compiled = [], []

    class Module:
        def __init__(self, code, options, name_expressions):
            compiled.append(name_expressions)
            assert "__global__" in code and options == ("-std=c++17",)

        def get_function(self, expression):
            return lambda grid, block, args, shared_mem=0: calls.append((grid, block, args, shared_mem))

    launcher = CupyLauncher(type("cupy", (), {"RawModule": Module}))
    x, g, dx = (standin.empty((4, 8), np.float32) for _ in range(3))
    for _ in range(2):
        launcher.launch("gelu_backward", "float32", x, g, dx, None, 4, 8)
    launcher.launch("gelu_backward", "float32", x, g, dx, None, 0, 8)  # nothing to do
    assert compiled == [("gelu_backward<float>",)] and len(calls) == 2
    grid, block, args, shared = calls[0]
    assert len(grid) == len(block) == 3 and shared == 0 and args[0] is x and args[2] is dx
    assert [type(a) for a in args[3:]] == [np.uint64, np.int64, np.int32]
    with pytest.raises(TypeError, match="gelu_backward takes 6 arguments"):
        launcher.launch("gelu_backward", "float32", x, g, dx, 4, 8)
