"""The fused routines for CUDA: names and arguments as in kernels/reference.py, kernels of `signatures.py` inside.

float32, bfloat16 and float16; what a kernel does not do (float64, odd layouts) the reference does, in CuPy's
whole-array operations, through half.py where it has 16 bits. Results, as there, are new arrays; statistics, losses and
gradients of parameters are float32."""

from functools import partial

import numpy as np

from .. import reference
from ..half import is_half
from ..precision import are_deterministic_algorithms_enabled as is_deterministic
from ..reference import *  # noqa: F403
from ..reference import dropout_key
from .attention import attention as batched_attention
from .attention import attention_backward as batched_attention_backward
from .common import finish, float32, kernels, other, rows, whole
from .cudnn import cudnn_for, usable
from .gemm import adds_bias, gemm, supported
from .launch import has_kernels, launch
from .norms import *  # noqa: F403
from .signatures import adamw_hyper, square_partials, tile_strips

PITCH = 128  # rows of a product whose width is no multiple of 8 begin at multiples of this many elements


# ---- products --------------------------------------------------------------------------------------------------------


def linear(xp, x, weight, bias):
    if not supported(x, weight):
        return other(x).linear(xp, x, weight, bias)
    y = _pitched(xp, len(x), len(weight), x.dtype)
    if bias is not None and adds_bias(xp, y.dtype):
        return gemm(xp, x, weight.T, y, bias=whole(xp, bias, y.dtype))
    gemm(xp, x, weight.T, y)
    if bias is None:
        return y
    kind = kernels(xp, y)
    if kind is None or not y.flags.c_contiguous:
        y += bias.astype(y.dtype, copy=False)
    else:
        launch(xp, "bias_add", kind, y, float32(xp, bias), y, *y.shape)
    return y


