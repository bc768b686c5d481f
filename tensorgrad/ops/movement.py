"""Moving elements without changing them: reshape, permute, expand, flip, pad, roll, repeat, unfold."""

import math
import operator

import numpy as np

from .. import dtypes
from ..engine import Op, apply, wrap
from ..errors import OpError, OpIndexError, OpTypeError
from .common import dim_index, dim_tuple, is_tensor, sizes


class Reshape(Op):
    view = True

    def forward(ctx, x, shape):
        ctx.shape = x.shape
        y = x.reshape(shape)
        if not ctx.xp.may_share_memory(x, y):
            ctx.view = False
        return y

    def backward(ctx, g):
        return g.reshape(ctx.shape)

    def explain(ctx, arrays, options):
        return f"{arrays[0].size} elements do not fit shape {options['shape']}"


class Permute(Op):
    view = True

    def forward(ctx, x, dims):
        ctx.dims = dims
        return x.transpose(dims)

    def backward(ctx, g):
        inverse = [0] * len(ctx.dims)
        for i, d in enumerate(ctx.dims):
            inverse[d] = i
        return g.permute(tuple(inverse))


class Expand(Op):
    view = True

    def forward(ctx, x, shape):
        y = ctx.xp.broadcast_to(x, shape)
        return y if y.size != x.size else x.reshape(shape)  # nothing is repeated: it may be written to

    def backward(ctx, g):
        return g  # the engine sums it down

    def explain(ctx, arrays, options):
        return f"the shape does not expand to {options['shape']}: sizes must be equal or 1"


class Flip(Op):
    def forward(ctx, x, dims):
        ctx.dims = dims
        return ctx.xp.flip(x, dims).copy()

    def backward(ctx, g):
        return g.flip(ctx.dims)


class Pad(Op):
    """Surround with a constant; `widths` is ((before, after), ...) per dimension, not negative."""

    def forward(ctx, x, widths, value):
        ctx.window = tuple(slice(b, b + s) for (b, _), s in zip(widths, x.shape, strict=True))
        return ctx.xp.pad(x, widths, constant_values=value)

    def backward(ctx, g):
        return g[ctx.window]


class Unfold(Op):
    """Sliding windows over a dimension as a new last dimension (a view)."""

    view = True

    def forward(ctx, x, dim, size, step):
        ctx.shape, ctx.dim, ctx.step = x.shape, dim, step
        windows = (
            np.lib.stride_tricks.sliding_window_view if ctx.xp is np else ctx.xp.lib.stride_tricks.sliding_window_view
        )
        return windows(x, size, axis=dim, **({"writeable": True} if ctx.xp is np else {}))[
            (slice(None),) * dim + (slice(None, None, step),)
        ]

    def backward(ctx, g):
        n = g.array.shape[ctx.dim]
        size = g.array.shape[-1]
        positions = (ctx.xp.arange(n)[:, None] * ctx.step + ctx.xp.arange(size)).reshape(-1)
        g = g.movedim(-1, ctx.dim + 1).flatten(ctx.dim, ctx.dim + 1)
        zero = wrap(ctx.xp.zeros(ctx.shape, g.array.dtype), ctx.device)
        return zero.index_add(ctx.dim, wrap(positions, ctx.device), g)


