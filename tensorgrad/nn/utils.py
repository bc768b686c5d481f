"""Clipping of gradients, in place and without temporaries larger than a block."""

import math

import numpy as np

from ..creation import zeros
from ..device import address
from ..engine import wrap
from ..kernels import routines
from ..tensor import Tensor


def block_size(device):
    """Elements per piece when walking over long arrays: on the CPU, several float32 arrays of that length fit the L2
    cache; on a GPU, pieces only bound the temporaries."""
    return 2**16 if device.type == "cpu" else 2**24


def _gradients(parameters):
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p.grad for p in parameters if p.grad is not None]


def _blocks(tensor):
    """The elements of `tensor` as 1-D pieces, at least in float32."""
    flat, size = tensor.array.reshape(-1), block_size(tensor.device)
    wide = np.promote_types(flat.dtype, np.float32)
    return [flat[i : i + size].astype(wide, copy=False) for i in range(0, flat.size, size)]


def merged(arrays):
    """The arrays, those joined (and flat) that lie in one buffer with nothing but zero padding between them, as
    gradients of an optimizer's flat storage do; in the order in which each buffer first comes up."""
    runs, last = [], {}  # (buffer's id -> its last run: weights and biases of a layer most often have a buffer each)
    for array in arrays:
        base = array.base
        joins = hasattr(base, "ndim") and base.ndim == 1 and base.dtype == array.dtype
        if not joins or not array.flags.c_contiguous:
            runs.append([None, 0, 0, array])
            continue
        start = (address(array) - address(base)) // array.itemsize
        run = last.get(id(base))
        if run is not None and 0 <= start - run[2] < 64 // array.itemsize:
            run[2] = start + array.size
        else:
            runs.append([base, start, start + array.size, None])
            last[id(base)] = runs[-1]
    return [flat if base is None else base[start:stop] for base, start, stop, flat in runs]


def get_total_norm(tensors, norm_type=2.0, error_if_nonfinite=False):
    """The norm of all elements of `tensors` taken as one vector, a 0-d Tensor: (sum |x|**norm_type)**(1/norm_type), or
    max |x| for `norm_type=inf`. With `error_if_nonfinite`, raises RuntimeError where it is nan or infinite."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not tensors:
        return zeros(())
    device, xp = tensors[0].device, tensors[0].device.xp
    blocks = (block for tensor in tensors for block in _blocks(tensor))
    if norm_type == math.inf:
        total = xp.stack([abs(block).max() for block in blocks]).max()  # a maximum of Python's would lose nan
    elif norm_type == 2:
        squares = routines(device).sum_of_squares
        total = sum(squares(xp, array.reshape(-1)) for array in merged([t.array for t in tensors])) ** 0.5
    else:
        total = sum((abs(block) ** norm_type).sum(dtype="float64") for block in blocks) ** (1 / norm_type)
    norm = wrap(xp.asarray(total, tensors[0].dtype), device)
    if error_if_nonfinite and not math.isfinite(norm.item()):
        raise RuntimeError(
            f"the total norm (order {norm_type}) of the gradients is {norm.item()}; "
            "find its source with tg.autograd.detect_anomaly()"
        )
    return norm


def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False):
    """Scale all gradients by one factor so that their total norm is at most `max_norm` (Pascanu et al. 2013).

    `parameters`: Tensors, or one; those without gradient do not count. Returns the norm before scaling (0-d)."""
    gradients = _gradients(parameters)
    norm = get_total_norm(gradients, norm_type, error_if_nonfinite)
    with np.errstate(invalid="ignore"):  # a norm that is nan or infinite makes gradients nan, as in PyTorch
        factor = norm.device.xp.minimum(max_norm / (norm.array + 1e-6), 1.0)
        if norm.device.type == "cpu" and factor == 1:
            return norm
        finite = norm.device.type == "cpu" and math.isfinite(factor)  # nan must not reach the padding between them
        for array in merged([g.array for g in gradients]) if finite else [g.array for g in gradients]:
            if norm.device.type == "cpu" and array.flags.c_contiguous:
                routines(norm.device).scale(norm.device.xp, array.reshape(-1), factor)
            else:
                array *= factor
        for grad in gradients:
            grad._bump()
    return norm


def clip_grad_value_(parameters, clip_value):
    """Limit every element of the gradients to [-clip_value, clip_value], in place."""
    for grad in _gradients(parameters):
        grad.device.xp.clip(grad.array, -clip_value, clip_value, out=grad.array)
        grad._bump()
