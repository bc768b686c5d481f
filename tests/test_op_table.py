"""The table of operations is complete: an operation without a row fails here."""

from __future__ import annotations

from functools import wraps

import pytest
from op_cases import CASES, NOT_OPERATIONS
from op_samples import NN

import tensorgrad as tg


def public(names):
    return {n for n in names if not n.startswith("_")}


OPERATORS = """add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv pow rpow ipow matmul neg pos invert
and or xor eq ne lt le gt ge getitem setitem""".split()


def without_row():
    """Public functions, nn.functional functions, methods and operators that no row runs."""
    rows = {case.name.split(":")[0] for case in CASES}
    called = {name for case in CASES for name in case.names()} | rows
    exempt = {name for names in NOT_OPERATIONS.values() for name in names.split()}
    functions = {n for n in public(tg.__all__) if callable(getattr(tg, n)) and not isinstance(getattr(tg, n), type)}
    functional = {n for n in public(dir(tg.nn.functional)) if is_function(getattr(tg.nn.functional, n))}
    methods = {n for n in public(dir(tg.Tensor)) if callable(getattr(tg.Tensor, n))}
    operators = {f"__{n}__" for n in OPERATORS if hasattr(tg.Tensor, f"__{n}__")}
    missing = {n for n in functions - exempt if n not in rows and NN + n not in rows}
    missing |= {NN + n for n in functional if NN + n not in rows}
    missing |= {f"Tensor.{n}" for n in methods - exempt
                if not {n, n.removesuffix("_"), NN + n.removesuffix("_")} & rows}
    return sorted(missing | (operators - called))


def is_function(thing):
    return getattr(thing, "__module__", "") == "tensorgrad.nn.functional" and not isinstance(thing, type)


def test_every_operation_has_a_row():
    assert without_row() == []


def test_no_exemption_is_stale():
    names = {name for names in NOT_OPERATIONS.values() for name in names.split()}
    assert [n for n in sorted(names) if not hasattr(tg.Tensor, n) and not hasattr(tg, n)] == []


def test_operation_without_row_is_found(monkeypatch):
    monkeypatch.setattr(tg.Tensor, "unheard_of", lambda self: self, raising=False)
    monkeypatch.setattr(tg.nn.functional, "unseen", wraps(tg.nn.functional.relu)(lambda x: x), raising=False)
    assert without_row() == ["Tensor.unheard_of", "nn.functional.unseen"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_row_calls_what_it_names(case):
    name = case.operation
    assert name in case.names() or (name.startswith("__") and case.samples)


def test_rows_have_different_names():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
