"""Parity with PyTorch on PyTorch's own sample inputs: one case per operation, and the score over all of them.

`opinfo.py` says what is compared and how; `python tests/opinfo.py NAME` prints the same for one operation. The last
part of this file plants one bug at a time into PyTorch and asks the harness to find it, so that each comparison is
known to be able to fail.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest

import tensorgrad

torch = pytest.importorskip("torch", reason="the oracle is PyTorch: install the extra `oracle`")
pytest.importorskip("expecttest", reason="PyTorch's sample inputs need expecttest: install the extra `test`")

import opinfo  # noqa: E402
from opinfo_entries import NAMES, entries  # noqa: E402


@functools.cache
def results_of(name: str) -> list[opinfo.Result]:
    return opinfo.run(tensorgrad, name)


NUMBERS = "a Python number is welcome where PyTorch insists on a Tensor"
DELIBERATE = {  # (operation, variant or form): why we differ from PyTorch there. Counted as failed in the score.
    ("norm", "nuc"): "the nuclear norm needs a singular value decomposition",
    ("logical_and", "error"): NUMBERS,
    ("logical_or", "error"): NUMBERS,
    ("logical_xor", "error"): NUMBERS,
    ("maximum", "error"): NUMBERS,
    ("minimum", "error"): NUMBERS,
}


def failures(results: list[opinfo.Result]) -> list[opinfo.Result]:
    return [result for result in results if result.status == "fail"]


def is_deliberate(result: opinfo.Result) -> bool:
    return (result.name, result.variant) in DELIBERATE or (result.name, result.form) in DELIBERATE


@pytest.mark.parametrize("name", NAMES)
def test_operation(name):
    """Nothing fails but what is deliberate, or rounding in float32 (see `opinfo.is_rounding`)."""
    results = results_of(name)
    known = [result for result in failures(results) if result.rounding or is_deliberate(result)]
    assert len(known) == len(failures(results)), "\n" + opinfo.report([r for r in results if r not in known])
    assert opinfo.score(results)[0] > 0, f"{name}: no sample was run"


@pytest.mark.parametrize("name, part", DELIBERATE)
def test_deliberate_differences_are_still_there(name, part):
    assert any(part in (r.variant, r.form) for r in failures(results_of(name))), "remove it from DELIBERATE"


def test_score():
    results = [result for name in NAMES for result in results_of(name)]
    print("\n" + opinfo.report(results))
    floats = [r for r in results if r.form == "function" and r.dtype in ("float64", "float32")]
    good, total = opinfo.score(floats)
    assert total >= 1750
    assert good / total >= 0.97, "\n" + opinfo.report(results)
    good, total = opinfo.score(results)  # every dtype, every form, refused inputs
    assert good / total >= 0.97, "\n" + opinfo.report(results)


def test_skips_have_a_reason_and_are_few():
    """Samples put to the function are skipped only for what is deliberately not offered."""
    results = [r for name in NAMES for r in results_of(name) if r.form in ("function", "non-contiguous")]
    skipped = [r for r in results if r.status == "skip"]
    assert {r.detail for r in skipped} <= {"complex", "sparse", "quantized", "out=", "memory_format", "other device"}
    assert len(skipped) <= 0.02 * len(results)


# -------------------------------------------------------------------------------- the harness itself finds what it must


class Skewed(torch.autograd.Function):
    """The identity, with a gradient that is a millionth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-6)


