"""PyTorch's own sample inputs as an outside oracle for tensorgrad.

For every sample of every operation of `opinfo_entries.NAMES` the same call is made in PyTorch and in tensorgrad, on
inputs with the same values and the same strides, and compared: number and shapes of outputs, dtypes, values,
`requires_grad`, what happened to the inputs, and the gradient of every input under a random cotangent. In float64
values agree to 1e-7 (relative and absolute), in float32 to the defaults of `torch.testing`, integers and bools exactly.
Random operations are compared in shape, dtype and law; indices of equal elements may come in any order, unless a stable
sort is asked for. At most `CAP` samples per entry and dtype are taken, evenly spaced.

    python tests/opinfo.py                     # the whole report
    python tests/opinfo.py add nn.functional   # only operations whose name contains one of these
    python tests/opinfo.py --every add         # each failing sample, with its inputs
    python tests/opinfo.py --self              # PyTorch against itself: what the harness says of a perfect library
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from opinfo_entries import DTYPES, F32, F64, FLOATS, NAMES, Entry, entries, is_random, obeys_law
from torch.testing._internal.opinfo.core import SampleInput

CAP = 60
TOLERANCE = {"float64": (1e-7, 1e-7), "float32": (1.3e-6, 1e-5), "float16": (1e-3, 1e-5)}  # relative, absolute
NO_METHOD = "tensorgrad has no in-place method of this name"
ORDER = {"argsort": 0, "sort": 1, "topk": 1}  # the output that holds the indices
WITH_GRADIENTS = "gradients compared too"


@dataclass(frozen=True)
class Result:
    """What became of one sample in one form: `status` is "pass", "fail" or "skip"; `detail` is its reason, one line."""

    name: str
    variant: str
    form: str
    dtype: str
    status: str
    detail: str
    sample: str = ""
    rounding: bool = False  # of a failure in float32: see is_rounding


class Mismatch(Exception):
    """The two libraries differ."""


# ----------------------------------------------------------------------------------------------- inputs for one library


class Inputs:
    """Turns the torch values of a sample into values of `lib`: own memory, same strides and offsets, same aliasing."""

    def __init__(self, lib: Any, grad: bool) -> None:
        self.lib = lib
        self.grad = grad
        self.tensors: list[Any] = []
        self.arrays: list[np.ndarray] = []  # of the same tensors: shows whether the call wrote into its inputs
        self.leaves: list[Any] = []
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._known: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        match value:
            case torch.Tensor():
                return self._tensor(value)
            case torch.dtype():
                return getattr(self.lib, str(value).removeprefix("torch."))
            case torch.device():
                return str(value)
            case torch.Size():
                return tuple(value)
            case list() | tuple():
                return type(value)(self(item) for item in value)
            case dict():
                return {key: self(item) for key, item in value.items()}
        return value

    def _tensor(self, tensor: torch.Tensor) -> Any:
        if id(tensor) not in self._known:
            storage = tensor.untyped_storage()
            copy = self._storages.setdefault(storage._cdata, storage.clone())
            own = torch.empty(0, dtype=tensor.dtype).set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())
            array = own.numpy()
            ours = self.lib.from_numpy(array)
            if self.grad and tensor.requires_grad:
                ours.requires_grad = True
                self.leaves.append(ours)
            self.arrays.append(array)
            self._known[id(tensor)] = ours
        return self._known[id(tensor)]


def not_offered(value: Any, key: str = "") -> str:
    """Why a sample cannot be put to tensorgrad at all, or "". Nothing else is ever skipped."""
    match value:
        case torch.Tensor():
            if value.is_complex():
                return "complex"
            if value.is_quantized:
                return "quantized"
            if value.layout is not torch.strided:
                return "sparse"
            return "" if value.device.type == "cpu" else "other device"
        case complex():
            return "complex"
        case torch.dtype():
            return "complex" if value.is_complex else ""
        case torch.memory_format():
            return "memory_format"
        case torch.device():
            return "" if value.type == "cpu" else "other device"
        case dict():
            return next(filter(None, (not_offered(item, key) for key, item in value.items())), "")
        case list() | tuple():
            return next(filter(None, map(not_offered, value)), "")
    if key == "out" and value is not None:
        return "out="
    return "sparse" if key == "sparse" and value else ""


# ----------------------------------------------------------------------------------------------------------- comparison


def flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from flatten(item)
    else:
        yield value


def array_of(lib: Any, tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().numpy())


def same_array(what: str, ours: np.ndarray, theirs: np.ndarray, values: bool = True) -> None:
    if ours.shape != theirs.shape:
        raise Mismatch(f"{what}: shape {ours.shape}, PyTorch {theirs.shape}")
    if ours.dtype != theirs.dtype:
        raise Mismatch(f"{what}: dtype {ours.dtype}, PyTorch {theirs.dtype}")
    if not values:
        return
    rtol, atol = TOLERANCE.get(theirs.dtype.name, (0, 0))
    close = np.isclose(ours, theirs, rtol, atol, equal_nan=True) if rtol else ours == theirs
    if not close.all():
        worst = tuple(int(i) for i in np.argwhere(~close)[0])
        count = close.size - np.count_nonzero(close)
        raise Mismatch(f"{what}: {count} of {close.size} differ, at {worst} {ours[worst]}, PyTorch {theirs[worst]}")


def same_order(name: str, sample: SampleInput, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Indices of a sort or selection may differ from PyTorch's among equal elements only, and never repeat."""
    if np.array_equal(ours, theirs):
        return
    x, dim = array_of(torch, sample.input), sample.kwargs.get("dim", -1)
    for argument in sample.args[name == "topk" :][:1]:
        dim = argument
    if (np.diff(np.sort(ours, dim), axis=dim) == 0).any():
        raise Mismatch("indices repeat")
    same_array("elements at the indices", *(np.take_along_axis(x, index, dim) for index in (ours, theirs)))


