"""In-place operations, right also through views.

x.op_() computes out of place, writes the result into x's memory and gives x the result's graph node. Through a view,
the base changes as well: its new node is WriteView(base, values), and every view of it reads the new base (ReadView)
when next used. Under no_grad only the memory and the version counter change.
"""

import numpy as np

from .. import dtypes
from ..device import address
from ..engine import LAST, Leaf, Op, apply, modes, wrap
from ..errors import OpError, OpTypeError
from .common import cast, is_tensor, scalar
from .indexing import Put, SetItem, Take


def _offsets(array):
    """The byte offset of every element from the first."""
    total = np.zeros(array.shape, np.int64)
    for d, (n, stride) in enumerate(zip(array.shape, array.strides, strict=True)):
        total += (np.arange(n) * stride).reshape((n,) + (1,) * (array.ndim - d - 1))
    return total


def positions_in(base, view):
    """For each element of `view`, its position in the flattened `base`, whose memory it shares."""
    own = _offsets(base).reshape(-1)
    order = np.argsort(own)
    return order[np.searchsorted(own, (_offsets(view) + (address(view) - address(base))).reshape(-1), sorter=order)]


class WriteView(Op):
    """The base after `values` were written through a view of it at the flat `positions`."""

    def forward(ctx, base, values, positions):
        ctx.positions, ctx.shapes = positions, (base.shape, values.shape)
        return base  # the memory already holds the values

    def backward(ctx, g):
        flat = g.reshape(-1)
        index = (ctx.device.asarray(ctx.positions),)
        kept = apply(SetItem, flat, scalar(0, g, g.array.dtype), index=index, copy=True)
        return kept.reshape(ctx.shapes[0]), apply(Take, flat, index=index, distinct=True).reshape(ctx.shapes[1])


class ReadView(Op):
    """A view of a base that was written to since: `array` is the view's memory."""

    def forward(ctx, base, array, positions):
        ctx.positions, ctx.shape = positions, base.shape
        return array

    def backward(ctx, g):
        index = (ctx.device.asarray(ctx.positions),)
        size = int(np.prod(ctx.shape, dtype=int))
        return apply(Put, g.reshape(-1), shape=(size,), index=index, distinct=False).reshape(ctx.shape)


def _in_place(name):
    def method(self, *args, **options):
        return self._write(lambda x: getattr(x, name)(*[x if a is self else a for a in args], **options))

    method.__name__ = name + "_"
    method.__doc__ = f"`{name}` in place; returns self."
    return method