class Reversed(torch.autograd.Function):
    """The identity, with a gradient in reversed order: a uniform cotangent would not show it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.flip(tuple(range(grad.ndim)))


def planted(**replaced):
    """PyTorch with some of its functions replaced."""
    return SimpleNamespace(**{**vars(torch), **replaced})


def writes_into_input(x):
    result = torch.exp(x)
    with torch.no_grad():
        x.add_(1)
    return result


def quiet(x, *args, **kwargs):
    try:
        return torch.amax(x, *args, **kwargs)
    except (RuntimeError, IndexError, TypeError):
        return x


def raises(*args, **kwargs):
    raise ValueError("planted")


def skewed_mul(x, y):
    return torch.mul(x, Skewed.apply(y) if isinstance(y, torch.Tensor) else y)


def off_by_one_cumsum(x, dim, **kwargs):
    return torch.cumsum(x, dim, **kwargs) + (x.dtype is torch.int64)


def float64_exp(x):
    return torch.exp(x if x.is_floating_point() else x.double())


def biased_dropout(x, p=0.5, training=True):
    return torch.nn.functional.dropout(x, 1.2 * p if p < 0.8 else p, training)


PLANTED = {
    "value": ("exp", lambda x: torch.exp(x) * (1 + 1e-6), "differ, at"),
    "last bits of float32": ("sin", lambda x: torch.sin(x) + (3e-5 if x.dtype is torch.float32 else 0), "differ, at"),
    "off by one in int64": ("cumsum", off_by_one_cumsum, "differ, at"),
    "shape": ("exp", lambda x: torch.exp(x)[None], "shape"),
    "shape of 0-d": ("exp", lambda x: torch.atleast_1d(torch.exp(x)), "shape (1,), PyTorch ()"),
    "dtype widened": ("exp", lambda x: torch.exp(x).double(), "dtype float64, PyTorch float32"),
    "dtype of int64": ("exp", float64_exp, "dtype float64"),
    "gradient": ("exp", lambda x: torch.exp(Skewed.apply(x)), "gradient of input 0"),
    "gradient order": ("exp", lambda x: torch.exp(Reversed.apply(x)), "gradient of input 0"),
    "gradient of the second input": ("mul", skewed_mul, "gradient of input 1"),
    "gradient lost": ("exp", lambda x: torch.exp(x).detach(), "requires_grad False"),
    "gradient where none is": ("isnan", lambda x: torch.isnan(x).double() * x, "dtype float64, PyTorch bool"),
    "input overwritten": ("exp", writes_into_input, "input 0 after the call"),
    "contiguous only": ("exp", lambda x: torch.exp(x) if x.is_contiguous() else raises(), "ValueError: planted"),
    "exception": ("exp", raises, "ValueError: planted"),
    "number of outputs": ("unbind", lambda x, *a, **k: torch.unbind(x, *a, **k)[:-1], "outputs, PyTorch"),
    "kind of output": ("exp", lambda x: torch.exp(x).detach().numpy(), "ndarray, PyTorch a Tensor"),
    "python value": ("equal", lambda x, y: int(torch.equal(x, y)), "PyTorch True"),
    "bad input accepted": ("amax", quiet, "not refused"),
    "law of rand": ("rand", lambda *a, **k: torch.rand(*a, **k) ** 2, "distribution"),
    "law of randn": ("randn", lambda *a, **k: torch.randn(*a, **k) * 1.1, "distribution"),
    "law of randint": ("randint", lambda *a, **k: torch.randint(*a, **k) + 1, "distribution"),
    "law of randperm": ("randperm", lambda n, **k: torch.arange(n, **k) // 2 * 2, "distribution"),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_finds(bug):
    name, function, message = PLANTED[bug]
    results = opinfo.run(planted(**{name: function}), name)
    found = failures(results)
    assert any(message in result.detail for result in found), opinfo.report(results, every=True)
    good, total = opinfo.score(results)
    assert good == total - len(found) < total
    assert f"{name}: {len(found)} of {total} failed" in opinfo.report(results)


@pytest.mark.parametrize("error, rounding", [(3e-5, False), (1.6e-5, True)])
def test_rounding_is_marked_and_still_counts_as_failed(error, rounding):
    lib = planted(sin=lambda x: torch.sin(x) + (error if x.dtype is torch.float32 else 0))
    found = failures(opinfo.run(lib, "sin"))
    assert found and all(result.rounding is rounding for result in found)


def test_finds_a_missing_function():
    attributes = {key: value for key, value in vars(torch).items() if key != "exp"}
    results = [r for r in opinfo.run(SimpleNamespace(**attributes), "exp") if r.form == "function"]
    assert results and all(r.status == "fail" and "no attribute 'exp'" in r.detail for r in results)


def test_finds_a_biased_dropout():
    functional = SimpleNamespace(**{**vars(torch.nn.functional), "dropout": biased_dropout})
    found = failures(opinfo.run(planted(nn=SimpleNamespace(functional=functional)), "nn.functional.dropout"))
    assert any("distribution" in result.detail for result in found)


@pytest.mark.parametrize("name", ["add", "amax", "__getitem__", "setitem", "nn.functional.softmax", "randint", "to"])
def test_finds_nothing_in_pytorch_itself(name):
    assert not failures(opinfo.run(torch, name))


def test_inputs_keep_values_strides_and_aliasing():
    base = torch.arange(24.0).reshape(2, 3, 4).requires_grad_()
    views = [base, base.detach().transpose(0, 2)[1:], torch.ones(1).expand(3, 2), torch.tensor(2.0)]
    inputs = opinfo.Inputs(torch, grad=True)
    copies = inputs([*views, base])
    for view, copy in zip([*views, base], copies, strict=True):
        assert view.stride() == copy.stride() and torch.equal(view, copy)
    assert copies[0] is copies[-1] and inputs.leaves == [copies[0]]
    copies[1].zero_()  # shares the memory of copies[0], and of nothing outside
    assert not np.array_equal(inputs.arrays[0], base.detach().numpy()) and base.sum() == sum(range(24))


def test_every_entry_has_samples():
    for name in NAMES:
        for entry in entries(name):
            assert not entry.dtypes or any(list(entry.samples(dtype)) for dtype in entry.dtypes), name
