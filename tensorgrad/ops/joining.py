"""Joining and cutting along a dimension: cat, split, chunk, unbind."""

from .. import dtypes
from ..device import address
from ..engine import Op, apply, modes, wrap
from ..errors import OpError, OpIndexError, OpTypeError
from .common import cast, dim_index, is_tensor


class Cat(Op):
    def forward(ctx, *arrays, dim):
        ctx.dim, ctx.sizes = dim, [a.shape[dim] for a in arrays]
        return ctx.xp.concatenate(arrays, axis=dim)

    def backward(ctx, *gradients):
        return tuple(gradients[0].split(ctx.sizes, ctx.dim))

    def explain(ctx, arrays, options):
        return f"all sizes must be equal except in dimension {options['dim']}"


class Split(Op):
    """Consecutive views along a dimension."""

    view = True

    def forward(ctx, x, lengths, dim):
        ctx.dim = dim
        out, start = [], 0
        for length in lengths:
            out.append(x[(slice(None),) * dim + (slice(start, start + length),)])
            start += length
        return tuple(out)

    def backward(ctx, *gradients):
        if not modes.grad and (whole := _side_by_side(ctx.xp, gradients, ctx.dim)) is not None:
            return wrap(whole, ctx.device)
        filled = [
            wrap(ctx.xp.zeros(shape, dtype), ctx.device) if g is None else g
            for g, (shape, dtype) in zip(gradients, ctx._outputs, strict=True)
        ]
        return filled[0]._cat(filled[1:], ctx.dim)


def _side_by_side(xp, gradients, dim):
    """The array of which the gradients are consecutive parts in memory, as attention's are, or None: no copy needed."""
    arrays = [None if g is None else g.array for g in gradients]
    first = arrays[0]
    if not all(a is not None and a.size and a.strides == first.strides for a in arrays):
        return None
    place = address(first)
    for a in arrays:
        if address(a) != place:
            return None
        place += a.shape[dim] * a.strides[dim]
    outer = [s for d, s in enumerate(first.strides) if d < dim]
    total = sum(a.shape[dim] for a in arrays)
    if outer and min(outer) < total * first.strides[dim]:
        return None  # parts of a larger row, between which something else may lie
    shape = (*first.shape[:dim], total, *first.shape[dim + 1 :])
    return xp.lib.stride_tricks.as_strided(first, shape, first.strides)


class JoiningMethods:
    """PyTorch's splitting methods; `cat` and its relatives are functions (functions.py) over `concatenate`."""

    def split(self, split_size, dim=0):
        """Views of `split_size` elements each (the last may be shorter), or of the sizes in a list."""
        dim = dim_index(dim, self.array.ndim)
        if not self.array.ndim:
            raise OpIndexError("split: a 0-d tensor cannot be split")
        n = self.array.shape[dim]
        if isinstance(split_size, int):
            if split_size < 0 or (split_size == 0 and n):
                raise OpError(f"split: split_size must be positive, got {split_size}")
            lengths = [min(split_size, n - i) for i in range(0, n, split_size)] if n else [0]
        else:
            lengths = [int(s) for s in split_size]
            if sum(lengths) != n or min(lengths, default=0) < 0:
                raise OpError(f"split: sizes {lengths} do not add up to {n}, the size of dimension {dim}")
        return apply(Split, self, lengths=lengths, dim=dim)

    def chunk(self, chunks, dim=0):
        """At most `chunks` views of equal size (the last may be shorter)."""
        if chunks <= 0:
            raise OpError(f"chunk: chunks must be positive, got {chunks}")
        dim = dim_index(dim, self.array.ndim)
        if not self.array.ndim:
            raise OpIndexError("chunk: a 0-d tensor cannot be chunked")
        n = self.array.shape[dim]
        return self.split(-(-n // chunks), dim) if n else self.split([0] * chunks, dim)

    def unbind(self, dim=0):
        """The slices along `dim` as a tuple of views."""
        dim = dim_index(dim, self.array.ndim)
        if not self.array.ndim:
            raise OpIndexError("unbind: a 0-d tensor has no dimension to unbind")
        if self.array.shape[dim] == 0:
            return ()
        return tuple(part.squeeze(dim) for part in self.split(1, dim))

    def _cat(self, others, dim=0):
        return concatenate([self, *others], dim)


def concatenate(tensors, dim=0):
    """Join along an existing dimension; see tg.cat."""
    tensors = list(tensors)
    if not tensors:
        raise OpError("cat: expected at least one tensor")
    if not all(is_tensor(t) for t in tensors):
        raise OpTypeError("cat: expected a list of Tensors")
    tensors = [t for t in tensors if t.array.shape != (0,)] or tensors[
        :1
    ]  # PyTorch lets empty 1-D tensors join anything
    if any(t.array.ndim == 0 for t in tensors):
        raise OpError("cat: 0-d tensors cannot be joined; use stack()")
    dtype = dtypes.result_dtype([(t.array.dtype, 2) for t in tensors])
    return apply(Cat, *(cast(t, dtype) for t in tensors), dim=dim_index(dim, tensors[0].array.ndim))
