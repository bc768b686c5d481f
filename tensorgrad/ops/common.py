"""What several families share: operands, dtypes, dimensions."""

import numbers
import sys
from sys import getrefcount

import numpy as np

from .. import dtypes
from ..engine import Op, apply, modes, wrap
from ..errors import OpIndexError, OpTypeError
from ..kernels.half import is_half

quiet = np.errstate(all="ignore")  # decorates forward: log(0) is -inf and 0/0 nan without a warning, as in PyTorch


class Cast(Op):
    """x as another dtype; the engine casts the gradient back."""

    def forward(ctx, x, dtype):
        return x.astype(dtype)

    def backward(ctx, g):
        return g


def cast(tensor, dtype):
    """`tensor` with dtype `dtype`, itself where it has it already. Casts from or to integers have no gradient."""
    if tensor.array.dtype == dtype:
        return tensor
    if not (dtypes.is_floating(dtype) and dtypes.is_floating(tensor.array.dtype)):
        return wrap(tensor.array.astype(dtype), tensor.device)
    return apply(Cast, tensor, dtype=dtype)


def autocast_dtype(tensor):
    """The 16-bit dtype in which products with `tensor` are to be computed here, or None."""
    return modes.autocast.get(tensor.device.type) if modes.autocast else None


def to_half(tensors):
    """Operands of a product under autocast: those of 16 or 32 bits in the context's dtype."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None or any(t.array.dtype.kind in "iub" for t in tensors):
        return tensors
    return [t if t.array.dtype == dtypes.float64 else cast(t, dtype) for t in tensors]


def to_single(*tensors):
    """What a loss is computed from under autocast: 16 bits become 32."""
    if not modes.autocast:
        return tensors
    return [cast(t, dtypes.float32) if is_half(t.array.dtype) else t for t in tensors]


def half_copy(tensor, dtype):
    """The tensor's array in 16 bits, made once and kept until its values change."""
    kept, writes = tensor._half, tensor.version()[0]
    if kept is None or kept[0] is not tensor.array or kept[1] != writes or kept[2].dtype != dtype:
        tensor._half = kept = (tensor.array, writes, tensor.array.astype(dtype))
    return kept[2]


def is_tensor(value):
    return hasattr(value, "node") and hasattr(value, "array")


def scalar(value, like, dtype=None):
    """A Python number or array as a Tensor on the device of `like`."""
    return wrap(like.device.scalar(value, dtype), like.device)


def operands(a, b):
    """Two operands (at least one a Tensor) as Tensors of one dtype, by PyTorch's promotion."""
    ranks, values = [], []
    like = a if is_tensor(a) else b
    for value in (a, b):
        if is_tensor(value):
            ranks.append((value.array.dtype, 2 if value.array.ndim else 1))
        elif isinstance(value, numbers.Number) and not isinstance(value, np.generic):
            if isinstance(value, complex):
                raise OpTypeError("complex numbers are not supported")
            ranks.append((dtypes.scalar_dtype(value), 0))
        elif isinstance(value, np.ndarray | np.generic) or hasattr(value, "__cuda_array_interface__"):
            value = scalar(value, like)
            ranks.append((value.array.dtype, 2 if value.array.ndim else 1))
        else:
            raise OpTypeError(f"expected a Tensor, an array or a number, got {type(value).__name__}")
        values.append(value)
    dtype = dtypes.result_dtype(ranks)
    return [cast(v, dtype) if is_tensor(v) else scalar(v, like, dtype) for v in values]


def binary(op, a, b):
    """Apply a two-operand op after bringing both to one dtype; the common case costs two attribute reads."""
    try:
        if a.array.dtype is b.array.dtype:
            return apply(op, a, b)
    except AttributeError:
        pass
    a, b = operands(a, b)
    return apply(op, a, b)


def require_floating(name, tensor):
    if not dtypes.is_floating(tensor.array.dtype):
        raise OpTypeError(f"{name}: needs a floating dtype, got {tensor.array.dtype}")


def to_float(tensor):
    """Integers become the default floating dtype, as PyTorch does before exp, sqrt, division ..."""
    return tensor if dtypes.is_floating(tensor.array.dtype) else cast(tensor, dtypes.get_default_dtype())


def _caller():
    """The name of the operation that looks at its arguments here, for an error message."""
    frame = sys._getframe(2)
    while frame.f_globals["__name__"] == __name__ or frame.f_code.co_name.startswith(("<", "_")):
        frame = frame.f_back  # past helpers and comprehensions, to the method that the user called
    return frame.f_code.co_name


def dim_index(dim, ndim, name="dim"):
    """A dimension counted from the front; negative ones count from the back. 0-d tensors have dimension 0 and -1."""
    n = max(ndim, 1)
    if not isinstance(dim, int | np.integer) or isinstance(dim, bool):
        raise OpTypeError(f"{_caller()}: {name} must be an integer, got {dim!r}")
    if not -n <= dim < n:
        raise OpIndexError(
            f"{_caller()}: {name} {dim} is out of range for a tensor of {ndim} dimensions ({-n} to {n - 1})"
        )
    return int(dim) % n


def dim_tuple(dim, ndim):
    """None (all), a dimension or several, as a sorted tuple of axes that NumPy accepts (empty for 0-d)."""
    if dim is None or (isinstance(dim, tuple | list) and not dim):
        return tuple(range(ndim))
    dims = [dim_index(d, ndim) for d in (dim if isinstance(dim, tuple | list) else (dim,))]
    if len(set(dims)) != len(dims):
        raise OpIndexError(f"{_caller()}: dim {tuple(dim)} names a dimension twice")
    return tuple(sorted(dims)) if ndim else ()


def zero_like(g):
    """The gradient of what is piecewise constant."""
    return wrap(g.device.xp.zeros_like(g.array), g.device)


def sizes(args):
    """Sizes given as f(2, 3) or f((2, 3)) as a tuple of ints."""
    if len(args) == 1 and isinstance(args[0], tuple | list):
        args = args[0]
    return tuple(int(a) for a in args)


def _holders(entries, i):
    """How many hold the array of entries[i], and the one whose memory it views."""
    return getrefcount(entries[i][0]), getrefcount(entries[i][0].base)


_ALONE = _holders([(np.empty(2)[:1],)], 0)


def take_saved(ctx, i):
    """In backward: the i-th saved array, for its memory to be overwritten, where that can be seen by nobody: nothing
    saved is needed again, no Tensor, array, view or other operation holds it, and its memory is the library's own. Else
    None. Once it is taken, a second backward fails as after a complete one, even where this one is interrupted."""
    entries = ctx._saved
    array = entries[i][0]
    memory = array if ctx.device.owns(array) else array.base
    is_writeable = getattr(array.flags, "writeable", 0 not in array.strides)  # CuPy has no such flag
    if ctx.retain or memory is None or not ctx.device.owns(memory) or not is_writeable:
        return None
    viewed = array is not memory
    del array, memory
    held, behind = _holders(entries, i)
    if held > _ALONE[0] or (viewed and behind > _ALONE[1]):
        return None
    ctx._saved = None
    return entries[i][0]
