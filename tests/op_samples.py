"""What a row of the operation table is made of: calls, inputs and flags.

Float inputs are drawn so that no kink is near: over one sample all values are distinct (spaced over their interval),
and none is within 0.01 of a multiple of 0.25, where `abs`, `floor`, `round`, `clamp`, `relu6`, ... have theirs. Values
*at* kinks, ties and non-finite values are given literally by `values(...)`; such a sample is compared with PyTorch but
is not differentiated numerically.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import numpy as np

NN = "nn.functional."


@dataclass(frozen=True)
class Input:
    """One input of a sample: `kind` is "float", "int", "bool" or "values" (literal data); floats have a gradient if
    `grad`."""

    shape: tuple[int, ...]
    kind: str = "float"
    low: float = -2.0
    high: float = 2.0
    data: Any = None
    grad: bool = True


def real(*shape: int, low: float = -2.0, high: float = 2.0) -> Input:
    return Input(shape, low=low, high=high)


def positive(*shape: int) -> Input:
    return Input(shape, low=0.3, high=3.0)


def weights(*shape: int) -> Input:
    """Positive, and without a gradient, as the class weights of a loss."""
    return Input(shape, low=0.3, high=3.0, grad=False)


def ints(*shape: int, low: int = 0, high: int = 3) -> Input:
    """int64 in low .. high-1."""
    return Input(shape, "int", low, high)


def bools(*shape: int) -> Input:
    return Input(shape, "bool")


def values(data: Any) -> Input:
    """Literal data: floats take the dtype under test, ints and bools stay int64 and bool."""
    return Input(np.shape(data), "values", data=data)


def constant(data: Any) -> Input:
    """Literal data without a gradient, for values where PyTorch's is NaN or not implemented."""
    return Input(np.shape(data), "values", data=data, grad=False)


@dataclass(frozen=True)
class Sample:
    """`call(lib, *inputs)`, where `lib` is tensorgrad or torch (or its `nn.functional`)."""

    call: Callable
    inputs: tuple[Input, ...]

    @property
    def smooth(self) -> bool:
        """Whether finite differences make sense: no literal float values."""
        return all(i.kind != "values" or np.asarray(i.data).dtype.kind != "f" for i in self.inputs)

    def arrays(self, dtype: str = "float64") -> list[np.ndarray]:
        """Fresh, contiguous arrays; the same on every call."""
        rng = np.random.default_rng(0)
        total = sum(int(np.prod(i.shape)) for i in self.inputs if i.kind == "float")
        slots = iter((rng.permutation(total) + rng.uniform(0.3, 0.7, total)) / max(total, 1))
        return [_array(i, rng, slots, dtype) for i in self.inputs]


def _array(i: Input, rng: np.random.Generator, slots, dtype: str) -> np.ndarray:
    size = int(np.prod(i.shape))
    if i.kind == "values":
        data = np.array(i.data)
        return data.astype(dtype) if data.dtype.kind == "f" else data
    if i.kind == "int":
        return rng.integers(int(i.low), int(i.high), i.shape, dtype=np.int64)
    if i.kind == "bool":
        return (rng.permutation(size) % 2 == 0).reshape(i.shape)
    x = i.low + (i.high - i.low) * np.array([next(slots) for _ in range(size)]).reshape(i.shape)
    x = np.where(abs(x - np.round(x * 4) / 4) < 0.01, x + 0.02, x)
    return x.astype(dtype)


@dataclass(frozen=True)
class OpCase:
    """One operation. `name` is its public name under `tensorgrad` ("nn.functional.relu"), or that of a Tensor method
    ("__add__"); what follows a colon tells rows of one operation apart.

    grad:    gradients flow from the float inputs to the float outputs.
    random:  values depend on the generator; it is seeded before each call, values are not compared with PyTorch's.
    view:    True: the result shares memory with the first input; False: never; None: as it comes.
    strided: takes inputs of any strides.
    """

    name: str
    samples: tuple[Sample, ...]
    grad: bool = True
    random: bool = False
    view: bool | None = False
    strided: bool = True

    def call(self, lib: Any, sample: Sample, tensors: Sequence[Any]) -> Any:
        if self.random:
            lib.manual_seed(0)
        return sample.call(lib.nn.functional if self.name.startswith(NN) else lib, *tensors)

    @property
    def operation(self) -> str:
        """The bare name: "nn.functional.relu" -> "relu", "__getitem__:basic" -> "__getitem__"."""
        return self.name.split(":")[0].removeprefix(NN)

    def names(self) -> set[str]:
        """Every attribute name that the samples' calls mention: a row must call what it is named after."""
        calls = [s.call for s in self.samples]
        bound = {d for call in calls for d in call.__defaults__ or () if isinstance(d, str)}  # lambda t, x, n=name: ...
        return bound.union(*(_names(c.__code__) for c in calls), *(getattr(c, "names", ()) for c in calls))