def same_outputs(lib: Any, ours: list, theirs: list, free: Container[int]) -> None:
    """`free` holds the numbers of the outputs whose values need not agree."""
    if len(ours) != len(theirs):
        raise Mismatch(f"{len(ours)} outputs, PyTorch {len(theirs)}")
    for number, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
        what = f"output {number}" if len(ours) > 1 else "output"
        if not isinstance(reference, torch.Tensor):
            same = type(mine) is type(reference) and (mine == reference or (mine != mine and reference != reference))
            if not same:
                raise Mismatch(f"{what}: {mine!r}, PyTorch {reference!r}")
            continue
        if not isinstance(mine, lib.Tensor):
            raise Mismatch(f"{what}: {type(mine).__name__}, PyTorch a Tensor")
        same_array(what, array_of(lib, mine), array_of(torch, reference), number not in free)
        name = str(mine.dtype).removeprefix("torch.")
        if name != str(reference.dtype).removeprefix("torch."):
            raise Mismatch(f"{what}: dtype {name} of the Tensor, PyTorch {reference.dtype}")
        if bool(mine.requires_grad) != reference.requires_grad:
            raise Mismatch(f"{what}: requires_grad {mine.requires_grad}, PyTorch {reference.requires_grad}")


def gradients(lib: Any, outputs: list, inputs: Inputs) -> list[np.ndarray]:
    """Gradients of all leaves under cotangents drawn from N(0, 1); zeros where an input is not used."""
    outputs = [out for out in outputs if isinstance(out, lib.Tensor) and out.requires_grad]
    if not outputs or not inputs.leaves:
        return []
    rng = np.random.default_rng(0)
    arrays = [array_of(lib, out) for out in outputs]
    draws = [np.asarray(rng.standard_normal(a.shape), np.float32) for a in arrays]  # equal in float32 and float64
    cotangents = [lib.from_numpy(draw.astype(a.dtype)) for draw, a in zip(draws, arrays, strict=True)]
    grads = lib.autograd.grad(outputs, inputs.leaves, cotangents, allow_unused=True)
    return [
        np.zeros_like(array_of(lib, leaf)) if grad is None else array_of(lib, grad)
        for leaf, grad in zip(inputs.leaves, grads, strict=True)
    ]


