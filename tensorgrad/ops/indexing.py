"""Reading and writing by index: getitem, setitem, gather, scatter, index_add, sort, topk, masks."""

import numpy as np

from ..engine import Op, apply, wrap
from ..errors import OpError, OpIndexError, OpTypeError
from .common import cast, dim_index, is_tensor, scalar
from .results import Sorted

# ---- basic indices (integers, slices, None, Ellipsis) give views ----------------------------------------------------


class View(Op):
    """x[index] for a basic index."""

    name = "getitem"
    view = True

    def forward(ctx, x, index):
        ctx.shape, ctx.index = x.shape, index
        return x[(*index, Ellipsis)]  # with the Ellipsis a single element is a view too, not a scalar

    def backward(ctx, g):
        return apply(Put, g, shape=ctx.shape, index=ctx.index, distinct=True)


class Take(Op):
    """x[index] for an index with arrays; `distinct` says that no element is taken twice."""

    name = "getitem"

    def forward(ctx, x, index, distinct):
        ctx.shape, ctx.distinct = x.shape, distinct
        ctx.index = _own(index) if ctx.recording else None
        ctx.device.check_index(x.shape, index)
        return x[index]

    def backward(ctx, g):
        return apply(Put, g, shape=ctx.shape, index=ctx.index, distinct=ctx.distinct)


class Put(Op):
    """Zeros of `shape` with the values added at `index`: the transpose of getitem. Repeated indices add up."""

    name = "getitem_backward"

    def forward(ctx, values, shape, index, distinct):
        ctx.index, ctx.distinct = _own(index) if ctx.recording else None, distinct
        out = ctx.xp.zeros(shape, values.dtype)
        if distinct:
            out[index] = values
        else:
            positions = ctx.xp.arange(out.size).reshape(shape)[index]
            ctx.device.scatter_add(out.reshape(-1), positions.reshape(-1), values.reshape(-1))
        return out

    def backward(ctx, g):
        return apply(Take, g, index=ctx.index, distinct=ctx.distinct)


class SetItem(Op):
    """x with x[index] = values: in place (the returned array is x's) or, with `copy`, in a new array."""

    def forward(ctx, x, values, index, copy):
        ctx.index = _own(index) if ctx.recording else None
        out = x.copy() if copy else x
        out[index] = values
        return out

    def backward(ctx, g):
        need_x, need_values = ctx.needs
        zero = scalar(0, g, g.array.dtype)
        return (
            apply(SetItem, g, zero, index=ctx.index, copy=True) if need_x else None,
            apply(Take, g, index=ctx.index, distinct=True) if need_values else None,
        )


def split_index(index, ndim, device):
    """An index, PyTorch's way, as (basic, advanced): first integers, slices, None and Ellipsis act, then, on the
    result, arrays of integers or booleans. (NumPy counts integers among the arrays, which moves dimensions.)"""
    items = list(index) if isinstance(index, tuple) else [index]
    for i, item in enumerate(items):
        if is_tensor(item):
            items[i] = item = item.array
        elif isinstance(item, list | range):
            items[i] = item = device.asarray(np.asarray(item, dtype=np.int64 if not len(item) else None))
        if isinstance(item, np.ndarray | np.generic) or hasattr(item, "__cuda_array_interface__"):
            if item.dtype.kind not in "iub":
                raise OpIndexError(f"getitem: an index must hold integers or booleans, not {item.dtype}")
            if item.ndim == 0 and item.dtype.kind in "iu":
                items[i] = int(item)
            elif isinstance(item, np.ndarray) and device.type != "cpu":
                items[i] = device.asarray(item)
        elif isinstance(item, bool):
            items[i] = device.asarray(np.asarray(item))
        elif item is not None and item is not Ellipsis and not isinstance(item, int | slice):
            raise OpIndexError(f"getitem: cannot index with {type(item).__name__}")
    used = sum(0 if i is None or i is Ellipsis else i.ndim if _is_mask(i) else 1 for i in items)
    if used > ndim:
        raise OpIndexError(f"getitem: {used} indices for a tensor of {ndim} dimensions")
    if Ellipsis not in [i for i in items if not _is_array(i)]:
        items.append(Ellipsis)
    place = next(k for k, i in enumerate(items) if not _is_array(i) and i is Ellipsis)
    items[place : place + 1] = [slice(None)] * (ndim - used)
    if not any(_is_array(i) for i in items):
        return tuple(items), None
    basic, advanced = [], []
    for item in items:
        if _is_array(item):
            basic += [slice(None)] * (item.ndim if _is_mask(item) else 1)
            advanced.append(item)
        else:
            basic.append(item)
            if not isinstance(item, int):
                advanced.append(slice(None))
    trivial = all(isinstance(b, slice) and b == slice(None) for b in basic)
    return None if trivial else tuple(basic), tuple(advanced)


