"""A stand-in for CuPy without a GPU: NumPy underneath, CuPy's refusals on top.

What CuPy refuses is refused here: NumPy arrays and lists as operands, conversion to NumPy without being asked,
functions and keyword arguments that CuPy lacks (`max(initial=)`, `where=`), matrix products of more than two dimensions
in 16 bits, scattered additions of dtypes without atomics. What it does silently is done: out-of-range index arrays wrap
around, reductions give 0-d arrays. Whatever makes the host wait (item, bool, tolist, asnumpy, masks as indices) counts
as a synchronisation in `syncs`. tests/test_standin.py compares names and arguments with CuPy where that is installed.
"""

from __future__ import annotations

import ctypes
import math
import types
import weakref
from contextlib import contextmanager

import numpy as np

inf, nan, pi, newaxis = math.inf, math.nan, math.pi, None
bool_, uint8, int8, int16, int32, int64, uint32, uint64 = (
    np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint32, np.uint64)
float16, float32, float64 = np.float16, np.float32, np.float64
ATOMIC = {"int32", "uint32", "uint64", "float16", "float32", "float64"}  # dtypes that CuPy's add.at takes

syncs: list[str] = []  # what made the host wait, in order
alive: weakref.WeakSet = weakref.WeakSet()  # all arrays


def _wait(what):
    syncs.append(what)


@contextmanager
def counting():
    """The list of the synchronisations inside the context."""
    before, found = len(syncs), []
    yield found
    found.extend(syncs[before:])


class _Data:
    def __init__(self, array):
        self.ptr = array.__array_interface__["data"][0]


class _Flags:
    def __init__(self, flags):
        self.c_contiguous, self.f_contiguous, self.owndata = flags.c_contiguous, flags.f_contiguous, flags.owndata


