"""Functions that make tensors: from data, filled, in ranges, random."""

import math

import numpy as np

from . import dtypes
from .device import cpu
from .device import device as as_device
from .engine import TensorBase, wrap
from .errors import OpError
from .ops.common import sizes
from .random import default_generator
from .tensor import Tensor, to_array


def tensor(data, *, dtype=None, device=None, requires_grad=False):
    """A copy of numbers, nested lists or arrays. Python floats become the default dtype (float32), integers int64,
    arrays keep their dtype."""
    return Tensor(data, dtype, device, requires_grad)


def as_tensor(data, *, dtype=None, device=None):
    """A tensor that shares memory with `data` (array or tensor) where dtype and device allow, else a copy."""
    if isinstance(data, TensorBase):
        return data.to(device=device, dtype=dtype)
    place = as_device(device) if device is not None else cpu
    return wrap(place.asarray(to_array(data, dtype)).view(), place)  # no two tensors hold one array object


def from_numpy(array):
    """A CPU tensor that shares the memory of a NumPy array."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"from_numpy: expected a NumPy array, got {type(array).__name__}")
    return wrap(to_array(array).view(), cpu)


def from_dlpack(source):
    """A tensor that shares memory with any object that speaks DLPack (PyTorch, CuPy, JAX ...), without a copy."""
    kind = source.__dlpack_device__()
    place = as_device("cpu" if int(kind[0]) in (1, 3) else f"cuda:{kind[1]}")
    return wrap(place.from_dlpack(source), place)


def _finish(array, device, requires_grad):
    place = as_device(device) if device is not None else cpu
    out = wrap(place.asarray(array), place)
    return out.requires_grad_() if requires_grad else out


def full(size, fill_value, *, dtype=None, device=None, requires_grad=False):
    """`fill_value` everywhere; dtype that of the value unless given."""
    value = fill_value.item() if isinstance(fill_value, TensorBase) else fill_value
    dtype = dtypes.as_dtype(dtype) if dtype is not None else dtypes.scalar_dtype(value)
    place = as_device(device) if device is not None else cpu
    return _finish(place.xp.full(sizes((size,) if isinstance(size, int) else size), value, dtype), place, requires_grad)


def zeros(*size, dtype=None, device=None, requires_grad=False):
    """The system gives memory that is zero already, and gives it when it is first written to: large tensors of which
    little is used cost little."""
    place = as_device(device) if device is not None else cpu
    return _finish(place.xp.zeros(sizes(size), dtypes.as_dtype(dtype)), place, requires_grad)


def ones(*size, dtype=None, device=None, requires_grad=False):
    return full(sizes(size), 1.0, dtype=dtypes.as_dtype(dtype), device=device, requires_grad=requires_grad)


def empty(*size, dtype=None, device=None, requires_grad=False):
    """Memory with whatever it held before."""
    place = as_device(device) if device is not None else cpu
    return _finish(place.xp.empty(sizes(size), dtypes.as_dtype(dtype)), place, requires_grad)


def full_like(input, fill_value, *, dtype=None, device=None, requires_grad=False):
    return full(
        input.shape, fill_value, dtype=dtype or input.dtype, device=device or input.device, requires_grad=requires_grad
    )


def zeros_like(input, *, dtype=None, device=None, requires_grad=False):
    return full_like(input, 0, dtype=dtype, device=device, requires_grad=requires_grad)


def ones_like(input, *, dtype=None, device=None, requires_grad=False):
    return full_like(input, 1, dtype=dtype, device=device, requires_grad=requires_grad)


def empty_like(input, *, dtype=None, device=None, requires_grad=False):
    return empty(input.shape, dtype=dtype or input.dtype, device=device or input.device, requires_grad=requires_grad)


def arange(start, end=None, step=1, *, dtype=None, device=None, requires_grad=False):
    """start, start + step, ... below `end`; arange(end) starts at 0. Integers give int64, else the default dtype."""
    start, end = (0, start) if end is None else (start, end)
    start, end, step = (v.item() if isinstance(v, TensorBase) else v for v in (start, end, step))
    if dtype is not None and dtypes.as_dtype(dtype).kind in "iu":
        start, end, step = int(start), int(end), int(step)
    if step == 0:
        raise OpError("arange: step must not be 0")
    if (end - start) * step < 0:
        raise OpError(f"arange: from {start} to {end} the step {step} leads away")
    if dtype is None:
        whole = all(isinstance(v, int | np.integer) for v in (start, end, step))
        dtype = dtypes.int64 if whole else dtypes.get_default_dtype()
    n = math.ceil((end - start) / step)
    exact = np.int64 if all(isinstance(v, int | np.integer) for v in (start, step)) else np.float64
    place = as_device(device) if device is not None else cpu
    values = place.xp.arange(n, dtype=exact) * step + start
    return _finish(values.astype(dtypes.as_dtype(dtype)), device, requires_grad)


def linspace(start, end, steps, *, dtype=None, device=None, requires_grad=False):
    """`steps` numbers evenly from start to end, both included."""
    start, end = (v.item() if isinstance(v, TensorBase) else v for v in (start, end))
    if steps < 0:
        raise OpError(f"linspace: steps must not be negative, got {steps}")
    dtype = dtypes.as_dtype(dtype)
    if dtype.kind in "iu":
        start, end = int(start), int(end)
        # from both ends, each value cut to an integer, as PyTorch does
        step = (end - start) / max(steps - 1, 1)
        i = np.arange(steps)
        values = np.where(i < steps / 2, start + step * i, end - step * (steps - 1 - i)).astype(dtype)
    else:
        values = np.linspace(start, end, steps, dtype=dtype)
    return _finish(values, device, requires_grad)


def eye(n, m=None, *, dtype=None, device=None, requires_grad=False):
    """Ones on the main diagonal of an (n, m) matrix, zeros elsewhere."""
    return _finish(np.eye(n, m, dtype=dtypes.as_dtype(dtype)), device, requires_grad)


# ---- random ----------------------------------------------------------------------------------------------------------


def _rng(generator, device):
    return (generator or default_generator(as_device(device or "cpu"))).numpy()


def rand(*size, generator=None, dtype=None, device=None, requires_grad=False):
    """Uniform numbers in [0, 1)."""
    dtype = dtypes.as_dtype(dtype)
    draw = dtype if dtype in (dtypes.float32, dtypes.float64) else dtypes.float32
    return _finish(_rng(generator, device).random(sizes(size), draw).astype(dtype, copy=False), device, requires_grad)


def randn(*size, generator=None, dtype=None, device=None, requires_grad=False):
    """Normal numbers, mean 0 and variance 1."""
    dtype = dtypes.as_dtype(dtype)
    draw = dtype if dtype in (dtypes.float32, dtypes.float64) else dtypes.float32
    return _finish(
        _rng(generator, device).standard_normal(sizes(size), draw).astype(dtype, copy=False), device, requires_grad
    )


def randint(low, high=None, size=None, *, generator=None, dtype=None, device=None, requires_grad=False):
    """Integers in [low, high); randint(high, size) starts at 0."""
    if size is None:
        low, high, size = 0, low, high
    if high <= low:
        raise OpError(f"randint: the range from {low} to {high} is empty")
    values = _rng(generator, device).integers(low, high, sizes((size,) if isinstance(size, int) else size))
    return _finish(values.astype(dtypes.as_dtype(dtype or dtypes.int64)), device, requires_grad)


def randperm(n, *, generator=None, dtype=None, device=None):
    """The integers 0 ... n - 1 in random order."""
    return _finish(_rng(generator, device).permutation(n).astype(dtypes.as_dtype(dtype or dtypes.int64)), device, False)


def rand_like(input, *, dtype=None, device=None, requires_grad=False):
    return rand(input.shape, dtype=dtype or input.dtype, device=device or input.device, requires_grad=requires_grad)


def randn_like(input, *, dtype=None, device=None, requires_grad=False):
    return randn(input.shape, dtype=dtype or input.dtype, device=device or input.device, requires_grad=requires_grad)