def _is_array(item):
    return hasattr(item, "dtype")


def _own(index):
    """An index that nobody else can change before backward."""
    return tuple(i.copy() if _is_array(i) else i for i in index)


def _is_mask(item):
    return _is_array(item) and item.dtype == bool


def _distinct(advanced):
    """True where an advanced index surely takes no element twice: masks only."""
    return all(not _is_array(i) or i.dtype == bool for i in advanced)


# ---- gather and scatter along a dimension ---------------------------------------------------------------------------


def _grid(xp, index, dim):
    """An advanced index that takes element index[i, j, ...] of `dim` and i, j, ... of the others."""
    grid = [xp.arange(n).reshape((1,) * d + (n,) + (1,) * (index.ndim - d - 1)) for d, n in enumerate(index.shape)]
    grid[dim] = index
    return tuple(grid)


def _check_range(name, index, n, dim):
    if index.array.dtype.kind not in "iu":
        raise OpTypeError(f"{name}: the index must be an integer tensor, got {index.array.dtype}")
    index.device.check_range(f"{name}: index", index.array, n, f"dimension {dim} of size {n}")


def _check_gather(name, x, index, dim):
    tensor, index = index, index.array
    if index.ndim != x.ndim and x.ndim and index.ndim:
        raise OpError(f"{name}: the index has {index.ndim} dimensions, the tensor {x.ndim}; they must be equal")
    if any(i > s for d, (i, s) in enumerate(zip(index.shape, x.shape, strict=False)) if d != dim and index.size):
        raise OpError(f"{name}: index shape {index.shape} is larger than {x.shape} outside dimension {dim}")
    _check_range(name, tensor, x.shape[dim] if x.ndim else 1, dim)


class Gather(Op):
    def forward(ctx, x, index, dim):
        ctx.dim, ctx.shape = dim, x.shape
        ctx.save(index)
        return x[_grid(ctx.xp, index, dim)]

    def backward(ctx, g):
        (index,) = ctx.saved
        zero = wrap(ctx.xp.zeros(ctx.shape, g.array.dtype), ctx.device)
        return apply(ScatterAdd, zero, index, g, dim=ctx.dim), None


class ScatterAdd(Op):
    def forward(ctx, x, index, source, dim):
        ctx.dim, ctx.source_shape = dim, source.shape
        ctx.save(index)
        out = ctx.xp.array(x, order="C", copy=True)
        if index.size:
            source = source[tuple(slice(n) for n in index.shape)]
            grid = ctx.xp.broadcast_arrays(*_grid(ctx.xp, index, dim))
            flat = ctx.xp.ravel_multi_index(tuple(grid), out.shape)
            ctx.device.scatter_add(out.reshape(-1), flat.reshape(-1), source.reshape(-1))
        return out

    def backward(ctx, g):
        (index,) = ctx.saved
        source = apply(Gather, g, index, dim=ctx.dim)
        return g, None, _fill_out(source, ctx.source_shape)


