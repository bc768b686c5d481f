"""The fused routines for CUDA: names and arguments as in kernels/reference.py, kernels of `signatures.py` inside.

float32, bfloat16 and float16; what a kernel does not do (float64, odd layouts, attention masks) the reference does, in
CuPy's whole-array operations, through half.py where it has 16 bits. Results, as there, are new arrays; statistics,
losses and gradients of parameters are float32."""

import numpy as np

from .. import reference
from ..half import HalfRoutines, is_half
from ..precision import are_deterministic_algorithms_enabled as is_deterministic
from ..reference import *  # noqa: F403
from ..reference import dropout_key
from .attention import attention as batched_attention
from .attention import attention_backward as batched_attention_backward
from .cudnn import cudnn_for, usable
from .gemm import gemm, supported
from .launch import has_kernels, launch
from .signatures import CPP, adamw_hyper, norm_strips, square_partials, tile_strips

_half = HalfRoutines(reference)
PITCH = 128  # rows of a product whose width is no multiple of 8 begin at multiples of this many elements


def _other(x):
    """The reference's routines for arrays like `x`."""
    return _half if is_half(x.dtype) else reference


def _kernels(xp, x):
    """The type of kernels for arrays like `x`, or None."""
    name = x.dtype.name
    return name if name in CPP and x.size and has_kernels(xp) else None


def _rows(x):
    """(rows, width) of x flattened to a matrix, for what looks at elements one by one."""
    width = x.shape[-1] if x.ndim else 1
    return x.size // width, width


def _whole(xp, x, dtype=None):
    """x, contiguous and of this dtype: itself where it is so already."""
    if not x.flags.c_contiguous:
        x = x.copy()
    return x if dtype is None or x.dtype == dtype else x.astype(dtype)


def _float32(xp, x):
    return None if x is None else _whole(xp, x, np.float32)


# ---- products --------------------------------------------------------------------------------------------------------


def linear(xp, x, weight, bias):
    if not supported(x, weight):
        return _other(x).linear(xp, x, weight, bias)
    y = _pitched(xp, len(x), len(weight), x.dtype)
    gemm(xp, x, weight.T, y)
    if bias is None:
        return y
    kind = _kernels(xp, y)
    if kind is None or not y.flags.c_contiguous:
        y += bias.astype(y.dtype, copy=False)
    else:
        launch(xp, "bias_add", kind, y, _float32(xp, bias), y, *y.shape)
    return y


