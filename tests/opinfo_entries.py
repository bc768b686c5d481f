"""What `opinfo.py` checks: the operation names, and for each its sample inputs.

The samples are PyTorch's own: `torch.testing._internal.common_methods_invocations.op_db` holds, for every operation of
PyTorch, one or more `OpInfo` entries with generators of sample inputs and of inputs that must be refused. A few names
have no entry there; theirs are written by hand below, in the same shape.

An entry has *forms*: the ways to call one operation (function, method, operator, in-place method, in-place operator).
A form maps a library, `torch` or `tensorgrad`, to a callable, so that both are looked up and called in the same way.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.testing import make_tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import ErrorInput, OpInfo, SampleInput

Lookup = Callable[[Any], Callable]  # library -> callable
F64, F32, I64, BOOL = torch.float64, torch.float32, torch.int64, torch.bool
DTYPES = (F64, F32, I64, BOOL)

FUNCTIONS = """
    abs add addmm all allclose amax amin any arange argmax argmin argsort baddbmm bmm broadcast_to cat chunk clamp
    clone contiguous cos cosh cumprod cumsum detach diag diagonal div dot einsum empty_like equal erf exp expand
    expand_as expm1 eye flatten flip floor full full_like gather __getitem__ setitem index_add index_select isclose
    isfinite isinf isnan item kron lerp linspace log log10 log1p log2 logaddexp logical_and logical_not logical_or
    logical_xor logsumexp masked_fill masked_select matmul max maximum mean meshgrid min minimum movedim mul mv narrow
    neg norm ones outer permute pow prod rand randint randn randperm ravel reciprocal repeat repeat_interleave reshape
    roll round rsqrt scatter scatter_add select sigmoid sign sin sinh softmax sort split sqrt square squeeze stack std
    sub sum swapaxes t take_along_dim tan tanh tensordot tile to topk trace transpose tril triu trunc unbind unflatten
    unfold unsqueeze var view vstack hstack where zeros eq ne lt le gt ge __radd__ __rsub__ __rmul__ __rdiv__ __rpow__
    __rmatmul__
""".split()
NN_FUNCTIONS = """
    relu relu6 leaky_relu elu gelu silu glu softplus logsigmoid hardtanh tanhshrink softmax log_softmax layer_norm
    rms_norm linear embedding dropout one_hot pad normalize cosine_similarity mse_loss l1_loss smooth_l1_loss nll_loss
    cross_entropy binary_cross_entropy_with_logits kl_div scaled_dot_product_attention
""".split()
NAMES = FUNCTIONS + [f"nn.functional.{name}" for name in NN_FUNCTIONS]

OPERATORS = {  # operation -> name in the module `operator` of its infix form
    "abs": "abs", "add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "pow": "pow", "matmul": "matmul",
    "neg": "neg", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "__getitem__": "getitem",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One operation, or one variant of it, with its samples and the ways to call it."""

    name: str
    variant: str
    forms: dict[str, Lookup]
    samples: Callable[[torch.dtype], Iterable[SampleInput]]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    errors: Callable[[], Iterable[ErrorInput]] = field(default=lambda: ())


def entries(name: str) -> list[Entry]:
    """All entries of one name of `NAMES`: from OpInfo (an own entry before an alias), then written by hand."""
    plain = name.removeprefix("nn.functional.")
    infos = [info for info in op_db if info.name == name]
    infos = infos or [info for info in op_db if any(alias.name == name for alias in info.aliases)]
    infos = infos or [info for info in op_db if info.name == plain]
    found = [_from_opinfo(name, info) for info in infos]
    for variant, (samples, dtypes) in _BY_HAND.get(name, {}).items():
        found.append(Entry(name, variant, forms(name), samples, dtypes))
    if not found:
        raise LookupError(f"{name}: neither in op_db nor written by hand")
    return found


def _from_opinfo(name: str, info: OpInfo) -> Entry:
    def samples(dtype: torch.dtype) -> Iterable[SampleInput]:
        return info.sample_inputs("cpu", dtype, requires_grad=info.supports_autograd and dtype.is_floating_point)

    def errors() -> Iterable[ErrorInput]:
        return info.error_inputs("cpu") if info.error_inputs_func is not None else ()

    dtypes = tuple(dtype for dtype in DTYPES if info.supports_dtype(dtype, "cpu"))
    return Entry(name, info.variant_test_name, forms(name), samples, dtypes, errors)


# ---------------------------------------------------------------------------------------------------------------- forms