def call(lib: Any, function: Callable, sample: SampleInput, grad: bool) -> tuple[list, Inputs]:
    inputs = Inputs(lib, grad)
    args = [inputs(sample.input), *inputs(sample.args)]
    return list(flatten(function(*args, **inputs(sample.kwargs)))), inputs


def check(lib: Any, entry: Entry, form: str, sample: SampleInput, grad: bool) -> tuple[str, str]:
    """Status and detail of one sample in one form."""
    if reason := not_offered([sample.input, sample.args, sample.kwargs]):
        return "skip", reason
    try:
        theirs, their_inputs = call(torch, entry.forms[form](torch), sample, grad)
    except Exception:
        return "skip", f"PyTorch itself refuses the sample as {form}"
    try:
        ours, inputs = call(lib, entry.forms[form](lib), sample, grad)
        random, order = is_random(entry.name, sample), ORDER.get(entry.name)
        if random or entry.name == "empty_like":
            same_outputs(lib, ours, theirs, range(len(theirs)))
        elif order is not None and not sample.kwargs.get("stable"):
            same_outputs(lib, ours, theirs, {order})
            same_order(entry.name, sample, array_of(lib, ours[order]), array_of(torch, theirs[order]))
        else:
            same_outputs(lib, ours, theirs, ())
        for number, (mine, reference) in enumerate(zip(inputs.arrays, their_inputs.arrays, strict=True)):
            same_array(f"input {number} after the call", mine, reference)
        if random:
            if not obeys_law(entry.name, sample, array_of(lib, ours[0])):
                raise Mismatch("output does not follow its distribution")
            return "pass", ""
        references = gradients(torch, theirs, their_inputs)
        for number, (mine, reference) in enumerate(zip(gradients(lib, ours, inputs), references, strict=True)):
            same_array(f"gradient of input {number}", mine, reference)
    except Mismatch as difference:
        return "fail", str(difference)
    except Exception as error:
        return "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "pass", WITH_GRADIENTS if references else ""