class Scatter(Op):
    def forward(ctx, x, index, source, dim):
        ctx.dim, ctx.source_shape = dim, source.shape
        ctx.save(index)
        out = x.copy()
        if index.size:
            out[_grid(ctx.xp, index, dim)] = source[tuple(slice(n) for n in index.shape)] if source.ndim else source
        return out

    def backward(ctx, g):
        (index,) = ctx.saved
        need_x, _, need_source = ctx.needs
        zero = scalar(0, g, g.array.dtype)
        return (
            apply(Scatter, g, index, zero, dim=ctx.dim) if need_x else None,
            None,
            _fill_out(apply(Gather, g, index, dim=ctx.dim), ctx.source_shape) if need_source else None,
        )


def _fill_out(g, shape):
    """Zeros where the source was larger than the index; a 0-d source was broadcast, the engine sums it."""
    if not shape or g.array.shape == shape:
        return g
    zero = wrap(g.device.xp.zeros(shape, g.array.dtype), g.device)
    return apply(SetItem, zero, g, index=tuple(slice(n) for n in g.array.shape), copy=True)


class IndexAdd(Op):
    """x with source[..., i, ...] added to x[..., index[i], ...]; repeated indices add up."""

    def forward(ctx, x, source, index, dim):
        ctx.dim = dim
        ctx.save(index)
        out = ctx.xp.array(ctx.xp.moveaxis(x, dim, 0), order="C", copy=True) if x.ndim else x.reshape(1).copy()
        if source.size:
            rows = ctx.xp.moveaxis(source, dim, 0).reshape(index.size, -1) if source.ndim else source.reshape(1, 1)
            width = rows.shape[1]
            flat = (index.reshape(-1, 1) * width + ctx.xp.arange(width)).reshape(-1)
            ctx.device.scatter_add(out.reshape(-1), flat, rows.reshape(-1))
        return ctx.xp.moveaxis(out, 0, dim) if x.ndim else out.reshape(())

    def backward(ctx, g):
        (index,) = ctx.saved
        return g, apply(IndexSelect, g, index, dim=ctx.dim) if g.array.ndim else g, None


class IndexSelect(Op):
    def forward(ctx, x, index, dim):
        ctx.dim, ctx.shape = dim, x.shape
        ctx.save(index)
        return ctx.xp.take(x, index, axis=dim)

    def backward(ctx, g):
        zero = wrap(ctx.xp.zeros(ctx.shape, g.array.dtype), ctx.device)
        (index,) = ctx.saved
        return apply(IndexAdd, zero, g, index, dim=ctx.dim), None


