"""Functions of tensors. Most are methods called by another name: tg.exp(x) is x.exp()."""
import numpy as np

from .creation import as_tensor
from .engine import TensorBase, wrap
from .errors import OpError, OpTypeError
from .ops.common import cast, dim_index, operands
from .ops.linalg import einsum as einsum
from .ops.linalg import tensordot as tensordot
from .ops.movement import concatenate
from .tensor import Tensor

(abs, add, sub, mul, div, neg, pow, reciprocal, square, maximum, minimum, lerp, clamp, clip, remainder, floor_divide,
 addcmul, addcdiv) = (
    Tensor.abs, Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.neg, Tensor.pow, Tensor.reciprocal,
    Tensor.square, Tensor.maximum, Tensor.minimum, Tensor.lerp, Tensor.clamp, Tensor.clip, Tensor.remainder,
    Tensor.floor_divide, Tensor.addcmul, Tensor.addcdiv)
(exp, exp2, expm1, log, log2, log10, log1p, sqrt, rsqrt, sigmoid, erf, sin, cos, tan, sinh, cosh, tanh, floor, ceil,
 trunc, round, sign, logaddexp, relu) = (
    Tensor.exp, Tensor.exp2, Tensor.expm1, Tensor.log, Tensor.log2, Tensor.log10, Tensor.log1p, Tensor.sqrt,
    Tensor.rsqrt, Tensor.sigmoid, Tensor.erf, Tensor.sin, Tensor.cos, Tensor.tan, Tensor.sinh, Tensor.cosh, Tensor.tanh,
    Tensor.floor, Tensor.ceil, Tensor.trunc, Tensor.round, Tensor.sign, Tensor.logaddexp, Tensor.relu)
(eq, ne, lt, le, gt, ge, logical_and, logical_or, logical_xor, logical_not, isnan, isinf, isfinite, isclose, allclose,
 equal) = (
    Tensor.eq, Tensor.ne, Tensor.lt, Tensor.le, Tensor.gt, Tensor.ge, Tensor.logical_and, Tensor.logical_or,
    Tensor.logical_xor, Tensor.logical_not, Tensor.isnan, Tensor.isinf, Tensor.isfinite, Tensor.isclose,
    Tensor.allclose, Tensor.equal)
(sum, mean, var, std, prod, amax, amin, max, min, argmax, argmin, all, any, count_nonzero, logsumexp, norm, cumsum,
 cumprod, softmax, log_softmax) = (
    Tensor.sum, Tensor.mean, Tensor.var, Tensor.std, Tensor.prod, Tensor.amax, Tensor.amin, Tensor.max, Tensor.min,
    Tensor.argmax, Tensor.argmin, Tensor.all, Tensor.any, Tensor.count_nonzero, Tensor.logsumexp, Tensor.norm,
    Tensor.cumsum, Tensor.cumprod, Tensor.softmax, Tensor.log_softmax)
(reshape, flatten, ravel, unflatten, permute, transpose, swapaxes, swapdims, t, movedim, moveaxis, squeeze, unsqueeze,
 broadcast_to, flip, narrow, select, split, chunk, unbind, roll, tile, repeat_interleave, clone, detach) = (
    Tensor.reshape, Tensor.flatten, Tensor.ravel, Tensor.unflatten, Tensor.permute, Tensor.transpose, Tensor.swapaxes,
    Tensor.swapdims, Tensor.t, Tensor.movedim, Tensor.moveaxis, Tensor.squeeze, Tensor.unsqueeze, Tensor.broadcast_to,
    Tensor.flip, Tensor.narrow, Tensor.select, Tensor.split, Tensor.chunk, Tensor.unbind, Tensor.roll, Tensor.tile,
    Tensor.repeat_interleave, Tensor.clone, Tensor.detach)
(gather, scatter, scatter_add, index_select, index_add, index_put, take_along_dim, masked_fill, masked_select, nonzero,
 argsort, sort, topk, tril, triu) = (
    Tensor.gather, Tensor.scatter, Tensor.scatter_add, Tensor.index_select, Tensor.index_add, Tensor.index_put,
    Tensor.take_along_dim, Tensor.masked_fill, Tensor.masked_select, Tensor.nonzero, Tensor.argsort, Tensor.sort,
    Tensor.topk, Tensor.tril, Tensor.triu)
