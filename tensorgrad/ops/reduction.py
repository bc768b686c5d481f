"""Reductions and scans: sum, mean, var, max, norm, cumsum ... over one, several or all dimensions."""

import math
from functools import wraps

import numpy as np

from .. import dtypes
from ..engine import Op, apply, wrap
from ..errors import OpError, OpIndexError, OpTypeError
from ..kernels.half import is_half
from .common import cast, dim_index, dim_tuple, is_tensor, scalar, to_float, to_single
from .results import MinMax, result_pair


def accumulator(dtype):
    """The dtype in which to add and multiply many numbers of `dtype`: float16 would stop growing at 2048 ones."""
    return np.dtype("float32") if is_half(dtype) else dtype


class Sum(Op):
    """The sum over `dims`, divided by `divisor` where given, before it is rounded to 16 bits (which it may exceed)."""

    def forward(ctx, x, dims, keepdim, divisor=None):
        ctx.shape, ctx.dims, ctx.divisor = x.shape, dims, divisor
        total = x.sum(axis=dims, keepdims=keepdim, dtype=accumulator(x.dtype))
        return (total if divisor is None else total / divisor).astype(x.dtype, copy=False)

    def backward(ctx, g):
        g = g if ctx.divisor is None else g / ctx.divisor
        return _restore(g, ctx.shape, ctx.dims).broadcast_to(ctx.shape)


def _restore(g, shape, dims):
    """Give `g` its reduced dimensions back, with size 1."""
    return g.reshape(tuple(1 if i in dims else s for i, s in enumerate(shape)))


class Extreme(Op):
    """The largest or smallest value; equal ones share the gradient evenly."""

    function = None

    def forward(ctx, x, dims, keepdim):
        if any(x.shape[d] == 0 for d in dims):
            raise ValueError("the reduced dimension has size 0, which has no largest or smallest value")
        y = getattr(x, ctx.function)(axis=dims, keepdims=keepdim)
        ctx.dims = dims
        ctx.save(x, y)
        return y

    def backward(ctx, g):
        x, y = ctx.saved
        shape = x.array.shape
        top = _restore(y.detach(), shape, ctx.dims).array
        hit = (x.array == top) | ((x.array != x.array) & (top != top))
        share = hit / hit.sum(axis=ctx.dims, keepdims=True)
        return _restore(g, shape, ctx.dims) * wrap(share.astype(g.array.dtype), ctx.device)


class Amax(Extreme):
    function = "max"


class Amin(Extreme):
    function = "min"


class Prod(Op):
    """The product along one dimension; right also where elements are zero."""

    def forward(ctx, x, dim, keepdim):
        ctx.dim, ctx.keepdim = dim, keepdim
        ctx.save(x)
        return x.prod(axis=dim, keepdims=keepdim, dtype=accumulator(x.dtype)).astype(x.dtype, copy=False)

    def backward(ctx, g):
        (x,) = ctx.saved
        if x.array.ndim == 0:
            return g
        g = g if ctx.keepdim else g.unsqueeze(ctx.dim)
        # product of all the others = product of those before times product of those after, no division by zero
        n = x.array.shape[ctx.dim]
        if n == 0:
            return g * x
        one = wrap(ctx.xp.ones_like(x.array[(slice(None),) * ctx.dim + (slice(0, 1),)]), ctx.device)
        before = one._cat([x.narrow(ctx.dim, 0, n - 1)], ctx.dim).cumprod(ctx.dim)
        after = one._cat([x.flip(ctx.dim).narrow(ctx.dim, 0, n - 1)], ctx.dim).cumprod(ctx.dim).flip(ctx.dim)
        return g * before * after


class Cumsum(Op):
    def forward(ctx, x, dim):
        ctx.dim = dim
        return x.cumsum(axis=dim, dtype=accumulator(x.dtype)).astype(x.dtype, copy=False) if x.ndim else x.copy()

    def backward(ctx, g):
        return g.flip(ctx.dim).cumsum(ctx.dim).flip(ctx.dim) if g.array.ndim else g


class Cumprod(Op):
    def forward(ctx, x, dim):
        ctx.dim = dim
        y = x.cumprod(axis=dim, dtype=accumulator(x.dtype)).astype(x.dtype, copy=False) if x.ndim else x.copy()
        ctx.save(x, y)
        return y

    def backward(ctx, g):
        x, y = ctx.saved
        if g.array.ndim == 0:
            return g
        if not (x.array == 0).any():
            return (g * y).flip(ctx.dim).cumsum(ctx.dim).flip(ctx.dim) / x
        # with zeros: d y_k / d x_i = product of x_0 ... x_k without x_i, as a triangular table
        x, g = x.movedim(ctx.dim, -1), g.movedim(ctx.dim, -1)
        n = x.array.shape[-1]
        eye = scalar(np.eye(n, dtype=bool), x)
        table = x.unsqueeze(-2).expand(*x.array.shape[:-1], n, n).masked_fill(eye, 1.0).cumprod(-1).triu()
        return (table * g.unsqueeze(-2)).sum(-1).movedim(-1, ctx.dim)