class ndarray:
    """cupy.ndarray; `_a` is the NumPy array that stands for the memory on the GPU."""

    __slots__ = ("_a", "base", "__weakref__")
    __hash__ = object.__hash__  # CuPy's arrays have none; the list of living arrays needs one
    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    nbytes = property(lambda self: self._a.nbytes)
    itemsize = property(lambda self: self._a.itemsize)
    strides = property(lambda self: self._a.strides)
    data = property(lambda self: _Data(self._a))
    flags = property(lambda self: _Flags(self._a.flags))
    device = property(lambda self: cuda.Device(0))
    T = property(lambda self: _result(self._a.T, self))
    __cuda_array_interface__ = property(lambda self: {"shape": self.shape, "typestr": self.dtype.str, "version": 3,
                                                      "data": (self.data.ptr, False)})

    # ---- leaving the device
    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if method != "__call__" or any(isinstance(i, np.ndarray) for i in inputs):
            raise TypeError(f"Unsupported type in {ufunc.__name__}: a numpy.ndarray among the operands")
        return globals()[ufunc.__name__](*inputs, **options)

    def get(self):
        _wait("get")
        return self._a.copy()

    def item(self):
        _wait("item")
        return self._a.item()

    def tolist(self):
        _wait("tolist")
        return self._a.tolist()

    def __bool__(self):
        _wait("bool")
        return bool(self._a)

    def __int__(self):
        _wait("int")
        return int(self._a)

    def __float__(self):
        _wait("float")
        return float(self._a)

    def __index__(self):
        _wait("index")
        return self._a.__index__()

    def __len__(self):
        return len(self._a)

    def __iter__(self):
        return (self[i] for i in range(len(self._a)))

    def __repr__(self):
        return f"standin.array({self._a!r})"

    # ---- elements
    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(p, ndarray) and p.dtype == bool for p in parts):
            _wait("mask")
        return _result(self._a[_index(index, self.shape)], self)

    def __setitem__(self, index, value):
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(p, ndarray) and p.dtype == bool for p in parts) and isinstance(value, ndarray) and value.ndim:
            _wait("mask")
        self._a[_index(index, self.shape)] = _operand(value)

    def set(self, array, stream=None):
        if not isinstance(array, np.ndarray) or array.dtype != self.dtype or array.shape != self.shape:
            raise ValueError("set: a NumPy array of the same shape and dtype is needed")
        self._a[...] = array

    def fill(self, value):
        self._a.fill(_operand(value))

    # ---- shapes and copies
    def reshape(self, *shape, order="C"):
        return _result(self._a.reshape(*shape, order=order), self)

    def transpose(self, *axes):
        return _result(self._a.transpose(*axes), self)

    def swapaxes(self, a, b):
        return _result(self._a.swapaxes(a, b), self)

    def view(self, dtype=None):
        return _result(self._a.view() if dtype is None else self._a.view(dtype), self)

    def ravel(self, order="C"):
        return _result(self._a.ravel(order), self)

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        with np.errstate(all="ignore"):
            out = self._a.astype(dtype, order=order, copy=copy)
        return self if out is self._a else _result(out)

    def copy(self, order="C"):
        return _result(self._a.copy(order))

    def take(self, indices, axis=None, out=None):
        return take(self, indices, axis)

    # ---- reductions, with CuPy's arguments
    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return _reduce("sum", self, axis, keepdims, dtype)

    def mean(self, axis=None, dtype=None, out=None, keepdims=False):
        return _reduce("mean", self, axis, keepdims, dtype)

    def prod(self, axis=None, dtype=None, out=None, keepdims=None):
        return _reduce("prod", self, axis, bool(keepdims), dtype)

    def max(self, axis=None, out=None, keepdims=False):
        return _result(self._a.max(axis=axis, keepdims=keepdims))

    def min(self, axis=None, out=None, keepdims=False):
        return _result(self._a.min(axis=axis, keepdims=keepdims))

    def all(self, axis=None, out=None, keepdims=False):
        return _result(self._a.all(axis=axis, keepdims=keepdims))

    def any(self, axis=None, out=None, keepdims=False):
        return _result(self._a.any(axis=axis, keepdims=keepdims))

    def cumsum(self, axis=None, dtype=None, out=None):
        return _result(self._a.cumsum(axis=axis, dtype=dtype))

    def cumprod(self, axis=None, dtype=None, out=None):
        return _result(self._a.cumprod(axis=axis, dtype=dtype))

    def sort(self, axis=-1, kind=None):
        self._a.sort(axis=axis)

    def partition(self, kth, axis=-1):
        self._a.sort(axis=axis)

    def dot(self, b, out=None):
        return dot(self, b)

    def __matmul__(self, other):
        return matmul(self, other)

    def __rmatmul__(self, other):
        return matmul(other, self)

    def __dlpack__(self, **options):
        raise BufferError("the stand-in has no device memory to share")

    def __dlpack_device__(self):
        return 2, 0


def _operator(name, function, reflected=True, inplace=True):
    def method(self, other):
        return _elementwise(function, self, other)

    def backwards(self, other):
        return _elementwise(function, other, self)

    def in_place(self, other):
        _elementwise(function, self, other, out=self)
        return self

    setattr(ndarray, f"__{name}__", method)
    if reflected:
        setattr(ndarray, f"__r{name}__", backwards)
    if inplace:
        setattr(ndarray, f"__i{name}__", in_place)


def _is_ours(other):
    return isinstance(other, ndarray | bool | int | float | np.generic)


def _operand(value):
    """What CuPy takes as an operand: its arrays, Python and NumPy numbers."""
    if isinstance(value, ndarray):
        return value._a
    if isinstance(value, bool | int | float | np.generic):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


def _elementwise(function, *inputs, out=None, dtype=None, casting="same_kind"):
    if any(getattr(i, "__array_ufunc__", 0) is None for i in inputs):
        return NotImplemented  # a Tensor: leave it to its reflected operator
    arrays = [_operand(i) for i in inputs]
    options = {} if dtype is None else {"dtype": dtype}
    with np.errstate(all="ignore"):
        if out is None:
            return _result(function(*arrays, **options))
        function(*arrays, out=_operand(out), casting=casting, **options)
    return out


def _result(value, source=None):
    """A NumPy result as one of our arrays, which knows the array whose memory it shares."""
    if isinstance(value, ndarray):
        return value
    out = ndarray.__new__(ndarray)
    alive.add(out)
    out._a = np.asarray(value)
    out.base = None
    if source is not None and out._a.size and np.may_share_memory(out._a, source._a):
        out.base = source if source.base is None else source.base
    return out


