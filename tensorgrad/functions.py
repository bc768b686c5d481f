"""Functions of tensors. Most are methods called by another name: tg.exp(x) is x.exp()."""

import builtins

import numpy as np

from .creation import as_tensor
from .engine import TensorBase
from .errors import OpError, OpTypeError
from .ops.common import dim_index, operands
from .ops.joining import concatenate
from .ops.linalg import einsum as einsum
from .ops.linalg import tensordot as tensordot
from .tensor import Tensor

abs = Tensor.abs
add = Tensor.add
sub = Tensor.sub
mul = Tensor.mul
div = Tensor.div
neg = Tensor.neg
pow = Tensor.pow
reciprocal = Tensor.reciprocal
square = Tensor.square
maximum = Tensor.maximum
minimum = Tensor.minimum
lerp = Tensor.lerp
clamp = Tensor.clamp
clip = Tensor.clip
remainder = Tensor.remainder
floor_divide = Tensor.floor_divide
addcmul = Tensor.addcmul
addcdiv = Tensor.addcdiv
exp = Tensor.exp
exp2 = Tensor.exp2
expm1 = Tensor.expm1
log = Tensor.log
log2 = Tensor.log2
log10 = Tensor.log10
log1p = Tensor.log1p
sqrt = Tensor.sqrt
rsqrt = Tensor.rsqrt
sigmoid = Tensor.sigmoid
erf = Tensor.erf
sin = Tensor.sin
cos = Tensor.cos
tan = Tensor.tan
sinh = Tensor.sinh
cosh = Tensor.cosh
tanh = Tensor.tanh
floor = Tensor.floor
ceil = Tensor.ceil
trunc = Tensor.trunc
round = Tensor.round
sign = Tensor.sign
logaddexp = Tensor.logaddexp
relu = Tensor.relu
positive = Tensor.positive
eq = Tensor.eq
ne = Tensor.ne
lt = Tensor.lt
le = Tensor.le
gt = Tensor.gt
ge = Tensor.ge
logical_and = Tensor.logical_and
logical_or = Tensor.logical_or
logical_xor = Tensor.logical_xor
logical_not = Tensor.logical_not
isnan = Tensor.isnan
isinf = Tensor.isinf
isfinite = Tensor.isfinite
isclose = Tensor.isclose
allclose = Tensor.allclose
equal = Tensor.equal
sum = Tensor.sum
mean = Tensor.mean
var = Tensor.var
std = Tensor.std
prod = Tensor.prod
amax = Tensor.amax
amin = Tensor.amin
max = Tensor.max
min = Tensor.min
argmax = Tensor.argmax
argmin = Tensor.argmin
all = Tensor.all
any = Tensor.any
count_nonzero = Tensor.count_nonzero
logsumexp = Tensor.logsumexp
norm = Tensor.norm
cumsum = Tensor.cumsum
cumprod = Tensor.cumprod
softmax = Tensor.softmax
log_softmax = Tensor.log_softmax
reshape = Tensor.reshape
flatten = Tensor.flatten
ravel = Tensor.ravel
unflatten = Tensor.unflatten
permute = Tensor.permute
transpose = Tensor.transpose
swapaxes = Tensor.swapaxes
swapdims = Tensor.swapdims
t = Tensor.t
movedim = Tensor.movedim
moveaxis = Tensor.moveaxis
squeeze = Tensor.squeeze
unsqueeze = Tensor.unsqueeze
broadcast_to = Tensor.broadcast_to
flip = Tensor.flip
narrow = Tensor.narrow
select = Tensor.select
split = Tensor.split
chunk = Tensor.chunk
unbind = Tensor.unbind
roll = Tensor.roll
tile = Tensor.tile
repeat_interleave = Tensor.repeat_interleave
clone = Tensor.clone
detach = Tensor.detach
gather = Tensor.gather
scatter = Tensor.scatter
scatter_add = Tensor.scatter_add
index_select = Tensor.index_select
index_add = Tensor.index_add
index_put = Tensor.index_put
take_along_dim = Tensor.take_along_dim
masked_fill = Tensor.masked_fill
masked_select = Tensor.masked_select
nonzero = Tensor.nonzero
argsort = Tensor.argsort
sort = Tensor.sort
topk = Tensor.topk
tril = Tensor.tril
triu = Tensor.triu
bernoulli = Tensor.bernoulli
multinomial = Tensor.multinomial
matmul = Tensor.matmul
mm = Tensor.mm
bmm = Tensor.bmm
mv = Tensor.mv
dot = Tensor.dot
addmm = Tensor.addmm
addmv = Tensor.addmv
baddbmm = Tensor.baddbmm
outer = Tensor.outer
kron = Tensor.kron
diagonal = Tensor.diagonal
diag = Tensor.diag
trace = Tensor.trace
numel = Tensor.numel


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
    if not tensors or builtins.any(x.ndim > 1 for x in tensors):
        raise OpError("meshgrid: expected vectors or numbers")
    if len({x.dtype for x in tensors}) > 1:
        raise OpTypeError("meshgrid: all tensors must have one dtype")
    order = list(range(len(tensors)))
    if indexing == "xy" and len(tensors) > 1:
        order[0], order[1] = 1, 0
    shape = [tensors[i].numel() for i in order]
    return tuple(
        x.reshape([n if order[d] == i else 1 for d, n in enumerate(shape)]).expand(shape) for i, x in enumerate(tensors)
    )


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


_OTHERS = {"Tensor", "TensorBase", "OpError", "OpTypeError", "as_tensor", "dim_index", "operands", "concatenate"}
__all__ = [
    name
    for name, value in list(globals().items())
    if callable(value) and not name.startswith("_") and name not in _OTHERS
]