def forms(name: str) -> dict[str, Lookup]:
    """The ways to call an operation that PyTorch has: `function` always, the others where they exist."""
    result: dict[str, Lookup] = {"function": functools.partial(_function, name)}
    if name not in ARGUMENTS and not hasattr(_parent(torch, name), name.rpartition(".")[2]):
        return result  # a method only: `function` already is the method
    if name[0] not in "._" and "." not in name and hasattr(torch.Tensor, name):
        result["method"] = lambda lib: getattr(lib.Tensor, name)
    if name in OPERATORS:
        result["operator"] = lambda lib: getattr(operator, OPERATORS[name])
    if hasattr(operator, f"i{OPERATORS.get(name)}"):
        result["in-place operator"] = lambda lib: _in_place(getattr(operator, f"i{OPERATORS[name]}"))
    if "." not in name and hasattr(torch.Tensor, f"{name}_"):
        result["in-place"] = lambda lib: _in_place(getattr(lib.Tensor, f"{name}_"))
    return result


def _function(name: str, lib: Any) -> Callable:
    """`name` as a function of the library; a method where PyTorch has no such function."""
    if name in ARGUMENTS:
        return ARGUMENTS[name](lib)
    last = name.rpartition(".")[2]
    owner = lib if hasattr(_parent(torch, name), last) else lib.Tensor
    return getattr(_parent(owner, name), last)


def _parent(lib: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split(".")[:-1], lib)


def _in_place(function: Callable) -> Callable:
    """Changes a copy in place, and returns the copy rather than what the call returned."""

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        copy = x.clone()
        function(copy, *args, **kwargs)
        return copy

    return call


def _setitem(x: Any, index: Any, value: Any) -> Any:
    copy = x.clone()
    copy[index] = value
    return copy


# Where a sample gives the arguments in another order than the function takes them, or the name is not the callable's.
ARGUMENTS: dict[str, Lookup] = {
    "einsum": lambda lib: lambda tensors, equation: lib.einsum(equation, *tensors),
    "where": lambda lib: lambda x, condition, other: lib.where(condition, x, other),
    "nn.functional.embedding": lambda lib: (
        lambda weight, ids, **kwargs: lib.nn.functional.embedding(ids, weight, **kwargs)
    ),
    "setitem": lambda lib: _setitem,
    "__rdiv__": lambda lib: lib.Tensor.__rtruediv__,  # PyTorch keeps Python 2's name beside this one
}

# ------------------------------------------------------------------------------------------------------ written by hand


def _make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return make_tensor(shape, dtype=dtype, device="cpu", requires_grad=dtype.is_floating_point)


def _detach(dtype: torch.dtype) -> Iterator[SampleInput]:
    for shape in ((), (0, 3), (4,), (2, 3, 4)):
        yield SampleInput(_make(*shape, dtype=dtype))
    yield SampleInput(_make(3, 4, dtype=dtype).t())


def _to(dtype: torch.dtype) -> Iterator[SampleInput]:
    for target in (F64, F32, I64, BOOL, torch.int32, torch.float16):
        for shape in ((), (0, 3), (3, 4)):
            yield SampleInput(_make(*shape, dtype=dtype), args=(target,))
        yield SampleInput(_make(3, 4, dtype=dtype).t(), kwargs={"dtype": target, "copy": True})
    yield SampleInput(_make(3, 4, dtype=dtype), args=("cpu",))
    yield SampleInput(_make(3, 4, dtype=dtype), args=("cpu", F64))
    yield SampleInput(_make(3, 4, dtype=dtype), args=(_make(2, dtype=F32),))  # dtype and device of another tensor


MASK = torch.tensor([[True, False, True, False], [False, False, True, True], [True, True, False, False]])
INDICES = (
    1, -1, (2, 3), (-3, -4), slice(1, None), slice(None, None, 2), (slice(None), 1), (slice(0, 2), slice(-3, -1)),
    Ellipsis, (Ellipsis, 0), None, (None, 1), (slice(None), None, 2), (1, Ellipsis, None), slice(2, 2), (), True, False,
    MASK, MASK[:, 0], (slice(None), MASK[0]), torch.zeros(3, 4, dtype=BOOL), [0, 2], ([0, 2], [1, 3]),
    torch.tensor([2, 0]), torch.tensor(1), torch.tensor([[0, 1], [2, 0]]), torch.zeros(0, dtype=I64),
    (torch.tensor([2, 0]), slice(1, 3)), (torch.tensor([[0], [2]]), torch.tensor([1, 3])), (0, torch.tensor([3, 1])),
    (slice(None), torch.tensor([-1, 0])), (None, torch.tensor([0, 1]), Ellipsis),
)  # fmt: skip