def _index(index, shape):
    """An index with our arrays; those out of range wrap around, as on the GPU."""
    items = index if isinstance(index, tuple) else (index,)
    out, dim = [], 0
    for item in items:
        if item is Ellipsis:
            used = sum(i.ndim if isinstance(i, ndarray) and i.dtype == bool else 1 for i in items
                       if i is not None and i is not Ellipsis)
            dim += len(shape) - used
            out.append(item)
        elif isinstance(item, ndarray):
            if item.dtype == bool:
                dim += item.ndim
                out.append(item._a)
            elif item.dtype.kind in "iu":
                n = shape[dim]
                if not n and item.size:
                    raise IndexError("index into a dimension of size 0")
                out.append(item._a.astype(np.int64) % max(n, 1))
                dim += 1
            else:
                raise IndexError("arrays used as indices must be of integer or boolean type")
        elif item is None or isinstance(item, slice | int | np.integer):
            dim += item is not None
            out.append(item)
        else:
            raise IndexError(f"Unsupported type in an index: {type(item)}")
    return tuple(out)


def _reduce(name, x, axis, keepdims, dtype):
    a = x._a
    wide = a.astype(np.float32) if a.dtype.name in ("float16", "bfloat16") else a  # CuPy accumulates these in float32
    kept = dtype or (a.dtype if wide is not a else None)
    with np.errstate(all="ignore"):
        out = np.asarray(getattr(wide, name)(axis=axis, keepdims=keepdims, dtype=None if wide is not a else dtype))
    return _result(out.astype(kept) if kept is not None else out)


# ---- functions: name -> what is called; operands are checked, keyword arguments are CuPy's ---------------------------


class _UFunc:
    """A universal function: `out`, `casting` and `dtype`, no `where`; `at` for add only."""

    def __init__(self, name):
        self.__name__, self._function = name, getattr(np, name)

    def __call__(self, *args, out=None, casting="same_kind", dtype=None):
        return _elementwise(self._function, *args, out=out, dtype=dtype, casting=casting)

    def at(self, a, indices, b):
        if self.__name__ != "add":
            raise NotImplementedError(f"{self.__name__}.at")
        if a.dtype.name not in ATOMIC or b.dtype != a.dtype:
            raise TypeError(f"add.at supports {', '.join(sorted(ATOMIC))} of one dtype, not {a.dtype} and {b.dtype}")
        np.add.at(a._a, _index(indices, a.shape), b._a)


UFUNCS = """abs absolute add arccos arcsin arctan bitwise_and bitwise_or bitwise_xor ceil copysign cos cosh divide equal
exp exp2 expm1 floor floor_divide greater greater_equal invert isfinite isinf isnan less less_equal log log10 log1p log2
logaddexp logical_and logical_not logical_or logical_xor maximum minimum multiply negative not_equal power remainder
reciprocal right_shift left_shift sign sin sinh sqrt square subtract tan tanh true_divide trunc""".split()
for _name in UFUNCS:
    globals()[_name] = _UFunc(_name)
for _name, _function in {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide,
                         "floordiv": np.floor_divide, "mod": np.remainder, "pow": np.power, "and": np.bitwise_and,
                         "or": np.bitwise_or, "xor": np.bitwise_xor, "rshift": np.right_shift,
                         "lshift": np.left_shift}.items():
    _operator(_name, _function)
for _name, _function in {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
                         "ge": np.greater_equal}.items():
    _operator(_name, _function, reflected=False, inplace=False)
ndarray.__neg__ = lambda self: _elementwise(np.negative, self)
ndarray.__pos__ = lambda self: self.copy()
ndarray.__abs__ = lambda self: _elementwise(np.abs, self)
ndarray.__invert__ = lambda self: _elementwise(np.invert, self)