def moments(x, dim, correction):
    """(mean with kept dims, number of elements, dims) for var and std."""
    dims = dim_tuple(dim, x.array.ndim)
    n = math.prod(x.array.shape[d] for d in dims)
    return dims, n, n - correction


def _power_of_size(x, p):
    """|x|^p, whose gradient at 0 counts as 0 also for p below 1."""
    size = x.abs()
    if not 0 < p < 1:
        return size**p
    zero = size == 0
    return (size.masked_fill(zero, 1.0) ** p).masked_fill(zero, 0.0)


def in_single(method):
    """A method that computes 16 bits in 32: squares and their sums would overflow."""

    @wraps(method)
    def run(self, *args, **options):
        dtype = self.array.dtype
        if not is_half(dtype) or options.get("dtype") is not None:
            return method(self, *args, **options)
        return cast(method(cast(self, dtypes.float32), *args, **options), dtype)

    return run


class ReductionMethods:
    """PyTorch's reducing methods. `dim` is None (all), a dimension or a tuple; negative ones count from the back."""

    def sum(self, dim=None, keepdim=False, *, dtype=None):
        """Sum over `dim`; integers and bools sum as int64."""
        x = self
        if dtype is not None:
            x = cast(x, dtypes.as_dtype(dtype))
        elif x.array.dtype.kind in "iub":
            x = cast(x, dtypes.int64)
        return apply(Sum, x, dims=dim_tuple(dim, x.array.ndim), keepdim=keepdim)

    def mean(self, dim=None, keepdim=False, *, dtype=None):
        """Mean over `dim`; nan where there is nothing to average."""
        x = self if dtype is None else cast(self, dtypes.as_dtype(dtype))
        if not dtypes.is_floating(x.array.dtype):
            raise OpTypeError(f"mean: needs a floating dtype, got {x.array.dtype}; use .float().mean()")
        dims = dim_tuple(dim, x.array.ndim)
        n = math.prod(x.array.shape[d] for d in dims)
        return apply(Sum, x, dims=dims, keepdim=keepdim, divisor=n or math.nan)

    @in_single
    def var(self, dim=None, unbiased=None, keepdim=False, *, correction=None):
        """Variance over `dim`, divided by n - correction (1 unless given: Bessel's)."""
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        if correction is None:
            correction = 1 if unbiased is None else int(unbiased)
        if not dtypes.is_floating(self.array.dtype):
            raise OpTypeError(f"var: needs a floating dtype, got {self.array.dtype}")
        dims, n, divisor = moments(self, dim, correction)
        centred = self - self.mean(dims, keepdim=True) if dims else self - self
        total = (centred * centred).sum(dims, keepdim=keepdim) if dims else centred * centred
        return (
            total * (1 / divisor) if divisor > 0 else total * (math.nan if n <= correction == n or not n else math.inf)
        )

    @in_single
    def std(self, dim=None, unbiased=None, keepdim=False, *, correction=None):
        """Square root of the variance. The gradient at 0 is 0."""
        variance = self.var(dim, unbiased, keepdim, correction=correction)
        zero = variance == 0
        return variance.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)

    def prod(self, dim=None, keepdim=False, *, dtype=None):
        """Product over one dimension or all; integers multiply as int64."""
        (x,) = to_single(self)
        if dtype is not None:
            x = cast(x, dtypes.as_dtype(dtype))
        elif x.array.dtype.kind in "iub":
            x = cast(x, dtypes.int64)
        if dim is None:
            return apply(Prod, x.reshape(-1), dim=0, keepdim=False)
        dim = dim_index(dim, x.array.ndim)
        return apply(Prod, x, dim=dim, keepdim=keepdim) if x.array.ndim else x.clone()

    def amax(self, dim=(), keepdim=False):
        """Largest values over `dim`; ties share the gradient."""
        return apply(Amax, self, dims=dim_tuple(dim, self.array.ndim), keepdim=keepdim)

    def amin(self, dim=(), keepdim=False):
        """Smallest values over `dim`; ties share the gradient."""
        return apply(Amin, self, dims=dim_tuple(dim, self.array.ndim), keepdim=keepdim)

    def max(self, dim=None, keepdim=False):
        """max(): the largest value. max(dim): (values, indices), gradient to the one chosen. max(other): maximum."""
        return self._extreme(dim, keepdim, Amax, "argmax", "maximum")

    def min(self, dim=None, keepdim=False):
        """min(): the smallest value. min(dim): (values, indices), gradient to the one chosen. min(other): minimum."""
        return self._extreme(dim, keepdim, Amin, "argmin", "minimum")

    def _extreme(self, dim, keepdim, op, arg, pairwise):
        if is_tensor(dim):
            return getattr(self, pairwise)(dim)
        if dim is None:
            return apply(op, self, dims=tuple(range(self.array.ndim)), keepdim=False)
        index = getattr(self, arg)(dim, True)
        values = self.gather(dim, index) if self.array.ndim else self.clone()
        if not keepdim and self.array.ndim:
            values, index = values.squeeze(dim), index.squeeze(dim)
        return result_pair(MinMax, values, index)

    def argmax(self, dim=None, keepdim=False):
        """Index (int64) of the largest value over `dim`, of the flattened tensor where None; the first of equals."""
        return self._arg("argmax", dim, keepdim)

    def argmin(self, dim=None, keepdim=False):
        """Index (int64) of the smallest value."""
        return self._arg("argmin", dim, keepdim)

    def _arg(self, function, dim, keepdim):
        x = self.array
        if dim is not None:
            dim = dim_index(dim, x.ndim)
        if (x.size if dim is None or not x.ndim else x.shape[dim]) == 0:
            raise OpIndexError(f"{function}: {tuple(x.shape)}: the reduced dimension has size 0")
        if dim is None or not x.ndim:
            index = getattr(self.device.xp, function)(x).reshape((1,) * x.ndim if keepdim else ())
        else:
            index = getattr(self.device.xp, function)(x, axis=dim, keepdims=keepdim)
        return wrap(self.device.xp.asarray(index, dtype=np.int64), self.device)

    def all(self, dim=None, keepdim=False):
        """True where all elements over `dim` are nonzero."""
        return wrap((self.array != 0).all(axis=dim_tuple(dim, self.array.ndim), keepdims=keepdim), self.device)

    def any(self, dim=None, keepdim=False):
        """True where any element over `dim` is nonzero."""
        return wrap((self.array != 0).any(axis=dim_tuple(dim, self.array.ndim), keepdims=keepdim), self.device)

    def count_nonzero(self, dim=None):
        return (self != 0).sum(dim)

    def logsumexp(self, dim, keepdim=False):
        """log(sum(exp(self))) over `dim` without overflow."""
        x = to_float(self)
        dims = dim_tuple(dim, x.array.ndim)
        if any(x.array.shape[d] == 0 for d in dims):
            return x.exp().sum(dims, keepdim).log()
        top = x.detach().amax(dims, keepdim=True) if dims else x.detach()
        top = top.masked_fill(top.isinf(), 0.0)
        total = (x - top).exp().sum(dims, keepdim=True) if dims else (x - top).exp()
        result = total.log() + top
        return result if keepdim or not dims else result.squeeze(dims)

    @in_single
    def norm(self, p="fro", dim=None, keepdim=False, *, dtype=None):
        """Vector norm over `dim`: (sum |x|^p)^(1/p); p = 2 ("fro") unless given, inf, -inf, 0 or any number.
        The gradient at 0 is 0."""
        x = self if dtype is None else cast(self, dtypes.as_dtype(dtype))
        if not dtypes.is_floating(x.array.dtype):
            raise OpTypeError(f"norm: needs a floating dtype, got {x.array.dtype}")
        p = 2 if p in ("fro", None) else p
        if isinstance(p, str):
            raise OpError(f"norm: p must be a number or 'fro', got {p!r}")
        dims = dim_tuple(dim, x.array.ndim)
        if p == math.inf or p == -math.inf:
            return x.abs().amax(dims, keepdim) if p > 0 else x.abs().amin(dims, keepdim)
        if p == 0:
            return x.sign().square().sum(dims, keepdim)
        if p == 1:
            return x.abs().sum(dims, keepdim)
        total = (x * x if p == 2 else _power_of_size(x, p)).sum(dims, keepdim)
        zero = total == 0
        if not zero.array.any():
            return total ** (1 / p)
        return (total.masked_fill(zero, 1.0) ** (1 / p)).masked_fill(zero, 0.0)

    def cumsum(self, dim, *, dtype=None):
        """Running sum along `dim`."""
        x = self if dtype is None else cast(self, dtypes.as_dtype(dtype))
        if dtype is None and x.array.dtype.kind in "iub":
            x = cast(x, dtypes.int64)
        return apply(Cumsum, x, dim=dim_index(dim, x.array.ndim))

    def cumprod(self, dim, *, dtype=None):
        """Running product along `dim`."""
        x = self if dtype is None else cast(self, dtypes.as_dtype(dtype))
        if dtype is None and x.array.dtype.kind in "iub":
            x = cast(x, dtypes.int64)
        return apply(Cumprod, x, dim=dim_index(dim, x.array.ndim))
