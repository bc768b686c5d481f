"""Data types are NumPy dtype objects; promotion follows PyTorch's rules, which differ from NumPy's.

`tg.float32 is np.dtype("float32")`, so a dtype can be handed to NumPy and CuPy as it is.
"""

import builtins

import numpy as np

bool = np.dtype("bool")
uint8 = np.dtype("uint8")
int8 = np.dtype("int8")
int16 = short = np.dtype("int16")
int32 = int = np.dtype("int32")
int64 = long = np.dtype("int64")
float16 = half = np.dtype("float16")
float32 = float = np.dtype("float32")
float64 = double = np.dtype("float64")

_PYTHON = {"bool": bool, "int": int64, "float": None}  # None: the default floating dtype
_BY_NAME = {d.name: d for d in (bool, uint8, int8, int16, int32, int64, float16, float32, float64)}
_BY_NAME.update(half=float16, float=float32, double=float64, long=int64, int=int32, short=int16)
_default = float32


def __getattr__(name):
    if name == "bfloat16":
        return bfloat16_dtype()
    raise AttributeError(f"module 'tensorgrad' has no dtype {name!r}")


def bfloat16_dtype():
    """NumPy has no bfloat16 of its own; the package `ml_dtypes` registers one."""
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError("dtype bfloat16 needs the package ml_dtypes: pip install ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)


def get_default_dtype():
    """The dtype of floating-point values made from Python numbers (float32 unless set)."""
    return _default


def set_default_dtype(dtype):
    """Set the dtype that Python floats become: float16, float32 or float64."""
    global _default
    dtype = as_dtype(dtype)
    if dtype.kind != "f":
        raise TypeError(f"set_default_dtype: {dtype} is not a floating-point dtype")
    _default = dtype


def as_dtype(dtype):
    """The np.dtype meant by a dtype, a name ("float32", "bfloat16", "long") or a Python type."""
    if isinstance(dtype, np.dtype):
        return dtype
    if dtype is None:
        return _default
    name = getattr(dtype, "__name__", dtype)
    if isinstance(dtype, type) and name in _PYTHON:
        return _PYTHON[name] or _default
    if name == "bfloat16":
        return bfloat16_dtype()
    if name in _BY_NAME:
        return _BY_NAME[name]
    try:
        return np.dtype(dtype)
    except TypeError:
        raise TypeError(f"{dtype!r} is not a dtype; known are {', '.join(sorted(_BY_NAME))}, bfloat16") from None


def category(dtype):
    """0 bool, 1 integer, 2 floating, 3 complex: a higher category wins a promotion."""
    return {"b": 0, "i": 1, "u": 1, "c": 3}.get(dtype.kind, 2)  # bfloat16 has kind "V"


def is_floating(dtype):
    return category(dtype) == 2


def promote_types(a, b):
    """The smallest dtype holding both, PyTorch's way: int64 with float32 gives float32 (NumPy: float64)."""
    if a == b:
        return a
    ca, cb = category(a), category(b)
    if ca != cb:
        return a if ca > cb else b
    if ca == 2 and "V" in (a.kind, b.kind):  # bfloat16 with another float
        other = b if a.kind == "V" else a
        return float32 if other == float16 else other
    return np.promote_types(a, b)


def result_dtype(operands):
    """PyTorch's promotion over `operands` = [(dtype, rank)], rank 2 for tensors with dimensions, 1 for
    0-d tensors, 0 for Python numbers: a lower rank only counts when its category is higher."""
    result = None
    for rank in (2, 1, 0):
        group = None
        for dtype, r in operands:
            if r == rank:
                group = dtype if group is None else promote_types(group, dtype)
        if group is None:
            continue
        if result is None:
            result = group
        elif category(group) > category(result):
            result = _default if rank == 0 and category(group) == 2 else group
    return result


def scalar_dtype(value):
    """The dtype a Python number has by itself."""
    kind = type(value)
    if kind is builtins.bool:
        return bool
    if kind is builtins.int:
        return int64
    if kind is builtins.float:
        return _default
    return np.asarray(value).dtype