# functions of one array (then plain arguments): their parameters in CuPy
SIGNATURES = {
    "flip": "a axis", "tril": "m k", "triu": "m k", "moveaxis": "a source destination",
    "diagonal": "a offset axis1 axis2", "broadcast_to": "array shape", "argsort": "a axis kind",
    "sort": "a axis kind", "cumsum": "a axis dtype", "cumprod": "a axis dtype", "clip": "a a_min a_max",
    "round": "a decimals", "argmax": "a axis dtype out keepdims", "argmin": "a axis dtype out keepdims",
    "ascontiguousarray": "a dtype", "full_like": "a fill_value dtype", "zeros_like": "a dtype",
    "ones_like": "a dtype", "empty_like": "prototype dtype",
}


def _function_of_one(name, parameters):
    function, parameters = getattr(np, name), parameters.split()

    def call(array, *args, **options):
        if not isinstance(array, ndarray):
            raise TypeError(f"{name}: Unsupported type {type(array)}")
        if len(args) >= len(parameters) or set(options) - set(parameters):
            raise TypeError(f"{name}: CuPy has the parameters {parameters}, not {len(args)} and {sorted(options)}")
        out = options.pop("out", None)
        named = dict(zip(parameters[1:], args, strict=False)) | options
        if isinstance(named.get("fill_value"), ndarray):
            named["fill_value"] = named["fill_value"]._a
        if named.get("kind", None) not in (None, "stable"):
            raise ValueError("kind must be None or 'stable'")
        result = function(array._a, **named)
        if out is not None:
            out._a[...] = result
            return out
        return _result(result, array)

    call.__name__ = name
    return call


for _name, _parameters in SIGNATURES.items():
    globals()[_name] = _function_of_one(_name, _parameters)


def clip(a, a_min, a_max, out=None):
    result = np.clip(a._a, *(None if b is None else _operand(b) for b in (a_min, a_max)))
    if out is None:
        return _result(result.astype(a.dtype))
    out._a[...] = result
    return out


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    """Memory comes from the host here: a NumPy array, a number or a list of numbers."""
    if isinstance(a, ndarray):
        return a if dtype is None or a.dtype == dtype else a.astype(dtype)
    if isinstance(a, list | tuple) and any(isinstance(x, ndarray) for x in a):
        return stack([asarray(x) for x in a])
    return _result(np.array(a, dtype=dtype, order="C"))


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    return _result(np.array(obj._a if isinstance(obj, ndarray) else obj, dtype=dtype, order=order, copy=True))


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    if not isinstance(a, ndarray):
        return np.asarray(a)
    _wait("asnumpy")
    if out is not None:
        out[...] = a._a
        return out
    return a._a.copy()


def from_dlpack(array, *, device=None, copy=None):
    raise BufferError("the stand-in has no device memory to share")


def _maker(name):
    def make(shape, dtype=float, order="C"):
        return _result(getattr(np, name)(shape, dtype))

    make.__name__ = name
    return make


zeros, ones = _maker("zeros"), _maker("ones")


def empty(shape, dtype=float, order="C"):
    """Poisoned: whatever is not written shows."""
    out = np.empty(shape, dtype)
    if out.dtype.kind in "fV":
        out[...] = np.nan
    elif out.dtype.kind in "iu":
        out[...] = np.iinfo(out.dtype).max
    return _result(out)


def full(shape, fill_value, dtype=None, order="C"):
    return _result(np.full(shape, _operand(fill_value), dtype))


def arange(start, stop=None, step=1, dtype=None):
    return _result(np.arange(start, stop, step, dtype) if stop is not None else np.arange(start, dtype=dtype))


def tri(N, M=None, k=0, dtype=float):
    return _result(np.tri(N, M, k, dtype))


def eye(N, M=None, k=0, dtype=float, order="C"):
    return _result(np.eye(N, M, k, dtype))


def where(condition, x=None, y=None):
    if x is None:
        _wait("where")
        return tuple(_result(i) for i in np.where(condition._a))
    if not isinstance(condition, ndarray):
        raise TypeError(f"where: Unsupported type {type(condition)}")
    return _result(np.where(condition._a, _operand(x), _operand(y)))


def _sequence(name, arrays):
    if not all(isinstance(a, ndarray) for a in arrays):
        raise TypeError(f"{name}: Only cupy arrays can be concatenated")
    return [a._a for a in arrays]