class MovementMethods:
    """PyTorch's shape methods."""

    def reshape(self, *sizes_, shape=None):
        """The same elements in another shape; one size may be -1. A view where memory allows, else a copy."""
        return apply(
            Reshape, self, shape=_infer(self.array, sizes(sizes_) if shape is None else tuple(shape), "reshape")
        )

    def view(self, *shape):
        """reshape that never copies: an error where the memory layout does not allow it. view(dtype): the same bits
        read as another dtype, without gradient."""
        if len(shape) == 1 and not isinstance(shape[0], tuple | list | int | np.integer) and not is_tensor(shape[0]):
            return self._bits_as(dtypes.as_dtype(shape[0]))
        result = self.reshape(*shape)
        if self.array.size and not self.device.xp.may_share_memory(result.array, self.array):
            raise OpError(
                f"view: {tuple(self.array.shape)} with strides {self.array.strides} has no view of shape "
                f"{sizes(shape)}; use reshape() or contiguous()"
            )
        return result

    def _bits_as(self, dtype):
        try:
            out = wrap(self.array.view(dtype), self.device)
        except ValueError as error:
            raise OpError(f"view: {self.array.shape} of {self.array.dtype} has no view as {dtype}: {error}") from None
        out._version = self.version()
        return out

    def view_as(self, other):
        return self.view(other.array.shape)

    def reshape_as(self, other):
        return self.reshape(other.array.shape)

    def flatten(self, start_dim=0, end_dim=-1):
        """Join the dimensions start_dim ... end_dim into one."""
        ndim = self.array.ndim
        if ndim == 0:
            return self.reshape(1)
        start, end = dim_index(start_dim, ndim), dim_index(end_dim, ndim)
        if start > end:
            raise OpError(f"flatten: start_dim {start_dim} comes after end_dim {end_dim}")
        shape = self.array.shape
        if start == end:
            return self
        return self.reshape(shape[:start] + (math.prod(shape[start : end + 1]),) + shape[end + 1 :])

    def ravel(self):
        return self.reshape(-1)

    def unflatten(self, dim, sizes):
        """Split dimension `dim` into several of the given sizes; one may be -1."""
        dim = dim_index(dim, self.array.ndim)
        shape = self.array.shape
        if isinstance(sizes, int) or not sizes:
            raise OpError(f"unflatten: sizes must be a non-empty tuple, got {sizes!r}")
        known = math.prod(s for s in sizes if s != -1)
        new = tuple(shape[dim] // known if s == -1 and known else s for s in sizes)
        if math.prod(new) != shape[dim]:
            raise OpError(
                f"unflatten: sizes {tuple(sizes)} do not multiply to {shape[dim]}, the size of dimension {dim}"
            )
        return self.reshape(shape[:dim] + new + shape[dim + 1 :])

    def permute(self, *order, dims=None):
        """Dimensions in another order (a view)."""
        ndim = self.array.ndim
        dims = [dim_index(d, ndim) for d in (sizes(order) if dims is None else dims)]
        if sorted(dims) != list(range(ndim)):
            raise OpError(f"permute: {tuple(self.array.shape)}: dims {dims} are not each of 0 ... {ndim - 1} once")
        return apply(Permute, self, dims=tuple(dims))

    def transpose(self, dim0, dim1):
        """Swap two dimensions (a view)."""
        ndim = self.array.ndim
        a, b = dim_index(dim0, ndim), dim_index(dim1, ndim)
        if ndim == 0:
            return self.permute(())
        order = list(range(ndim))
        order[a], order[b] = b, a
        return apply(Permute, self, dims=tuple(order))

    swapaxes = swapdims = transpose

    def t(self):
        """The transpose of a matrix; vectors and 0-d tensors as they are."""
        if self.array.ndim > 2:
            raise OpError(f"t: {tuple(self.array.shape)} has more than 2 dimensions; use .mT or transpose(dim0, dim1)")
        return self.transpose(0, 1) if self.array.ndim == 2 else self.permute(tuple(range(self.array.ndim)))

    def movedim(self, source, destination):
        """Move dimensions to new places; the others keep their order (a view)."""
        ndim = self.array.ndim
        src = [dim_index(d, ndim) for d in (source if isinstance(source, tuple | list) else (source,))]
        dst = [dim_index(d, ndim) for d in (destination if isinstance(destination, tuple | list) else (destination,))]
        if len(src) != len(dst) or len(set(src)) != len(src) or len(set(dst)) != len(dst):
            raise OpError(
                f"movedim: source {source} and destination {destination} must name as many distinct dimensions"
            )
        if ndim == 0:
            return self.permute(())
        order = [d for d in range(ndim) if d not in src]
        for place, d in sorted(zip(dst, src, strict=True)):
            order.insert(place, d)
        return apply(Permute, self, dims=tuple(order))

    moveaxis = movedim

    def squeeze(self, dim=None):
        """Drop dimensions of size 1: all, or those named."""
        shape = self.array.shape
        drop = (
            set(range(len(shape)))
            if dim is None
            else {dim_index(d, len(shape)) for d in (dim if isinstance(dim, tuple | list) else (dim,))}
        )
        return self.reshape(tuple(s for i, s in enumerate(shape) if s != 1 or i not in drop))

    def unsqueeze(self, dim):
        """A new dimension of size 1 at `dim`."""
        dim = dim_index(dim, self.array.ndim + 1)
        shape = self.array.shape
        return self.reshape(shape[:dim] + (1,) + shape[dim:])

    def expand(self, *sizes_, size=None):
        """Repeat dimensions of size 1 without copying; -1 keeps a size (a read-only view)."""
        shape = sizes(sizes_) if size is None else tuple(size)
        own = self.array.shape
        if len(shape) < len(own):
            raise OpError(f"expand: {own} has more dimensions than the target {shape}")
        lead = len(shape) - len(own)
        if any(s == -1 for s in shape[:lead]):
            raise OpError(f"expand: -1 is not allowed for the new leading dimensions in {shape}")
        return apply(Expand, self, shape=tuple(own[i - lead] if s == -1 else s for i, s in enumerate(shape)))

    def expand_as(self, other):
        return self.expand(other.array.shape)

    def broadcast_to(self, *sizes_, size=None):
        """expand under NumPy's name."""
        return self.expand(*sizes_, size=size)

    def flip(self, *order, dims=None):
        """Reverse the order along each of the given dims (a copy)."""
        dims = sizes(order) if dims is None else sizes((dims,))
        return apply(Flip, self, dims=dim_tuple(dims, self.array.ndim) if dims else ())

    def narrow(self, dim, start, length):
        """`length` elements of `dim` from `start` (a view)."""
        dim = dim_index(dim, self.array.ndim)
        start = operator.index(start) if not is_tensor(start) or start.array.dtype != bool else None
        if start is None:
            raise OpTypeError("narrow: start must be an integer, not a bool")
        n = self.array.shape[dim] if self.array.ndim else 0
        begin = start + n if start < 0 else start
        if not self.array.ndim or not 0 <= begin <= n or length < 0 or begin + length > n:
            raise OpIndexError(
                f"narrow: {tuple(self.array.shape)}: start {start}, length {length} leave dimension {dim}"
            )
        return self[(slice(None),) * dim + (slice(begin, begin + length),)]

    def select(self, dim, index):
        """Element `index` of `dim`, which disappears (a view)."""
        if not self.array.ndim:
            raise OpIndexError("select: a 0-d tensor has no dimension to select from")
        return self[(slice(None),) * dim_index(dim, self.array.ndim) + (int(index),)]

    def roll(self, shifts, dims=None):
        """Elements shifted along `dims`, those pushed out come in at the other end; flattened where dims is None."""
        if dims is None or (isinstance(dims, tuple | list) and not dims):
            if isinstance(shifts, tuple | list) and len(shifts) != 1:
                raise OpError("roll: several shifts need as many dims")
            shift = shifts[0] if isinstance(shifts, tuple | list) else shifts
            return self.reshape(-1).roll(shift, 0).reshape(self.array.shape)
        pairs = list(zip(*([v] if isinstance(v, int) else v for v in (shifts, dims)), strict=True))
        x = self
        for shift, dim in pairs:
            dim = dim_index(dim, x.array.ndim)
            if not x.array.ndim:
                raise OpIndexError("roll: a 0-d tensor has no dimension to roll along")
            n = x.array.shape[dim]
            if n and shift % n:
                head, tail = x.split([n - shift % n, shift % n], dim)
                x = tail._cat([head], dim)
        return x if x is not self else self.clone()

    def repeat(self, *counts, repeats=None):
        """The whole tensor repeated along each dimension; new leading dimensions may be given."""
        repeats = sizes(counts) if repeats is None else tuple(repeats)
        lead = len(repeats) - self.array.ndim
        if lead < 0 or min(repeats, default=0) < 0:
            raise OpError(
                f"repeat: {repeats} must give a count (not negative) for each dimension of {tuple(self.array.shape)}"
            )
        shape = (1,) * lead + self.array.shape
        if all(r == 1 for r in repeats):
            return self.clone().reshape(shape)
        x = self.reshape(tuple(v for s in shape for v in (1, s)))
        x = x.expand(tuple(v for r, s in zip(repeats, shape, strict=True) for v in (r, s)))
        return x.reshape(tuple(r * s for r, s in zip(repeats, shape, strict=True))).contiguous()

    def tile(self, *counts, dims=None):
        """repeat, with leading ones added where too few counts are given."""
        dims = sizes(counts) if dims is None else tuple(dims)
        return self.repeat((1,) * (self.array.ndim - len(dims)) + dims)

    def repeat_interleave(self, repeats, dim=None, *, output_size=None):
        """Each element repeated `repeats` times (a number, or a tensor with a count per element) along `dim`."""
        if dim is None:
            return self.reshape(-1).repeat_interleave(repeats, 0)
        x = self.reshape(1) if not self.array.ndim else self
        dim = dim_index(dim, x.array.ndim)
        xp, n = self.device.xp, x.array.shape[dim]
        counts = repeats.array if is_tensor(repeats) else np.asarray(repeats)
        if counts.dtype.kind not in "iu" or (counts < 0).any():
            raise OpError("repeat_interleave: repeats must be integers, not negative")
        if counts.ndim > 1 or (counts.size not in (1, n)):
            raise OpError(f"repeat_interleave: {counts.size} repeats for {n} elements of dimension {dim}")
        counts = (
            counts.reshape(-1) if counts.size != 1 else np.broadcast_to(self.device.to_numpy(counts).reshape(-1), (n,))
        )
        index = np.repeat(np.arange(n), self.device.to_numpy(counts))
        return x.index_select(dim, wrap(xp.asarray(index), self.device))

    def unfold(self, dimension, size, step):
        """Windows of `size` every `step` elements along a dimension, as a new last dimension (a view)."""
        dim = dim_index(dimension, self.array.ndim)
        n = self.array.shape[dim] if self.array.ndim else 1
        if size < 0 or size > n or step <= 0:
            raise OpError(f"unfold: size {size} (0 to {n}) and step {step} (positive) do not fit dimension {dim}")
        x = self if self.array.ndim else self.reshape(1)
        if size == 0:
            index = tuple(slice(None) for _ in range(dim)) + (slice(0, n + 1, step),)
            shape = list(x.array.shape)
            shape[dim] = n // step + 1
            return x[index].narrow(dim, 0, 0).reshape(*shape[:dim], 0, *shape[dim + 1 :]).new_empty(*shape, 0)
        out = apply(Unfold, x, dim=dim, size=size, step=step)
        return out if self.array.ndim else out.reshape(size)

    def contiguous(self):
        """self where its memory is in C order already, else a copy."""
        return self if self.array.flags.c_contiguous else self.clone()

    def is_contiguous(self):
        return self.array.flags.c_contiguous

    T = property(
        lambda self: self.permute(tuple(reversed(range(self.array.ndim)))), doc="Dimensions reversed (a view)."
    )
    mT = property(lambda self: self.transpose(-2, -1), doc="The last two dimensions swapped (a view).")


def _infer(array, shape, name):
    """Replace one -1 in `shape` by the size that fits."""
    if -1 not in shape:
        return shape
    known = math.prod(s for s in shape if s != -1)
    if shape.count(-1) > 1 or known == 0 or array.size % known:
        raise OpError(f"{name}: {tuple(array.shape)}: {array.size} elements do not fit shape {shape}")
    return tuple(array.size // known if s == -1 else s for s in shape)


def pad_constant(x, pad, value=0.0):
    """Pad the last dimensions: pad = (before last, after last, before second last, ...); negative widths crop."""
    if len(pad) % 2 or len(pad) // 2 > x.array.ndim:
        raise OpError(
            f"pad: {tuple(x.array.shape)}: pad {tuple(pad)} must hold two widths for each of the last dimensions"
        )
    widths = [(0, 0)] * (x.array.ndim - len(pad) // 2)
    widths += [(pad[2 * i], pad[2 * i + 1]) for i in reversed(range(len(pad) // 2))]
    if any(b + s + a < 0 for (b, a), s in zip(widths, x.array.shape, strict=True)):
        raise OpError(f"pad: {tuple(x.array.shape)}: pad {tuple(pad)} crops more than there is")
    crop = tuple(slice(max(-b, 0), s + min(a, 0)) for (b, a), s in zip(widths, x.array.shape, strict=True))
    if any(b < 0 or a < 0 for b, a in widths):
        x = x[crop]
    return apply(Pad, x, widths=tuple((max(b, 0), max(a, 0)) for b, a in widths), value=value or 0)