class InPlaceMethods:
    """PyTorch's in-place methods and operators. A leaf that requires a gradient may only be changed under no_grad."""

    def _write(self, compute, in_place=False):
        """self takes the values and the graph node of compute(x), where x stands for self: a copy of its values, so
        that what is saved for backward outlives the write. `in_place` says that it has written into self's memory
        already (x is then self)."""
        base = self if self._view is None else self._view[0]
        if modes.grad and base.node.__class__ is Leaf:
            raise RuntimeError(
                "a leaf tensor that requires a gradient cannot be changed in place while gradients are "
                "recorded; do it under tg.no_grad()"
            )
        array = self.array
        direct = in_place or not modes.grad
        result = compute(self if direct else wrap(array.copy(), self.device, self._current_node()))
        if result.array.shape != array.shape:
            raise OpError(
                f"in-place: the result has shape {tuple(result.array.shape)}, which does not fit into "
                f"{tuple(array.shape)}"
            )
        if dtypes.category(result.array.dtype) > dtypes.category(array.dtype):
            raise OpTypeError(f"in-place: a {result.array.dtype} result does not fit into a {array.dtype} tensor")
        result = cast(result, array.dtype)
        node = result.node
        if result.array is not array:
            if isinstance(array, np.ndarray) and not array.flags.writeable:
                raise OpError(
                    "in-place: this tensor shares memory with itself (expand) or is read-only; clone() it first"
                )
            array[...] = result.array
        self._bump()
        if not modes.grad:
            return self
        before = self._current_node()
        if self._view is None:
            self.node = node
            self.version()[1] += 1
        elif node is not None or base.node is not None:
            written = apply(WriteView, base, result, positions=positions_in(base.array, array))
            base.node = written.node
            base.version()[1] += 1
            self._refresh_view()
        if self.retains_grad and before is not self.node:  # .grad is that of the values it has now
            if before is not None and before.hooks:
                before.hooks.pop(LAST, None)
            self.retains_grad = False
            if self.node is not None:
                self.retain_grad()
        return self

    def _refresh_view(self):
        """Read a base that was changed through another view; returns the new node."""
        base = self._view[0]
        self._view = (base, base._version[1])
        self.node = None
        if base.node is not None:
            self.node = apply(ReadView, base, array=self.array, positions=positions_in(base.array, self.array)).node
        return self.node

    def copy_(self, source):
        """Copy the (broadcast) values of another tensor, with its gradient."""
        if not is_tensor(source):
            source = scalar(source, self)
        self[...] = source.expand(self.array.shape)
        return self

    def fill_(self, value):
        """Set every element to a number or 0-d tensor."""
        if is_tensor(value) and value.array.ndim:
            raise OpError(f"fill_: value must be a number or a 0-d tensor, got shape {value.array.shape}; use copy_()")
        self[...] = value
        return self

    def zero_(self):
        return self.fill_(0)

    add_, sub_, mul_, div_, pow_ = (_in_place(n) for n in ("add", "sub", "mul", "div", "pow"))
    neg_, abs_, exp_, log_, sqrt_, rsqrt_ = (_in_place(n) for n in ("neg", "abs", "exp", "log", "sqrt", "rsqrt"))
    tanh_, sigmoid_, relu_, reciprocal_ = (_in_place(n) for n in ("tanh", "sigmoid", "relu", "reciprocal"))
    floor_, ceil_, round_, trunc_, sin_, cos_ = (
        _in_place(n) for n in ("floor", "ceil", "round", "trunc", "sin", "cos")
    )
    clamp_, lerp_, addcmul_, addcdiv_ = (_in_place(n) for n in ("clamp", "lerp", "addcmul", "addcdiv"))
    masked_fill_, scatter_, scatter_add_ = (_in_place(n) for n in ("masked_fill", "scatter", "scatter_add"))
    index_add_, index_put_, square_, erf_ = (_in_place(n) for n in ("index_add", "index_put", "square", "erf"))
    tril_, triu_, cumsum_, addmm_ = (_in_place(n) for n in ("tril", "triu", "cumsum", "addmm"))
    sinh_, cosh_, tan_, log2_, log10_, sign_ = (_in_place(n) for n in ("sinh", "cosh", "tan", "log2", "log10", "sign"))
    logical_and_, logical_or_, logical_xor_ = (_in_place("logical_" + n) for n in ("and", "or", "xor"))
    eq_, ne_, lt_, le_, gt_, ge_ = (_in_place(n) for n in ("eq", "ne", "lt", "le", "gt", "ge"))
    floor_divide_, remainder_, logical_not_ = (_in_place(n) for n in ("floor_divide", "remainder", "logical_not"))
    clip_, baddbmm_, cumprod_, expm1_, log1p_ = (_in_place(n) for n in ("clip", "baddbmm", "cumprod", "expm1", "log1p"))

    __iadd__, __isub__, __imul__, __itruediv__, __ipow__ = add_, sub_, mul_, div_, pow_
    __ifloordiv__, __imod__ = floor_divide_, remainder_

    def __iand__(self, other):
        return self._write(lambda x: x & other)

    def __ior__(self, other):
        return self._write(lambda x: x | other)

    def __ixor__(self, other):
        return self._write(lambda x: x ^ other)