def _pitched(xp, rows, width, dtype):
    """An empty matrix, in 16 bits with rows on boundaries that tensor cores like (a vocabulary of 50257 is odd)."""
    if not is_half(dtype) or width % 8 == 0:
        return xp.empty((rows, width), dtype)
    return xp.empty((rows, -(-width // PITCH) * PITCH), dtype)[:, :width]


def linear_backward(xp, x, weight, g, needs, into=None):
    if not (supported(x, weight) and supported(g, weight)):
        return other(x).linear_backward(xp, x, weight, g, needs, into)
    dx = gemm(xp, g, weight) if needs[0] else None
    dw = None
    if needs[1]:
        target, add = into or (xp.empty(weight.shape, np.float32 if is_half(x.dtype) else x.dtype), False)
        if supported(g, x, target):
            gemm(xp, g.T, x, target, beta=1.0 if add else 0.0)
        else:
            reference.put(gemm(xp, g.T, x), target, add)
        dw = target if into is None else None
    return dx, dw, column_sum(xp, g) if len(needs) > 2 and needs[2] else None


def column_sum(xp, g):
    kind = kernels(xp, g)
    if kind is None or not g.flags.c_contiguous:
        return g.sum(axis=0, dtype=np.float64 if g.dtype == np.float64 else np.float32)
    partial = _partial(xp, g.itemsize, *g.shape)
    launch(xp, "column_sum", kind, g, partial, *g.shape)
    return finish(xp, partial)


def matmul(xp, a, b):
    if not supported(a, b):
        return other(a).matmul(xp, a, b)
    if a.ndim == b.ndim == 2:
        return gemm(xp, a, b)
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (xp.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (a, b))
    return gemm(xp, a, b)


# ---- activations -----------------------------------------------------------------------------------------------------


SUMS_COLUMNS = True  # the backward of activations can add up its result's rows on the way: `sums`


def _forward(xp, name, x, fallback):
    kind = kernels(xp, x)
    if kind is None:
        return fallback()
    x = whole(xp, x)
    y = xp.empty(x.shape, x.dtype)
    launch(xp, name + "_forward", kind, x, y, x.size)
    return y


def _backward(xp, name, x, g, sums, fallback):
    """The gradient; with `sums` a pair, its sums over all but the last dimension beside it, float32 (None where no
    kernel adds them up)."""
    kind = kernels(xp, x)
    if kind is None:
        return (fallback(), None) if sums else fallback()
    x, g = whole(xp, x), whole(xp, g, x.dtype)
    dx = xp.empty(x.shape, x.dtype)
    partial = _partial(xp, x.itemsize, *rows(x)) if sums else None
    launch(xp, name + "_backward", kind, x, g, dx, partial, *rows(x))
    return (dx, finish(xp, partial)) if sums else dx


def _partial(xp, itemsize, rows, width, columns=1):
    """Room for the sums over strips of rows of `columns` matrices (rows, width) side by side."""
    return xp.empty((tile_strips(rows, width, itemsize), columns * width), np.float32)


def gelu(xp, x, approximate):
    name = "gelu_tanh" if approximate == "tanh" else "gelu"
    return _forward(xp, name, x, lambda: other(x).gelu(xp, x, approximate))


def gelu_backward(xp, x, y, g, approximate, sums=False):
    name = "gelu_tanh" if approximate == "tanh" else "gelu"
    return _backward(xp, name, x, g, sums, lambda: other(x).gelu_backward(xp, x, y, g, approximate))


def silu(xp, x):
    return _forward(xp, "silu", x, lambda: other(x).silu(xp, x))


def silu_backward(xp, x, g, sums=False):
    return _backward(xp, "silu", x, g, sums, lambda: other(x).silu_backward(xp, x, g))


def relu2(xp, x):
    return _forward(xp, "relu2", x, lambda: other(x).relu2(xp, x))


def relu2_backward(xp, x, g, sums=False):
    return _backward(xp, "relu2", x, g, sums, lambda: other(x).relu2_backward(xp, x, g))


def _stride(*arrays):
    """The common row stride, in elements, of matrices whose columns are neighbours; None where there is none."""
    found = {a.strides[0] // a.itemsize for a in arrays}
    return found.pop() if len(found) == 1 and all(a.strides[1] == a.itemsize for a in arrays) else None


def swiglu(xp, gate, value):
    kind, stride = kernels(xp, gate), _stride(gate, value)
    if kind is None or stride is None:
        return other(gate).swiglu(xp, gate, value)
    y = xp.empty(gate.shape, gate.dtype)
    launch(xp, "swiglu_forward", kind, gate, value, y, *gate.shape, stride)
    return y


def swiglu_backward(xp, gate, value, g, dgate, dvalue, sums=False):
    """With `sums`, the sums are those of the rows of dgate and, behind them, of dvalue."""
    kind, stride = kernels(xp, gate), _stride(gate, value, dgate, dvalue)
    if kind is None or stride is None:
        other(gate).swiglu_backward(xp, gate, value, g, dgate, dvalue)
        return (None, None) if sums else None
    g = whole(xp, g, gate.dtype)
    partial = _partial(xp, g.itemsize, *gate.shape, columns=2) if sums else None
    launch(xp, "swiglu_backward", kind, gate, value, g, dgate, dvalue, partial, *gate.shape, stride)
    return (None, finish(xp, partial)) if sums else None


# ---- softmax ---------------------------------------------------------------------------------------------------------


def _along(xp, name, dim, arrays, fallback):
    """A kernel of rows on arrays whose rows lie along `dim`; where that is not the last, copies have it last."""
    kind = kernels(xp, arrays[0])
    if kind is None:
        return fallback()
    moved = [whole(xp, a.swapaxes(dim, -1), arrays[0].dtype) for a in arrays]
    out = xp.empty(moved[0].shape, moved[0].dtype)
    launch(xp, name, kind, *moved, out, *rows(out))
    return whole(xp, out.swapaxes(dim, -1))


def softmax(xp, x, dim):
    return _along(xp, "row_softmax_forward", dim, (x,), lambda: other(x).softmax(xp, x, dim))


def softmax_backward(xp, y, g, dim):
    return _along(xp, "row_softmax_backward", dim, (y, g), lambda: other(y).softmax_backward(xp, y, g, dim))


def log_softmax(xp, x, dim):
    return _along(xp, "row_log_softmax_forward", dim, (x,), lambda: other(x).log_softmax(xp, x, dim))


def log_softmax_backward(xp, y, g, dim):
    return _along(xp, "row_log_softmax_backward", dim, (y, g), lambda: other(y).log_softmax_backward(xp, y, g, dim))


# ---- dropout ---------------------------------------------------------------------------------------------------------


def dropout(device, x, p, identity):
    xp = device.xp
    kind = kernels(xp, x)
    if kind is None:
        return other(x).dropout(device, x, p, identity)
    x = whole(xp, x)
    y = xp.empty(x.shape, x.dtype)
    launch(xp, "dropout", kind, x, y, x.size, *dropout_key(p, identity), 1 / (1 - p))
    return y


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


def _pitch(x):
    """Elements from one row of a matrix to the next, where its columns are neighbours; else None."""
    rows, width = x.shape
    stride = x.strides[0] // x.itemsize if rows > 1 else width
    return stride if width == 1 or x.strides[1] == x.itemsize else None


def cross_entropy(xp, logits, target, ignore_index):
    kind = kernels(xp, logits)
    stride = _pitch(logits)
    if kind is None or stride is None:
        return other(logits).cross_entropy(xp, logits, target, ignore_index)
    rows, classes = logits.shape
    target = whole(xp, target, np.int64)
    loss, lse = xp.empty(rows, np.float32), xp.empty((rows, 2), np.float32)
    launch(xp, "cross_entropy_forward", kind, logits, target, loss, lse, rows, classes, stride, ignore_index)
    return loss, lse, target != ignore_index


def cross_entropy_backward(xp, logits, target, lse, counted, g, out=None):
    kind = kernels(xp, logits)
    stride = _pitch(logits)
    if kind is None or stride is None:
        return other(logits).cross_entropy_backward(xp, logits, target, lse, counted, g, out)
    (rows, classes), result = logits.shape, out
    if result is None or not _holds(result, stride):
        result = xp.empty((rows, stride), logits.dtype)[:, :classes]
    target = xp.where(counted, target, -1).astype(np.int64, copy=False)  # -1 is ignored
    if g.strides[0] == 0 or rows == 1:  # a mean's: one number for all rows
        g, g_stride = whole(xp, g[:1], np.float32), 0
    else:
        g, g_stride = whole(xp, g, np.float32), 1
    launch(
        xp, "cross_entropy_backward", kind,
        logits, target, lse, g, result, rows, classes, stride, g_stride, -1,
    )  # fmt: skip
    return result


def _holds(x, stride):
    """Does the memory that matrix x begins hold whole rows of `stride` elements? The kernel clears their ends."""
    whole = x if x.base is None else x.base
    return x.data.ptr == whole.data.ptr and whole.nbytes >= len(x) * stride * x.itemsize


# ---- embedding -------------------------------------------------------------------------------------------------------


def embedding(xp, weight, ids):
    kind = kernels(xp, weight)
    if kind is None or not weight.flags.c_contiguous:
        return reference.embedding(xp, weight, ids)
    out = xp.empty((*ids.shape, weight.shape[1]), weight.dtype)
    launch(xp, "embedding_forward", kind, weight, whole(xp, ids, np.int64), out, ids.size, *weight.shape[::-1])
    return out


def embedding_backward(device, ids, g, rows, into=None):
    xp = device.xp
    kind = kernels(xp, g)
    if kind is None or (into is not None and into[0].dtype != np.float32):
        return other(g).embedding_backward(device, ids, g, rows, into)
    out, add = into or (xp.empty((rows, g.shape[1]), np.float32), False)
    if not add:
        out.fill(0)
    ids, g = whole(xp, ids, np.int64), whole(xp, g)
    if is_deterministic():
        order = xp.argsort(ids, kind="stable")
        arguments = (ids[order], order.astype(np.int64, copy=False))
        launch(xp, "embedding_backward_sorted", kind, *arguments, g, out, *g.shape, rows)
    else:
        launch(xp, "embedding_backward_atomic", kind, ids, g, out, *g.shape, rows)
    return out


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(device, q, k, v, mask, causal, scale, p, identity):
    xp = device.xp
    if kernels(xp, q) is None or not (k.size and v.size):
        return other(q).attention(device, q, k, v, mask, causal, scale, p, identity)
    if mask is None and identity is None and usable(q, k, v) and (fused := cudnn_for(xp)) is not None:
        result = fused.attention(q, k, v, causal, scale)
        if result is not None:
            return result
    return batched_attention(xp, q, k, v, mask, causal, scale, p, identity)


def attention_backward(device, q, k, v, kept, causal, scale, p, identity, g):
    xp = device.xp
    if len(kept) == 2 and kept[0].ndim == 4:  # by cuDNN
        found = cudnn_for(xp).backward(q, k, v, kept, causal, scale, g)
        if found is not None:
            return found
        _, kept = batched_attention(xp, q, k, v, None, causal, scale, p, identity)
    if kernels(xp, q) is None or kept[0].ndim != 3:  # kept by the reference
        return other(q).attention_backward(device, q, k, v, kept, causal, scale, p, identity, g)
    return batched_attention_backward(xp, q, k, v, kept, causal, scale, p, identity, g)


# ---- optimizer -------------------------------------------------------------------------------------------------------


WRITES_SHADOWS = True  # adamw can write the new parameters in 16 bits as well


def adamw(xp, p, grad, exp_avg, exp_avg_sq, *, lr, betas, eps, weight_decay, step, grad_scale=1.0, found_inf=None,
          shadow=None):
    """As in reference_update.py, in one launch. `grad_scale`, `step`, and with it `lr`, may be 0-d arrays of the
    device, which the kernel reads; where the 0-d array `found_inf` is set, nothing changes. `shadow`, unless None, is a
    16-bit array that receives the parameters too."""
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": step}
    if p.dtype != np.float32 or not has_kernels(xp):
        update = partial(reference.adamw, xp, p, grad, exp_avg, exp_avg_sq, **options, grad_scale=grad_scale)
        if found_inf is None:
            update()
        else:
            reference.unless(xp, found_inf, (p, exp_avg, exp_avg_sq), update)
        if shadow is not None:
            shadow[...] = p.astype(shadow.dtype)
        return
    clip = None
    if found_inf is not None or not isinstance(grad_scale, int | float):
        clip = xp.zeros(2, np.float32)  # factor, leave out?
        clip[0] = grad_scale
        if found_inf is not None:
            clip[1] = found_inf
        grad_scale = 1.0
    if isinstance(step, int):
        hyper = xp.asarray(adamw_hyper(**options, gradient_scale=grad_scale))
    else:
        hyper = _device_hyper(xp, **options, gradient_scale=grad_scale)
    decayed = p.size if weight_decay else 0
    kind = "float32" if shadow is None else shadow.dtype.name
    launch(xp, "adamw", kind, p, grad, exp_avg, exp_avg_sq, shadow, hyper, clip, p.size, decayed)


def _device_hyper(xp, *, lr, betas, eps, weight_decay, step, gradient_scale):
    """adamw_hyper for numbers of the device, without a copy from the host, which a CUDA graph could not repeat."""
    (beta1, beta2), hyper = betas, xp.empty(8, np.float32)
    numbers = 1 - beta1, beta2, 1 - beta2, eps, lr / (1 - beta1**step), 1 / xp.sqrt(1 - beta2**step)
    for i, number in enumerate((*numbers, 1 - lr * weight_decay, gradient_scale)):
        hyper[i] = number
    return hyper


def sum_of_squares(xp, x):
    kind = kernels(xp, x)
    if kind is None or not x.flags.c_contiguous:
        return reference.sum_of_squares(xp, x)
    partial = xp.empty(square_partials(x.size, x.itemsize), np.float64)
    launch(xp, "sum_of_squares", kind, x, partial, x.size)
    return partial.sum()


def unscale(xp, x, inverse, found):
    kind = kernels(xp, x)
    if kind is None or not x.flags.c_contiguous:
        return reference.unscale(xp, x, inverse, found)
    launch(xp, "unscale", kind, x, inverse, found, x.size)
