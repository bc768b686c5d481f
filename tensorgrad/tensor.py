"""Tensor: an array of NumPy or CuPy with a gradient. Its methods come from the families in `ops/`."""

import operator

import numpy as np

from . import dtypes, engine
from .device import cpu
from .device import device as as_device
from .engine import LAST, Leaf, TensorBase, add_hook, modes, wrap
from .errors import OpTypeError
from .ops.arithmetic import ArithmeticMethods
from .ops.comparison import ComparisonMethods
from .ops.conversion import ConversionMethods
from .ops.indexing import IndexingMethods
from .ops.inplace import InPlaceMethods
from .ops.joining import JoiningMethods
from .ops.linalg import LinearAlgebraMethods
from .ops.movement import MovementMethods
from .ops.nn import ActivationMethods
from .ops.reduction import ReductionMethods
from .ops.sampling import SamplingMethods
from .ops.unary import UnaryMethods


class Tensor(
    ArithmeticMethods,
    UnaryMethods,
    ComparisonMethods,
    ConversionMethods,
    ReductionMethods,
    MovementMethods,
    JoiningMethods,
    IndexingMethods,
    LinearAlgebraMethods,
    ActivationMethods,
    InPlaceMethods,
    SamplingMethods,
    TensorBase,
):
    """A multi-dimensional array on a device that can record operations for `backward()`.

    `Tensor(data)` copies numbers, nested lists, arrays or tensors; see `tg.tensor`. `array` is the raw array."""

    __array_ufunc__ = None  # NumPy and CuPy arrays leave operators with a Tensor to it
    __hash__ = object.__hash__

    def __init__(self, data, dtype=None, device=None, requires_grad=False):
        is_tensor = isinstance(data, TensorBase)
        place = data.device if is_tensor and device is None else as_device(device or cpu)
        array = to_array(data, dtype)
        if is_tensor and data.device is not place:
            array = data.device.to_numpy(array)
        self.array = place.xp.array(place.asarray(array), order="C", copy=True)
        self.device = place
        if requires_grad:
            self.requires_grad_()

    # ---- what it is
    shape = property(lambda self: self.array.shape, doc="Sizes of the dimensions, a tuple.")
    ndim = property(lambda self: self.array.ndim, doc="Number of dimensions.")
    dtype = property(lambda self: self.array.dtype, doc="A NumPy dtype, e.g. tg.float32.")
    grad_fn = property(lambda self: None if self.is_leaf else self._current_node(), doc="Graph node, None for leaves.")
    is_leaf = property(
        lambda self: (node := self._current_node()) is None or node.__class__ is Leaf,
        doc="Made by the user, not by an op?",
    )
    is_cuda = property(lambda self: self.device.type == "cuda")
    itemsize = property(lambda self: self.array.dtype.itemsize, doc="Bytes per element.")
    nbytes = property(lambda self: self.array.nbytes, doc="Bytes of all elements.")

    def dim(self):
        return self.array.ndim

    def size(self, dim=None):
        """The shape, or the size of one dimension."""
        return self.array.shape if dim is None else self.array.shape[dim]

    def numel(self):
        """Number of elements."""
        return self.array.size

    nelement = numel

    def stride(self, dim=None):
        """Steps between elements per dimension, in elements."""
        steps = tuple(s // self.array.itemsize for s in self.array.strides)
        return steps if dim is None else steps[dim]

    def element_size(self):
        return self.array.itemsize

    def is_floating_point(self):
        return dtypes.is_floating(self.array.dtype)

    def __len__(self):
        if self.array.ndim == 0:
            raise TypeError("len() of a 0-d tensor")
        return len(self.array)

    def __iter__(self):
        if self.array.ndim == 0:
            raise TypeError("cannot iterate over a 0-d tensor")
        return iter(self.unbind(0))

    def __contains__(self, value):
        return bool((self == value).any())

    # ---- the gradient
    @property
    def requires_grad(self):
        """Does backward() reach this tensor? Setting it on a leaf starts or stops that."""
        return self._current_node() is not None

    @requires_grad.setter
    def requires_grad(self, value):
        if not self.is_leaf:
            if not value:
                raise RuntimeError("requires_grad of a non-leaf tensor cannot be unset; use detach()")
            return
        if not value:
            self._frozen, self.node = self.node, None
        elif self.node is None:
            if not dtypes.is_floating(self.array.dtype):
                raise OpTypeError(f"only floating-point tensors can require a gradient, not {self.array.dtype}")
            self._view = None  # from here on a beginning, whatever is written into the base
            self.node = self._frozen or Leaf(self)

    def requires_grad_(self, requires_grad=True):
        """Set requires_grad and return self."""
        self.requires_grad = requires_grad
        return self

    def backward(self, gradient=None, retain_graph=None, create_graph=False, inputs=None):
        """Add d self / d leaf into the .grad of every leaf (or of `inputs`) that requires a gradient.
        `gradient` (d loss / d self, this shape) may be left out for a single element."""
        from .autograd import backward

        backward(self, gradient, retain_graph, create_graph, inputs)

    def detach(self):
        """The same memory without the graph; shares the version counter."""
        out = wrap(self.array.view(), self.device)  # an array object of its own: the engine tells tensors apart by it
        out._version = self.version()
        return out

    def detach_(self):
        """Cut this tensor off its graph."""
        self.node = None
        return self

    @property
    def data(self):
        """The same memory without graph and version counter; assigning replaces the memory."""
        return wrap(self.array.view(), self.device)

    @data.setter
    def data(self, value):
        self.array, self.device = value.array.view(), value.device  # no two tensors hold one array object
        self._grad_buffer = None

    def register_hook(self, hook):
        """Call hook(gradient) when this tensor's gradient is ready; a returned tensor replaces it. Returns a handle
        with remove()."""
        return RemovableHandle(add_hook(self, hook))

    def retain_grad(self):
        """Keep .grad of this non-leaf tensor in backward()."""
        if not self.requires_grad:
            raise RuntimeError("retain_grad: the tensor does not require a gradient")
        if self.is_leaf or self.retains_grad:
            return
        self.retains_grad = True
        from weakref import ref

        own = ref(self)

        def keep(gradient):
            tensor = own()
            if tensor is not None:
                copy = gradient if modes.grad else wrap(gradient.array.copy(), gradient.device)
                tensor.grad = copy if tensor.grad is None else tensor.grad + copy

        add_hook(self, keep, LAST)

    retains_grad = False
    _frozen = None  # the Leaf that graphs from before requires_grad was unset know

    # ---- Python numbers, NumPy, DLPack
    def item(self):
        """The only element as a Python number; waits for the device."""
        if self.array.size != 1:
            raise RuntimeError(f"item: a tensor of shape {self.shape} has {self.array.size} elements, not one")
        return self.device.item(self.array)

    def tolist(self):
        return self.device.to_numpy(self.array).tolist()

    def numpy(self):
        """A NumPy array, sharing memory on the CPU. Fails where a gradient is recorded: detach() first."""
        if self.requires_grad:
            raise RuntimeError("numpy: this tensor requires a gradient; call .detach().numpy()")
        return self.device.to_numpy(self.array)

    def __array__(self, dtype=None, copy=None):
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            return array.astype(dtype)
        return array.copy() if copy else array

    def __dlpack__(self, **options):
        if self.requires_grad:
            raise BufferError("__dlpack__: this tensor requires a gradient; call .detach() first")
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __bool__(self):
        if self.array.size != 1:
            raise RuntimeError(f"the truth of a tensor of shape {self.shape} is ambiguous; use .any() or .all()")
        return bool(self.device.item(self.array))

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __index__(self):
        if self.array.dtype.kind not in "iub":
            raise TypeError(f"only integer tensors of one element can be an index, not {self.array.dtype}")
        return operator.index(self.item())

    def __format__(self, spec):
        return format(self.item(), spec) if self.array.ndim == 0 else object.__format__(self, spec)

    def __repr__(self):
        from .printing import tensor_repr

        return tensor_repr(self)

    # ---- copies and relatives
    def cpu(self):
        return self.to("cpu")

    def cuda(self, index=0):
        return self.to(f"cuda:{index}")

    def new_tensor(self, data, dtype=None, requires_grad=False):
        return Tensor(data, dtype or self.dtype, self.device, requires_grad)

    def new_full(self, size, fill_value, dtype=None):
        return wrap(self.device.xp.full(size, fill_value, dtypes.as_dtype(dtype or self.dtype)), self.device)

    def new_zeros(self, *size, dtype=None):
        return self.new_full(_size(size), 0, dtype)

    def new_ones(self, *size, dtype=None):
        return self.new_full(_size(size), 1, dtype)

    def new_empty(self, *size, dtype=None):
        return wrap(self.device.xp.empty(_size(size), dtypes.as_dtype(dtype or self.dtype)), self.device)

    def __deepcopy__(self, memo):
        if not self.is_leaf:
            raise RuntimeError("only leaf tensors can be deep-copied; use clone() or detach()")
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.array, copy.device = self.array.copy(), self.device
        copy.requires_grad_(self.requires_grad)
        if self.grad is not None:
            copy.grad = wrap(self.grad.array.copy(), self.device)
        return copy

    def __reduce__(self):
        if not self.is_leaf:
            raise RuntimeError("only leaf tensors can be pickled; detach() first")
        return _rebuild, (self.__class__, self.device.to_numpy(self.array), str(self.device), self.requires_grad)


def _rebuild(cls, array, device, requires_grad):
    return (
        cls(array, requires_grad=requires_grad)
        if device == "cpu"
        else Tensor(array, device=device, requires_grad=requires_grad)
    )


def _size(size):
    return tuple(size[0]) if len(size) == 1 and isinstance(size[0], tuple | list) else size


class RemovableHandle:
    """What register_hook returns; remove(), or the end of a `with`, takes the hook away."""

    def __init__(self, remove):
        self.remove = remove

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.remove()


def to_array(data, dtype=None):
    """Numbers, nested lists, arrays or tensors as an array: Python floats get the default dtype, integers int64."""
    dtype = None if dtype is None else dtypes.as_dtype(dtype)
    if isinstance(data, TensorBase):
        array = data.array
    elif isinstance(data, np.ndarray | np.generic) or hasattr(data, "__cuda_array_interface__"):
        array = data
    else:
        if isinstance(data, list | tuple):
            data = _plain(data)
        try:
            array = np.asarray(data)
        except ValueError as error:
            raise OpTypeError(f"tensor: the nested lists are ragged: {error}") from None
        if dtype is None and array.dtype.kind == "f" and not hasattr(data, "__array__"):
            dtype = dtypes.get_default_dtype()
        if dtype is None and array.size == 0 and array.dtype == np.float64:
            dtype = dtypes.get_default_dtype()
    if array.dtype.kind in "OUSM":
        raise OpTypeError(f"tensor: cannot make a tensor of {array.dtype} data")
    if array.dtype.kind == "c":
        raise OpTypeError("tensor: complex numbers are not supported")
    return array if dtype is None or array.dtype == dtype else array.astype(dtype)


def _plain(data):
    """Nested lists that may hold tensors, as nested lists of numbers."""
    return [_plain(x) if isinstance(x, list | tuple) else x.tolist() if isinstance(x, TensorBase) else x for x in data]


engine.bind(Tensor)