(matmul, mm, bmm, mv, dot, addmm, addmv, baddbmm, outer, kron, diagonal, diag, trace, numel) = (
    Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.dot, Tensor.addmm, Tensor.addmv, Tensor.baddbmm,
    Tensor.outer, Tensor.kron, Tensor.diagonal, Tensor.diag, Tensor.trace, Tensor.numel)


def cat(tensors, dim=0):
    """Join tensors along an existing dimension; the other sizes must be equal."""
    return concatenate(tensors, dim)


def stack(tensors, dim=0):
    """Join tensors of equal shape along a new dimension."""
    tensors = list(tensors)
    if not tensors:
        raise OpError("stack: expected at least one tensor")
    shapes = {x.shape for x in tensors}
    if len(shapes) > 1:
        raise OpError(f"stack: all shapes must be equal, got {sorted(shapes)}")
    dim = dim_index(dim, tensors[0].ndim + 1)
    return concatenate([x.unsqueeze(dim) for x in tensors], dim)


def hstack(tensors):
    """Join along dimension 1 (0 for vectors and numbers)."""
    tensors = [x.reshape(1) if x.ndim == 0 else x for x in tensors]
    return concatenate(tensors, 0 if tensors and tensors[0].ndim == 1 else 1)


def vstack(tensors):
    """Join along dimension 0, vectors as rows."""
    return concatenate([x.reshape(1, -1) if x.ndim < 2 else x for x in tensors], 0)


def where(condition, input=None, other=None):
    """input where condition (bool) holds, else other, broadcast; where(condition) gives the indices of True."""
    if input is None and other is None:
        return tuple(condition.nonzero().unbind(1))
    if not isinstance(input, TensorBase) and not isinstance(other, TensorBase):
        from .dtypes import result_dtype, scalar_dtype
        dtype = result_dtype([(scalar_dtype(input), 0), (scalar_dtype(other), 0)])
        input, other = (as_tensor(np.asarray(v, dtype), device=condition.device) for v in (input, other))
    else:
        input, other = operands(input, other)
    if condition.dtype != bool:
        if condition.dtype != np.uint8:
            raise OpTypeError(f"where: the condition must be bool, got {condition.dtype}")
        condition = condition.bool()
    return condition._select(input, other)


def meshgrid(*tensors, indexing="ij"):
    """Coordinates of a grid: each vector spread over the dimensions of the others. indexing "ij" or "xy"."""
    if len(tensors) == 1 and isinstance(tensors[0], tuple | list):
        tensors = tuple(tensors[0])
    if indexing not in ("ij", "xy"):
        raise OpError(f"meshgrid: indexing must be 'ij' or 'xy', got {indexing!r}")
    if not tensors or any(x.ndim > 1 for x in tensors):
        raise OpError("meshgrid: expected vectors or numbers")
    if len({x.dtype for x in tensors}) > 1:
        raise OpTypeError("meshgrid: all tensors must have one dtype")
    order = list(range(len(tensors)))
    if indexing == "xy" and len(tensors) > 1:
        order[0], order[1] = 1, 0
    shape = [tensors[i].numel() for i in order]
    return tuple(x.reshape([n if order[d] == i else 1 for d, n in enumerate(shape)]).expand(shape)
                 for i, x in enumerate(tensors))


def broadcast_tensors(*tensors):
    """All tensors expanded to their common shape."""
    shape = np.broadcast_shapes(*(x.shape for x in tensors))
    return tuple(x.expand(shape) for x in tensors)


def is_tensor(value):
    return isinstance(value, TensorBase)


def result_type(a, b):
    """The dtype that an operation on a and b gives."""
    return operands(a, b)[0].dtype


def one_hot(tensor, num_classes=-1):
    """See nn.functional.one_hot."""
    from .nn.functional import one_hot as of_functional
    return of_functional(tensor, num_classes)


def to_dlpack(x):
    """A DLPack capsule that shares the tensor's memory."""
    return x.__dlpack__()


def scalar_tensor(value, *, dtype=None, device=None):
    return as_tensor(np.asarray(value), dtype=dtype, device=device)


__all__ = [name for name, value in list(globals().items()) if callable(value) and not name.startswith("_") and name not in
           ("Tensor", "TensorBase", "OpError", "OpTypeError", "as_tensor", "cast", "dim_index", "operands", "concatenate",
            "wrap")]