def _getitem(dtype: torch.dtype) -> Iterator[SampleInput]:
    for index in INDICES:
        yield SampleInput(_make(3, 4, dtype=dtype), args=(index,))
    yield SampleInput(_make(3, 4, dtype=dtype).t(), args=((slice(1, 3), torch.tensor([0, 2])),))
    for index in (torch.tensor([1, 1, 0, 1]), ([0, 0, 2], [3, 3, 1]), (slice(None), [0, 0])):  # repeats accumulate
        yield SampleInput(_make(3, 4, dtype=dtype), args=(index,))
    for index in (([0, 1], slice(None), [2, 3]), (0, slice(None), [1, 1]), (Ellipsis, [2, 2], 0)):
        yield SampleInput(_make(2, 3, 4, dtype=dtype), args=(index,))  # index arrays apart: their axes come first
    for index in ((), Ellipsis, None, True, torch.tensor(False)):
        yield SampleInput(_make(dtype=dtype), args=(index,))


def _setitem_samples(dtype: torch.dtype) -> Iterator[SampleInput]:
    for index in INDICES:
        shape = torch.empty(3, 4)[index].shape
        yield SampleInput(_make(3, 4, dtype=dtype), args=(index, _make(*shape, dtype=dtype)))
        yield SampleInput(_make(3, 4, dtype=dtype), args=(index, 1))
    yield SampleInput(_make(3, 4, dtype=dtype), args=(slice(1, 3), _make(4, dtype=dtype)))  # values that broadcast
    yield SampleInput(_make(3, 4, dtype=dtype), args=((slice(None), [0, 2]), _make(3, 1, dtype=dtype)))
    yield SampleInput(_make(3, 4, dtype=dtype), args=(Ellipsis, _make(1, 1, 4, dtype=dtype)))
    yield SampleInput(_make(3, 4, dtype=dtype), args=(MASK, _make(dtype=dtype)))
    yield SampleInput(_make(3, 4, dtype=dtype), args=(0, _make(4, dtype=F32)))  # values of another dtype are cast
    yield SampleInput(_make(4, 3, dtype=dtype).t(), args=((1, slice(None, None, 3)), _make(2, dtype=dtype)))
    yield SampleInput(_make(dtype=dtype), args=(Ellipsis, _make(dtype=dtype)))


def _div_integers(dtype: torch.dtype) -> Iterator[SampleInput]:
    large = torch.tensor([2**24 + 1, -(2**53) - 1, 2**62 + 3, -7], dtype=dtype)
    for mode in ("trunc", "floor"):  # exact: not by way of floating point
        for divisor in (1, 2, -3):
            yield SampleInput(large, args=(torch.tensor(divisor, dtype=dtype),), kwargs={"rounding_mode": mode})


def _sizes(dtype: torch.dtype) -> Iterator[SampleInput]:
    for args in ((3,), (2, 3), (0,), ((4, 5),), ((),), ((2, 0, 3),), ([200, 300],)):
        yield SampleInput(args[0], args=args[1:], kwargs={"dtype": dtype})
    yield SampleInput(100, kwargs={"dtype": dtype, "device": "cpu", "requires_grad": True})
    yield SampleInput(100)


def _randint(dtype: torch.dtype) -> Iterator[SampleInput]:
    for args in ((10, (300, 200)), (-5, 3, (300, 200)), (7, [0, 2]), (1, (40,)), (4, 5, (8,))):
        yield SampleInput(args[0], args=args[1:], kwargs={"dtype": dtype})
        yield SampleInput(args[0], args=args[1:])


def _randperm(dtype: torch.dtype) -> Iterator[SampleInput]:
    for n in (0, 1, 2, 30, 1000):
        yield SampleInput(n)
        yield SampleInput(n, kwargs={"dtype": dtype})


def _dropout(dtype: torch.dtype) -> Iterator[SampleInput]:
    for kwargs in ({}, {"p": 0.1}, {"p": 0.9}, {"p": 0.3, "training": True}, {"p": 0.3, "training": False}):
        yield SampleInput(_make(300, 200, dtype=dtype), kwargs=kwargs)
    yield SampleInput(_make(300, 200, dtype=dtype).t(), kwargs={"p": 0.25})