def is_rounding(lib: Any, entry: Entry, form: str, sample: SampleInput) -> bool:
    """Whether a failure in float32 is no more than rounding: our distance from PyTorch's float64 is at most twice the
    tolerance, or twice that of PyTorch's float32. Such a sample still counts as failed."""

    def floats(library: Any, of: SampleInput) -> list[np.ndarray]:
        outputs, inputs = call(library, entry.forms[form](library), of, grad=True)
        arrays = [array_of(library, out) for out in outputs if isinstance(out, library.Tensor)]
        return [a for a in arrays + gradients(library, outputs, inputs) if a.dtype.kind == "f"]

    def distance(array: np.ndarray, exact: np.ndarray) -> float:
        rtol, atol = TOLERANCE["float32"]
        return (np.abs(array - exact) / (atol + rtol * np.abs(exact))).max(initial=0)

    def widen(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype is F32:
            return value.double()
        return F64 if value is F32 else value

    try:
        ours, theirs, exact = floats(lib, sample), floats(torch, sample), floats(torch, sample.transform(widen))
        mine, reference = (max(map(distance, some, exact)) for some in (ours, theirs))
    except Exception:
        return False
    return bool(mine <= 2 * max(1, reference))


def check_error(lib: Any, entry: Entry, sample: SampleInput) -> tuple[str, str]:
    """A sample that PyTorch refuses must be refused: by any exception."""
    if reason := not_offered([sample.input, sample.args, sample.kwargs]):
        return "skip", reason
    if entry.name.startswith("__") and not isinstance(sample.input, torch.Tensor):
        return "skip", "a method called on a number"
    try:
        call(torch, entry.forms["function"](torch), sample, grad=False)
        return "skip", "PyTorch itself accepts the erroneous sample as function"
    except Exception:
        pass
    try:
        function = entry.forms["function"](lib)
    except AttributeError as error:
        return "fail", f"AttributeError: {error}"
    try:
        call(lib, function, sample, grad=False)
    except Exception:
        return "pass", ""
    return "fail", "not refused"


# -------------------------------------------------------------------------------------------------------------- running


def spaced(samples: list[SampleInput]) -> list[SampleInput]:
    """At most CAP samples, evenly spaced."""
    step = max(1.0, len(samples) / CAP)
    return [samples[int(i * step)] for i in range(min(CAP, len(samples)))]


def run(lib: Any, name: str) -> list[Result]:
    """All results of one operation: the function in every dtype, and in float64 also every other form of calling it,
    and the function on inputs made non-contiguous."""
    results = []

    def record(entry: Entry, form: str, dtype: str, sample: SampleInput, outcome: tuple[str, str]) -> None:
        failed = outcome[0] == "fail"
        rounding = failed and dtype == "float32" and is_rounding(lib, entry, form, sample)
        text = sample.summary() if failed else ""
        results.append(Result(entry.name, entry.variant, form, dtype, *outcome, text, rounding))

    lib.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in entries(name):
            for dtype in entry.dtypes:
                torch.manual_seed(0)
                grad = dtype in FLOATS
                label = str(dtype).removeprefix("torch.")
                for sample in spaced(list(entry.samples(dtype))):
                    for form in entry.forms if dtype is F64 else ["function"]:
                        absent = form == "in-place" and not hasattr(lib.Tensor, f"{name}_")
                        outcome = ("skip", NO_METHOD) if absent else check(lib, entry, form, sample, grad)
                        record(entry, form, label, sample, outcome)
                    if dtype is F64:
                        strided = sample.noncontiguous()
                        record(entry, "non-contiguous", label, strided, check(lib, entry, "function", strided, grad))
            for error in entry.errors():
                record(entry, "error", "any", error.sample_input, check_error(lib, entry, error.sample_input))
    return results


def score(results: list[Result]) -> tuple[int, int]:
    """Passed, and passed or failed: skipped samples are in neither."""
    status = Counter(result.status for result in results)
    return status["pass"], status["pass"] + status["fail"]


def report(results: list[Result], every: bool = False) -> str:
    """Scores per form and dtype, failures grouped by operation with the first error of each, skips by reason."""
    rows = defaultdict(list)
    by_name = defaultdict(list)
    for result in results:
        rows[result.form, result.dtype].append(result)
        by_name[result.name].append(result)
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES] + ["any"]
    forms = list(dict.fromkeys(form for form, _ in rows))
    lines = []
    for form, dtype in sorted(rows, key=lambda row: (forms.index(row[0]), dtypes.index(row[1]))):
        good, total = score(rows[form, dtype])
        percent = 100 * good / max(total, 1)
        grads = sum(result.detail == WITH_GRADIENTS for result in rows[form, dtype])
        counts = f"{good:>5} of {total:>5} OpInfo samples ({percent:6.2f} %), {grads:>4} with gradients"
        lines.append(f"{form:<18} {dtype:<8} {counts}")
    lines.append("")
    for name, group in by_name.items():
        failed = [result for result in group if result.status == "fail"]
        if failed:
            shown = failed if every else failed[:1]
            lines.append(f"{name}: {len(failed)} of {score(group)[1]} failed")
            for one in shown:
                where = " ".join(filter(None, (one.variant, one.form, one.dtype, "rounding" * one.rounding)))
                lines.append(f"    [{where}] {one.detail}" + (f"\n        {one.sample}" if every else ""))
    lines += [""] + [
        f"skipped {count:>4}: {reason}"
        for reason, count in Counter(result.detail for result in results if result.status == "skip").most_common()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares tensorgrad with PyTorch on PyTorch's own sample inputs.")
    parser.add_argument("names", nargs="*", help="only operations whose name contains one of these (default: all)")
    parser.add_argument("--every", action="store_true", help="print every failing sample, not one per operation")
    parser.add_argument("--self", action="store_true", dest="itself", help="check PyTorch against itself")
    options = parser.parse_args()
    lib = torch if options.itself else importlib.import_module("tensorgrad")
    chosen = [name for name in NAMES if not options.names or any(part in name for part in options.names)]
    print(report([result for name in chosen for result in run(lib, name)], options.every))


if __name__ == "__main__":
    main()