def _pitched(xp, rows, width, dtype):
    """An empty matrix, in 16 bits with rows on boundaries that tensor cores like (a vocabulary of 50257 is odd)."""
    if not is_half(dtype) or width % 8 == 0:
        return xp.empty((rows, width), dtype)
    return xp.empty((rows, -(-width // PITCH) * PITCH), dtype)[:, :width]


def linear_backward(xp, x, weight, g, needs, into=None):
    if not (supported(x, weight) and supported(g, weight)):
        return _other(x).linear_backward(xp, x, weight, g, needs, into)
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
    kind = _kernels(xp, g)
    if kind is None or not g.flags.c_contiguous:
        return g.sum(axis=0, dtype=np.float64 if g.dtype == np.float64 else np.float32)
    partial = xp.empty((tile_strips(*g.shape, g.itemsize), g.shape[1]), np.float32)
    launch(xp, "column_sum", kind, g, partial, *g.shape)
    return _finish(xp, partial)


def _finish(xp, partial):
    """The sum over strips, float32 (width,)."""
    out = xp.empty(partial.shape[1], np.float32)
    launch(xp, "column_sum_finish", "float32", partial, out, *partial.shape, 0)
    return out


def matmul(xp, a, b):
    if not supported(a, b):
        return _other(a).matmul(xp, a, b)
    if a.ndim == b.ndim == 2:
        return gemm(xp, a, b)
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (xp.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (a, b))
    return gemm(xp, a, b)


# ---- activations -----------------------------------------------------------------------------------------------------


def _forward(xp, name, x, fallback):
    kind = _kernels(xp, x)
    if kind is None:
        return fallback()
    x = _whole(xp, x)
    y = xp.empty(x.shape, x.dtype)
    launch(xp, name + "_forward", kind, x, None, y, *_rows(x))
    return y


def _backward(xp, name, x, g, fallback):
    kind = _kernels(xp, x)
    if kind is None:
        return fallback()
    x, g = _whole(xp, x), _whole(xp, g, x.dtype)
    dx = xp.empty(x.shape, x.dtype)
    launch(xp, name + "_backward", kind, x, None, g, dx, None, *_rows(x))
    return dx


def gelu(xp, x, approximate):
    name = "gelu_tanh" if approximate == "tanh" else "gelu"
    return _forward(xp, name, x, lambda: _other(x).gelu(xp, x, approximate))


def gelu_backward(xp, x, y, g, approximate):
    name = "gelu_tanh" if approximate == "tanh" else "gelu"
    return _backward(xp, name, x, g, lambda: _other(x).gelu_backward(xp, x, y, g, approximate))


def silu(xp, x):
    return _forward(xp, "silu", x, lambda: _other(x).silu(xp, x))


def silu_backward(xp, x, g):
    return _backward(xp, "silu", x, g, lambda: _other(x).silu_backward(xp, x, g))


def relu2(xp, x):
    return _forward(xp, "relu2", x, lambda: _other(x).relu2(xp, x))


def relu2_backward(xp, x, g):
    return _backward(xp, "relu2", x, g, lambda: _other(x).relu2_backward(xp, x, g))


def _stride(*arrays):
    """The common row stride, in elements, of matrices whose columns are neighbours; None where there is none."""
    found = {a.strides[0] // a.itemsize for a in arrays}
    return found.pop() if len(found) == 1 and all(a.strides[1] == a.itemsize for a in arrays) else None


def swiglu(xp, gate, value):
    kind, stride = _kernels(xp, gate), _stride(gate, value)
    if kind is None or stride is None:
        return _other(gate).swiglu(xp, gate, value)
    y = xp.empty(gate.shape, gate.dtype)
    launch(xp, "swiglu_forward", kind, gate, value, y, *gate.shape, stride)
    return y


def swiglu_backward(xp, gate, value, g, dgate, dvalue):
    kind, stride = _kernels(xp, gate), _stride(gate, value, dgate, dvalue)
    if kind is None or stride is None:
        _other(gate).swiglu_backward(xp, gate, value, g, dgate, dvalue)
    else:
        g = _whole(xp, g, gate.dtype)
        launch(xp, "swiglu_backward", kind, gate, value, g, dgate, dvalue, *gate.shape, stride)


# ---- normalisation ---------------------------------------------------------------------------------------------------


def layer_norm(xp, x, weight, bias, eps):
    kind = _kernels(xp, x)
    if kind is None:
        return _other(x).layer_norm(xp, x, weight, bias, eps)
    x = _whole(xp, x)
    y, (mean, rstd) = xp.empty(x.shape, x.dtype), (xp.empty((len(x), 1), np.float32) for _ in range(2))
    weight, bias = _float32(xp, weight), _float32(xp, bias)
    launch(xp, "layer_norm_forward", (kind, kind), x, None, weight, bias, None, y, mean, rstd, *x.shape, eps)
    return y, mean, rstd


def layer_norm_backward(xp, x, weight, mean, rstd, g, affine):
    kind = _kernels(xp, x)
    if kind is None:
        return _other(x).layer_norm_backward(xp, x, weight, mean, rstd, g, affine)
    x, g = _whole(xp, x), _whole(xp, g, x.dtype)
    dx, sums = xp.empty(x.shape, x.dtype), (None, None)
    if affine:
        sums = [xp.empty((norm_strips(len(x)), x.shape[1]), np.float32) for _ in range(2)]
    launch(
        xp, "layer_norm_backward", (kind, kind),
        x, _float32(xp, weight), mean, rstd, g, None, dx, None, *sums, *x.shape,
    )  # fmt: skip
    return dx, *(None if s is None else _finish(xp, s) for s in sums)


def rms_norm(xp, x, weight, eps):
    kind = _kernels(xp, x)
    if kind is None:
        return _other(x).rms_norm(xp, x, weight, eps)
    x = _whole(xp, x)
    y, rstd = xp.empty(x.shape, x.dtype), xp.empty((len(x), 1), np.float32)
    launch(xp, "rms_norm_forward", (kind, kind), x, None, _float32(xp, weight), None, y, rstd, *x.shape, eps)
    return y, rstd


def rms_norm_backward(xp, x, weight, rstd, g, affine):
    kind = _kernels(xp, x)
    if kind is None:
        return _other(x).rms_norm_backward(xp, x, weight, rstd, g, affine)
    x, g = _whole(xp, x), _whole(xp, g, x.dtype)
    dx = xp.empty(x.shape, x.dtype)
    partial = xp.empty((norm_strips(len(x)), x.shape[1]), np.float32) if affine else None
    launch(
        xp, "rms_norm_backward", (kind, kind),
        x, _float32(xp, weight), rstd, g, None, dx, None, partial, *x.shape,
    )  # fmt: skip
    return dx, None if partial is None else _finish(xp, partial)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def dropout(device, x, p, identity):
    xp = device.xp
    kind = _kernels(xp, x)
    if kind is None:
        return _other(x).dropout(device, x, p, identity)
    x = _whole(xp, x)
    y = xp.empty(x.shape, x.dtype)
    launch(xp, "dropout", kind, x, y, x.size, *dropout_key(p, identity), 0, 1 / (1 - p))
    return y


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


def _pitch(x):
    """Elements from one row of a matrix to the next, where its columns are neighbours; else None."""
    rows, width = x.shape
    stride = x.strides[0] // x.itemsize if rows > 1 else width
    return stride if width == 1 or x.strides[1] == x.itemsize else None


def cross_entropy(xp, logits, target, ignore_index):
    kind = _kernels(xp, logits)
    stride = _pitch(logits)
    if kind is None or stride is None:
        return _other(logits).cross_entropy(xp, logits, target, ignore_index)
    rows, classes = logits.shape
    target = _whole(xp, target, np.int64)
    loss, lse = xp.empty(rows, np.float32), xp.empty((rows, 2), np.float32)
    arguments = (loss, lse, _error_word(xp), rows, classes, stride, ignore_index)
    launch(xp, "cross_entropy_forward", kind, logits, target, *arguments)
    return loss, lse, target != ignore_index


def cross_entropy_backward(xp, logits, target, lse, counted, g, out=None):
    kind = _kernels(xp, logits)
    stride = _pitch(logits)
    if kind is None or stride is None:
        return _other(logits).cross_entropy_backward(xp, logits, target, lse, counted, g, out)
    (rows, classes), result = logits.shape, out
    if result is None or not _holds(result, stride):
        result = xp.empty((rows, stride), logits.dtype)[:, :classes]
    target = xp.where(counted, target, -1).astype(np.int64, copy=False)  # -1 is ignored
    if g.strides[0] == 0 or rows == 1:  # a mean's: one number for all rows
        g, g_stride = _whole(xp, g[:1], np.float32), 0
    else:
        g, g_stride = _whole(xp, g, np.float32), 1
    launch(
        xp, "cross_entropy_backward", kind,
        logits, target, lse, g, result, rows, classes, stride, g_stride, -1,
    )  # fmt: skip
    return result


def _holds(x, stride):
    """Does the memory that matrix x begins hold whole rows of `stride` elements? The kernel clears their ends."""
    whole = x if x.base is None else x.base
    return x.data.ptr == whole.data.ptr and whole.nbytes >= len(x) * stride * x.itemsize


_error_words = {}


def _error_word(xp):
    """Where kernels note ids that are out of range, which they skip; `Device.check_range` reports them."""
    key = xp, xp.cuda.Device().id
    if key not in _error_words:
        _error_words[key] = xp.zeros(1, np.uint32)
    return _error_words[key]


# ---- embedding -------------------------------------------------------------------------------------------------------


def embedding_backward(device, ids, g, rows, into=None):
    xp = device.xp
    kind = _kernels(xp, g)
    if kind is None or (into is not None and into[0].dtype != np.float32):
        return _other(g).embedding_backward(device, ids, g, rows, into)
    out, add = into or (xp.empty((rows, g.shape[1]), np.float32), False)
    if not add:
        out.fill(0)
    ids, g = _whole(xp, ids, np.int64), _whole(xp, g)
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
    if mask is not None or _kernels(xp, q) is None or not (k.size and v.size):
        return _other(q).attention(device, q, k, v, mask, causal, scale, p, identity)
    if identity is None and usable(q, k, v) and (fused := cudnn_for(xp)) is not None:
        result = fused.attention(q, k, v, causal, scale)
        if result is not None:
            return result
    return batched_attention(xp, q, k, v, causal, scale, p, identity)


def attention_backward(device, q, k, v, kept, causal, scale, p, identity, g):
    xp = device.xp
    if len(kept) == 2 and kept[0].ndim == 4:  # by cuDNN
        found = cudnn_for(xp).backward(q, k, v, kept, causal, scale, g)
        if found is not None:
            return found
        _, kept = batched_attention(xp, q, k, v, causal, scale, p, identity)
    if _kernels(xp, q) is None or kept[0].ndim != 3:  # kept by the reference
        return _other(q).attention_backward(device, q, k, v, kept, causal, scale, p, identity, g)
    return batched_attention_backward(xp, q, k, v, kept, causal, scale, p, identity, g)


# ---- optimizer -------------------------------------------------------------------------------------------------------


WRITES_SHADOWS = True  # adamw can write the new parameters in 16 bits as well


def adamw(xp, p, grad, exp_avg, exp_avg_sq, *, lr, betas, eps, weight_decay, step, grad_scale=1.0, shadow=None):
    """As in reference_update.py, in one launch. `grad_scale` may be a 0-d array of the device, which the kernel reads;
    `shadow`, unless None, a 16-bit array that receives the new parameters too."""
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": step}
    if p.dtype != np.float32 or not has_kernels(xp):
        reference.adamw(xp, p, grad, exp_avg, exp_avg_sq, **options, grad_scale=grad_scale)
        if shadow is not None:
            shadow[...] = p.astype(shadow.dtype)
        return
    clip = None
    if not isinstance(grad_scale, int | float):
        clip = xp.zeros(3, np.float32)  # norm, factor, leave out?
        clip[1] = grad_scale
        grad_scale = 1.0
    hyper = xp.asarray(adamw_hyper(**options, gradient_scale=grad_scale))
    decayed = p.size if weight_decay else 0
    kind = "float32" if shadow is None else shadow.dtype.name
    launch(xp, "adamw", kind, p, grad, exp_avg, exp_avg_sq, shadow, hyper, clip, p.size, decayed)


def sum_of_squares(xp, x):
    kind = _kernels(xp, x)
    if kind is None or not x.flags.c_contiguous:
        return reference.sum_of_squares(xp, x)
    partial = xp.empty(square_partials(x.size, x.itemsize), np.float64)
    launch(xp, "sum_of_squares", kind, x, partial, x.size)
    return partial.sum()


# ---- what the reference does for all dtypes --------------------------------------------------------------------------


def _as_reference(name):
    def run(*arguments):
        return getattr(_other(next(a for a in arguments if hasattr(a, "astype"))), name)(*arguments)

    run.__name__ = name
    return run


for _name in ("softmax", "softmax_backward", "log_softmax", "log_softmax_backward", "rotary"):
    globals()[_name] = _as_reference(_name)