class IndexingMethods:
    """PyTorch's indexing methods."""

    def __getitem__(self, index):
        basic, advanced = split_index(index, self.array.ndim, self.device)
        x = self if basic is None else apply(View, self, index=basic)
        return x if advanced is None else apply(Take, x, index=advanced, distinct=_distinct(advanced))

    def __setitem__(self, index, value):
        basic, advanced = split_index(index, self.array.ndim, self.device)
        if not is_tensor(value):
            value = scalar(value, self, self.array.dtype)
        value = cast(value.to(self.device), self.array.dtype)
        if basic is not None and advanced is not None:
            part = apply(View, self, index=basic)  # writes through the view
            part[tuple(advanced)] = value
            return
        index = basic if advanced is None else advanced
        extra = value.array.ndim - self.array[index].ndim if value.array.ndim else 0
        if extra > 0 and all(n == 1 for n in value.array.shape[:extra]):
            value = value.reshape(value.array.shape[extra:])
        self._write(lambda x: apply(SetItem, self, value, index=index, copy=False), in_place=True)

    def index_put(self, indices, values, accumulate=False):
        """self with values written (or added, with `accumulate`) at the tuple of index tensors."""
        basic, advanced = split_index(tuple(indices), self.array.ndim, self.device)
        index = basic if advanced is None else advanced
        values = cast(values, self.array.dtype)
        if accumulate:
            target = self.array[index].shape
            return self + apply(Put, values.expand(target), shape=self.array.shape, index=index, distinct=False)
        return apply(SetItem, self, values, index=index, copy=True)

    def gather(self, dim, index):
        """out[i][j] = self[index[i][j]][j] for dim 0, and so on; index (int64) has as many dimensions as self."""
        dim = dim_index(dim, self.array.ndim)
        if not index.array.size:
            return self.reshape(-1)[:0].reshape(index.array.shape)
        _check_gather("gather", self.array, index, dim)
        if self.array.ndim != index.array.ndim:
            x = self.reshape(1) if not self.array.ndim else self
            i = index.reshape(1) if not index.array.ndim else index
            return x.gather(dim, i).reshape(index.array.shape)
        return apply(Gather, self, index, dim=dim) if self.array.ndim else self.clone()

    def scatter(self, dim, index, src=None, *, value=None, reduce=None):
        """self with self[index[i][j]][j] = src[i][j] for dim 0, and so on; src may be a number."""
        dim = dim_index(dim, self.array.ndim)
        src = value if src is None else src
        if reduce == "add":
            src = src if is_tensor(src) else scalar(src, self, self.array.dtype).expand(index.array.shape)
            return self.scatter_add(dim, index, src)
        if reduce is not None:
            raise OpError(f"scatter: reduce must be None or 'add', got {reduce!r}")
        _check_gather("scatter", self.array, index, dim)
        if not is_tensor(src):
            src = scalar(src, self, self.array.dtype)
        elif src.array.dtype != self.array.dtype:
            raise OpTypeError(f"scatter: dtypes differ: {self.array.dtype} and {src.array.dtype}")
        return self._along(Scatter, dim, index, src)

    def scatter_add(self, dim, index, src):
        """self with src[i][j] added to self[index[i][j]][j] for dim 0, and so on; repeated indices add up."""
        dim = dim_index(dim, self.array.ndim)
        _check_gather("scatter_add", self.array, index, dim)
        if src.array.dtype != self.array.dtype:
            raise OpTypeError(f"scatter_add: dtypes differ: {self.array.dtype} and {src.array.dtype}")
        return self._along(ScatterAdd, dim, index, src)

    def _along(self, op, dim, index, src):
        if (
            src.array.ndim
            and index.array.ndim
            and any(i > s for i, s in zip(index.array.shape, src.array.shape, strict=False))
        ):
            raise OpError(f"{op.name}: index shape {index.array.shape} is larger than the source's {src.array.shape}")
        if self.array.ndim and index.array.ndim:
            return apply(op, self, index, src if src.array.ndim or op is Scatter else src.reshape(1), dim=dim)
        shape = self.array.shape
        index = index.reshape(1) if not index.array.ndim else index
        src = src if not src.array.ndim and op is Scatter else src.reshape(index.array.shape)
        return apply(op, self.reshape(shape or 1), index, src, dim=dim).reshape(shape)

    def index_select(self, dim, index):
        """Rows (of `dim`) with the numbers in the 1-D tensor `index`."""
        dim = dim_index(dim, self.array.ndim)
        if index.array.ndim > 1:
            raise OpIndexError(f"index_select: the index must be 1-D, got shape {index.array.shape}")
        _check_range("index_select", index, self.array.shape[dim] if self.array.ndim else 1, dim)
        if not self.array.ndim:
            return self.reshape(1).index_select(0, index).reshape(())
        return apply(IndexSelect, self, index.reshape(-1), dim=dim)

    def index_add(self, dim, index, source, *, alpha=1):
        """self with alpha * source[i] added to row index[i] of `dim`; repeated indices add up."""
        dim = dim_index(dim, self.array.ndim)
        _check_range("index_add", index, self.array.shape[dim] if self.array.ndim else 1, dim)
        own, given = self.array.shape, source.array.shape
        if (
            index.array.ndim > 1
            or (own[:dim] + own[dim + 1 :] != given[:dim] + given[dim + 1 :] and self.array.ndim)
            or index.array.size != (given[dim] if given else 1)
        ):
            raise OpError(f"index_add: {own}, index {index.array.shape}, source {given} do not fit in dimension {dim}")
        if source.array.dtype != self.array.dtype:
            raise OpTypeError(f"index_add: dtypes differ: {self.array.dtype} and {source.array.dtype}")
        return apply(IndexAdd, self, source if alpha == 1 else source * alpha, index.reshape(-1), dim=dim)

    def take_along_dim(self, indices, dim=None):
        """gather whose other dimensions broadcast; over the flattened tensor where dim is None."""
        if indices.array.dtype.kind not in "iu":
            raise OpTypeError(f"take_along_dim: indices must be integers, got {indices.array.dtype}")
        if dim is None:
            return self.reshape(-1).take_along_dim(indices.reshape(-1), 0)
        dim = dim_index(dim, self.array.ndim)
        if self.array.ndim and (indices.array < 0).any():  # these count from the back
            indices = (indices < 0)._select(indices + self.array.shape[dim], indices)
        if self.array.ndim != indices.array.ndim:
            raise OpError(f"take_along_dim: {self.array.shape} and indices {indices.array.shape} differ in dimensions")
        shape = list(
            np.broadcast_shapes(*(s[:dim] + (1,) + s[dim + 1 :] for s in (self.array.shape, indices.array.shape)))
        )
        own, wanted = shape.copy(), shape.copy()
        own[dim], wanted[dim] = self.array.shape[dim], indices.array.shape[dim]
        return self.expand(own).gather(dim, indices.expand(wanted))

    def masked_select(self, mask):
        """The elements where the (broadcast) bool mask holds, as a 1-D tensor."""
        if mask.array.dtype != bool:
            raise OpTypeError(f"masked_select: the mask must be bool, got {mask.array.dtype}")
        shape = np.broadcast_shapes(self.array.shape, mask.array.shape)
        return self.expand(shape)[mask.expand(shape)] if shape else self.reshape(1)[mask.reshape(1)]

    def nonzero(self, *, as_tuple=False):
        """Indices (n, ndim) int64 of the nonzero elements; as_tuple: a vector per dimension, ready to index with."""
        index = wrap(self.device.xp.argwhere(self.array).astype(np.int64), self.device)
        return index.unbind(1) if as_tuple else index

    # ---- order
    def argsort(self, dim=-1, descending=False, stable=False):
        """Indices (int64) that sort along `dim`; equal elements keep their order."""
        dim = dim_index(dim, self.array.ndim)
        xp, x = self.device.xp, self.array
        if not x.ndim:
            return wrap(xp.zeros((), np.int64), self.device)
        if not descending:
            return wrap(xp.argsort(x, axis=dim, kind="stable"), self.device)
        backward = xp.argsort(xp.flip(x, dim), axis=dim, kind="stable")
        return wrap(xp.ascontiguousarray(xp.flip(x.shape[dim] - 1 - backward, dim)), self.device)

    def sort(self, dim=-1, descending=False, stable=False):
        """(values, indices) in order along `dim`."""
        index = self.argsort(dim, descending, stable)
        return Sorted(self.gather(dim, index), index)

    def topk(self, k, dim=-1, largest=True, sorted=True):
        """(values, indices) of the k largest (or smallest) along `dim`, in order."""
        dim = dim_index(dim, self.array.ndim)
        n = self.array.shape[dim] if self.array.ndim else 1
        if not 0 <= k <= n:
            raise OpError(f"topk: k = {k} is out of range for dimension {dim} of size {n}")
        index = self.argsort(dim, descending=largest)
        if self.array.ndim:
            index = index.narrow(dim, 0, k)
        return Sorted(self.gather(dim, index), index)

    # ---- triangles
    def tril(self, diagonal=0):
        """The lower triangle of each matrix, zeros above diagonal number `diagonal`."""
        return self._triangle("tril", diagonal)

    def triu(self, diagonal=0):
        """The upper triangle of each matrix, zeros below diagonal number `diagonal`."""
        return self._triangle("triu", diagonal)

    def _triangle(self, function, diagonal):
        if self.array.ndim < 2:
            raise OpError(f"{function}: needs at least 2 dimensions, got shape {self.array.shape}")
        keep = getattr(self.device.xp, function)(self.device.xp.ones(self.array.shape[-2:], bool), diagonal)
        return self.masked_fill(wrap(~keep, self.device), 0)