def _cross_entropy(dtype: torch.dtype) -> Iterator[SampleInput]:
    ids = torch.tensor([[0, 4, -100], [2, -100, 1]])
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=dtype)
    for smoothing in (0.1, 1.0):
        for reduction in ("mean", "sum", "none"):
            kwargs = {"label_smoothing": smoothing, "reduction": reduction}
            probabilities = _make(2, 5, dtype=dtype).softmax(1).detach()
            yield SampleInput(_make(2, 5, 3, dtype=dtype), args=(ids,), kwargs=kwargs)
            yield SampleInput(_make(2, 5, dtype=dtype), args=(probabilities, weight), kwargs=kwargs)
            kwargs = {**kwargs, "ignore_index": 1}
            yield SampleInput(_make(2, 5, 3, dtype=dtype), args=(ids.clamp(0), weight), kwargs=kwargs)


def _attention(dtype: torch.dtype) -> Iterator[SampleInput]:
    masks = torch.ones(3, 6, dtype=BOOL).tril(2), _make(1, 1, 3, 6, dtype=dtype)
    for kwargs in ({}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": masks[0]}, {"attn_mask": masks[1]}):
        for heads in (4, 2, 1):  # 1, 2, 4 query heads per key head
            k, v = _make(2, heads, 6, 8, dtype=dtype), _make(2, heads, 6, 5, dtype=dtype)
            kwargs = {**kwargs, "enable_gqa": heads < 4}
            yield SampleInput(_make(2, 4, 3, 8, dtype=dtype), args=(k, v), kwargs=kwargs)


FLOATS = (F64, F32)
_BY_HAND: dict[str, dict[str, tuple[Callable[[torch.dtype], Iterator[SampleInput]], tuple[torch.dtype, ...]]]] = {
    "detach": {"": (_detach, DTYPES)},
    "to": {"dtypes": (_to, DTYPES)},
    "__getitem__": {"by hand": (_getitem, DTYPES)},
    "setitem": {"": (_setitem_samples, DTYPES)},
    "div": {"large integers": (_div_integers, (I64,))},
    "rand": {"": (_sizes, FLOATS)},
    "randn": {"by hand": (_sizes, FLOATS)},
    "randint": {"by hand": (_randint, (F64, F32, I64))},
    "randperm": {"": (_randperm, (F64, F32, I64))},
    "nn.functional.dropout": {"by hand": (_dropout, FLOATS)},
    "nn.functional.cross_entropy": {"label smoothing": (_cross_entropy, FLOATS)},
    "nn.functional.scaled_dot_product_attention": {"grouped queries": (_attention, FLOATS)},
}

# ---------------------------------------------------------------------------------------------------- random operations

RANDOM = {"rand", "randn", "randint", "randperm", "nn.functional.dropout", "nn.functional.scaled_dot_product_attention"}


def is_random(name: str, sample: SampleInput) -> bool:
    if name == "nn.functional.dropout":
        return sample.kwargs.get("training", True) and 0 < sample.kwargs.get("p", 0.5) < 1
    return name in RANDOM and bool(sample.kwargs.get("dropout_p", 1))


def obeys_law(name: str, sample: SampleInput, array: np.ndarray) -> bool:
    """Whether the output of a random operation looks drawn from its distribution (means within 5 standard errors)."""
    if name == "randperm":
        return np.array_equal(np.sort(array), np.arange(sample.input, dtype=array.dtype))
    if not array.size:
        return True
    error = 5 / math.sqrt(array.size) if array.size >= 1000 else 1e9  # a mean of few tells nothing
    if name == "rand":
        return array.min() >= 0 and array.max() < 1 and abs(array.mean() - 0.5) < error * math.sqrt(1 / 12)
    if name == "randn":
        return bool(np.isfinite(array).all()) and abs(array.mean()) < error and abs(np.mean(array**2) - 1) < 1.5 * error
    if name == "randint":
        low, high = (sample.input, sample.args[0]) if len(sample.args) == 2 else (0, sample.input)
        spread = math.sqrt(((high - low) ** 2 - 1) / 12)
        inside = array.min() >= low and array.max() < high and np.array_equal(array, np.floor(array))
        return inside and abs(array.mean() - (low + high - 1) / 2) <= error * spread
    if name == "nn.functional.dropout":
        p, x = sample.kwargs.get("p", 0.5), sample.input.detach().numpy()
        kept = array != 0
        scaled = np.allclose(array[kept], x[kept] / (1 - p), 4 * np.finfo(array.dtype).eps, 0)
        return scaled and abs(kept[x != 0].mean() - (1 - p)) <= error * math.sqrt(p * (1 - p))
    return bool(np.isfinite(array).all())