def concatenate(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    return _result(np.concatenate(_sequence("concatenate", tup), axis, dtype=dtype))


def stack(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    return _result(np.stack(_sequence("stack", tup), axis, dtype=dtype))


def take(a, indices, axis=None, out=None):
    index = _operand(indices)
    n = a.size if axis is None else a.shape[axis]
    if isinstance(indices, ndarray) and n:
        index = index % n
    return _result(np.take(a._a, index, axis))


def repeat(a, repeats, axis=None):
    if isinstance(repeats, ndarray):
        raise TypeError("repeat: repeats must be numbers of the host")
    return _result(np.repeat(a._a, repeats, axis))


def pad(array, pad_width, mode="constant", **options):
    return _result(np.pad(array._a, pad_width, mode, **options))


def isclose(a, b, rtol=1e-5, atol=1e-8, equal_nan=False):
    return _result(np.isclose(_operand(a), _operand(b), rtol, atol, equal_nan))


def argwhere(a):
    _wait("argwhere")
    return _result(np.argwhere(a._a))


def nonzero(a):
    _wait("nonzero")
    return tuple(_result(i) for i in np.nonzero(a._a))


def broadcast_arrays(*args):
    return [_result(a, b) for a, b in zip(np.broadcast_arrays(*(_operand(a) for a in args)), args, strict=True)]


def ravel_multi_index(multi_index, dims, mode="wrap", order="C"):
    return _result(np.ravel_multi_index(tuple(_operand(i) for i in multi_index), dims, mode=mode))


def may_share_memory(a, b, max_work=None):
    return np.may_share_memory(_operand(a), _operand(b))


shares_memory = may_share_memory


def einsum(*operands, **options):
    if options:
        raise TypeError(f"einsum: keyword arguments {sorted(options)}")
    dtype = operands[1].dtype
    wide = [_wide(_operand(o)) for o in operands[1:]]
    return _result(np.einsum(operands[0], *wide).astype(dtype))


def _wide(a):
    return a.astype(np.float32) if a.dtype.name in ("float16", "bfloat16") else a


def matmul(a, b, out=None):
    """bfloat16 beyond two dimensions fails on CuPy 14.2, and float16 is copied to float32: both are refused here."""
    x, y = (_operand(v) for v in (a, b))
    if max(x.ndim, y.ndim) > 2 and {"float16", "bfloat16"} & {x.dtype.name, y.dtype.name}:
        raise TypeError(f"matmul: {x.shape} @ {y.shape} in 16 bits beyond two dimensions")
    with np.errstate(all="ignore"):
        result = np.matmul(_wide(x), _wide(y)).astype(np.result_type(x, y))
    if out is None:
        return _result(result)
    if not out.flags.c_contiguous or out.dtype != result.dtype:
        raise ValueError("matmul: out must be C-contiguous and of the result's dtype")
    out._a[...] = result
    return out


def dot(a, b, out=None):
    if max(a.ndim, b.ndim) > 2:
        raise TypeError("dot: more than two dimensions")
    return matmul(a, b, out)


def _windows(x, window_shape, axis=None, *, subok=False, writeable=False):
    return _result(np.lib.stride_tricks.sliding_window_view(x._a, window_shape, axis, writeable=True), x)


def _as_strided(x, shape=None, strides=None):
    return _result(np.lib.stride_tricks.as_strided(x._a, shape, strides), x)


lib = types.SimpleNamespace(stride_tricks=types.SimpleNamespace(sliding_window_view=_windows, as_strided=_as_strided))


# ---- devices, streams, events ----------------------------------------------------------------------------------------

COUNT = 2  # GPUs that the stand-in pretends to see


class _Device:
    current = 0

    def __init__(self, index=None):
        self.id = _Device.current if index is None else int(index)

    def use(self):
        _Device.current = self.id
        return self

    def __enter__(self):
        self._before, _Device.current = _Device.current, self.id
        return self

    def __exit__(self, *error):
        _Device.current = self._before

    def synchronize(self):
        _wait("synchronize")

    @property
    def mem_info(self):
        return 70 << 30, 80 << 30


class _Stream:
    ptr = 0

    def __init__(self, null=False, non_blocking=False, ptds=False):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def synchronize(self):
        _wait("stream")

    def wait_event(self, event):
        pass

    def record(self, event=None):
        return event or _Event()


class _Event:
    def __init__(self, block=False, disable_timing=False):
        self.done = True

    def record(self, stream=None):
        pass

    def synchronize(self):
        _wait("event")


class _Pool:
    def used_bytes(self):
        return 0

    def total_bytes(self):
        return 0

    def free_all_blocks(self):
        pass


_pool, _stream = _Pool(), _Stream()
cuda = types.SimpleNamespace(
    Device=_Device, Stream=_Stream, Event=_Event, get_current_stream=lambda: _stream,
    runtime=types.SimpleNamespace(getDeviceCount=lambda: COUNT, getDeviceProperties=lambda i: {"name": b"stand-in"}),
)


def get_default_memory_pool():
    return _pool


# ---- cuBLAS: the two calls that kernels/cuda/gemm.py makes, on addresses as the library does them -------------------


def _memory(pointer, kind, leading, columns):
    """Column-major memory of (leading, columns) elements at an address, as an array."""
    dtype = _CUDA_DTYPES[kind]
    raw = (ctypes.c_char * (leading * columns * dtype.itemsize)).from_address(pointer)
    return np.frombuffer(raw, dtype).reshape(columns, leading).T, dtype


def _blas_operand(pointer, kind, leading, operation, rows, columns):
    """op(X), (rows, columns)."""
    if operation:
        rows, columns = columns, rows
    if leading < rows:
        raise ValueError(f"cuBLAS: leading dimension {leading} below {rows}")
    whole, _ = _memory(pointer, kind, leading, columns) if rows and columns else (np.zeros((leading, columns)), None)
    x = whole[:rows]
    return x.T if operation else x


class _Cublas:
    CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_GEMM_DEFAULT = 0, 1, -1
    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F, CUBLAS_COMPUTE_32F_FAST_TF32 = 68, 70, 77
    calls: list = []

    def gemmEx(self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc,
               computeType, algo):
        self.calls.append(("gemmEx", m, n, k, lda, ldb, ldc, Ctype, computeType))
        self._multiply(transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, computeType)

    def gemmStridedBatchedEx(self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb,
                             strideB, beta, C, Ctype, ldc, strideC, batchCount, computeType, algo):
        self.calls.append(("gemmStridedBatchedEx", m, n, k, lda, ldb, ldc, Ctype, computeType))
        for i in range(batchCount):
            a, b, c = (p + i * s * _CUDA_DTYPES[t].itemsize
                       for p, s, t in ((A, strideA, Atype), (B, strideB, Btype), (C, strideC, Ctype)))
            self._multiply(transa, transb, m, n, k, alpha, a, Atype, lda, b, Btype, ldb, beta, c, Ctype, ldc,
                           computeType)

    def _multiply(self, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, compute):
        if Atype != Btype or (Atype, Ctype) not in {(t, t) for t in _CUDA_DTYPES} | {(2, 0), (14, 0)}:
            raise ValueError("cuBLAS: types that do not go together")
        if (compute == self.CUBLAS_COMPUTE_64F) != (Atype == 1):
            raise ValueError("cuBLAS: the compute type does not fit")
        wide = ctypes.c_double if compute == self.CUBLAS_COMPUTE_64F else ctypes.c_float
        alpha, beta = (wide.from_address(p).value for p in (alpha, beta))
        a, b = _blas_operand(A, Atype, lda, transa, m, k), _blas_operand(B, Btype, ldb, transb, k, n)
        c, dtype = _memory(C, Ctype, ldc, n)
        product = alpha * (_wide(a) @ _wide(b))
        out = c[:m]
        out[...] = (product if beta == 0 else product + beta * _wide(out)).astype(dtype)


_CUDA_DTYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float64), 2: np.dtype(np.float16)}
try:
    import ml_dtypes

    _CUDA_DTYPES[14] = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    pass
cuda.cublas = _Cublas()
cuda.device = types.SimpleNamespace(get_cublas_handle=lambda: 1)
for _name, _value in {"CUDA_R_32F": 0, "CUDA_R_64F": 1, "CUDA_R_16F": 2, "CUDA_R_16BF": 14}.items():
    setattr(cuda.runtime, _name, _value)