def _names(code: CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def case(name: str, *samples: tuple, **flags: Any) -> OpCase:
    """`case("sum", (lambda t, x: t.sum(x, dim=1), real(2, 3)), ..., view=True)`."""
    return OpCase(name, tuple(Sample(call, inputs) for call, *rest in samples for inputs in [tuple(rest)]), **flags)


# --- families: one line of the table gives all samples ---------------------------------------------------------------


def function(name: str) -> Callable:
    """`lib.<name>(*inputs)`."""
    call = lambda t, *xs: getattr(t, name)(*xs)  # noqa: E731
    call.names = (name,)
    return call


def method(name: str) -> Callable:
    """`first.<name>(*rest)`."""
    call = lambda t, x, *xs: getattr(x, name)(*xs)  # noqa: E731
    call.names = (name,)
    return call


def infix(name: str) -> Callable:
    """Python's operator of that name, in place on a copy for the names that begin with "i"."""
    inplace = name in ("iadd", "isub", "imul", "itruediv", "ipow")
    call = lambda t, x, *xs: getattr(operator, f"__{name}__")(x.clone() if inplace else x, *xs)  # noqa: E731
    call.names = (f"__{name}__",)
    return call


SHAPES = [(), (3,), (2, 3), (2, 0), (2, 1, 3)]
PAIRS = [((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 1, 3), (4, 1)), ((), (2, 3)), ((2, 3), ()), ((), ()), ((0, 3), (1, 3))]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -1.0, 0.5, -2.0]


def unary(name: str, make: Callable[..., Input] = real, special: Any = SPECIAL, others: str = "ib", **flags) -> OpCase:
    """An elementwise function of one tensor, as function and (outside nn.functional) as method; `others` says whether
    it takes ints ("i") and bools ("b")."""
    short = name.removeprefix(NN)
    calls = [function(short)] + ([] if name.startswith(NN) else [method(short)])
    samples = [(calls[n % len(calls)], make(*shape)) for n, shape in enumerate(SHAPES)]
    samples.append((calls[0], values(special)))
    samples += [(calls[0], ints(2, 3, low=1, high=4))] if "i" in others else []
    samples += [(calls[-1], bools(3))] if "b" in others else []
    return case(name, *samples, **flags)


def binary(
    name: str, make: Callable[..., Input] = real, symbol: str = "", literal: Any = ((0.0, 1.0), (1.0, 1.0)),
    others: str = "ibs", **flags: Any,
) -> OpCase:
    """An elementwise function of two tensors: all broadcasts and mixed dtypes; `others` says whether it takes ints
    ("i"), bools ("b") and Python scalars ("s")."""
    calls = [function(name), method(name)] + ([infix(symbol)] if symbol else [])
    samples = [(calls[n % len(calls)], make(*a), make(*b)) for n, (a, b) in enumerate(PAIRS)]
    samples += [
        (calls[0], *map(values if flags.get("grad", True) else constant, literal)),
        (lambda t, x, y: getattr(t, name)(x, y.to(t.float64)), make(3), make()),
        (lambda t, x, y: getattr(t, name)(x.to(t.float64), y), make(2, 1), make(3)),
    ]
    if "i" in others:
        samples += [(calls[-1], ints(3, low=1, high=5), ints(2, 3, low=1, high=4)), (calls[0],
        ints(3, low=1), make(2, 3)),
                    (calls[0], make(3), ints(low=1))]
    if "b" in others:
        samples += [(calls[-1], make(2, 3), bools(3)), (calls[0], bools(3), bools(3))]
    if "s" in others:
        samples += [(lambda t, x, k=k: getattr(x, name)(k), i) for k, i in
                    ((2, make(2, 3)), (0.7, make()), (2, ints(3, low=1)), (1.5, ints(3, low=1)))]
    return case(name, *samples, **flags)


def reduction(name: str, *samples: tuple, bare: bool = True, single: bool = True,
        tuples: bool = True, **flags) -> OpCase:
    """A reduction: one dim, negative dim, keepdim, zero-size; over everything if `bare`, of single elements if `single`
    and over tuples of dims if `tuples`; then the given samples."""
    dims = [dict(dim=0), dict(dim=-1), dict(dim=1, keepdim=True)]
    dims += [dict(dim=(0, 2)), dict(dim=(-1, 0), keepdim=True)] if tuples else []
    ours = [(lambda t, x, k=k: getattr(t, name)(x, **k), real(2, 3, 2)) for k in dims]
    ours += [(lambda t, x: getattr(x, name)(dim=-2, keepdim=True), real(3, 2)),
        (lambda t, x: getattr(x, name)(dim=-1), real(0, 3))]
    ours += [(function(name), real(2, 3)), (method(name), real(4))] if bare else []
    ours += [(method(name), real())] if bare and single else []
    ours += [(lambda t, x: getattr(x, name)(dim=-1), real())] if single else []
    return case(name, *ours, *samples, **flags)
