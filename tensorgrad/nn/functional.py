"""torch.nn.functional's names: activations, normalisation, losses, embedding, dropout, attention."""

import math

import numpy as np

from .. import dtypes
from ..dtypes import float32, float64
from ..engine import apply, modes, wrap
from ..errors import OpError, OpTypeError
from ..ops import block, composed
from ..ops import nn as ops
from ..ops.common import autocast_dtype, cast, half_copy, is_tensor, operands, require_floating, to_half
from ..ops.movement import pad_constant
from ..ops.packed import PackedEmbedding, PackedLinear
from ..random import default_generator
from .losses import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from .losses import cross_entropy as cross_entropy
from .losses import kl_div as kl_div
from .losses import l1_loss as l1_loss
from .losses import mse_loss as mse_loss
from .losses import nll_loss as nll_loss
from .losses import smooth_l1_loss as smooth_l1_loss
from .norms import add_layer_norm as add_layer_norm
from .norms import add_rms_norm as add_rms_norm
from .norms import layer_norm as layer_norm
from .norms import rms_norm as rms_norm
from .packed import PackedWeight

# ---- activations -----------------------------------------------------------------------------------------------------


def relu(input, inplace=False):
    """max(0, x)."""
    return input.relu_() if inplace else input.relu()


def relu6(input, inplace=False):
    """min(max(0, x), 6); gradient 0 on both bounds."""
    return hardtanh(input, 0.0, 6.0, inplace)


def leaky_relu(input, negative_slope=0.01, inplace=False):
    """x where positive, else negative_slope * x."""
    if inplace:
        return input._write(lambda x: leaky_relu(x, negative_slope))
    return (input > 0)._select(input, input * negative_slope)


def elu(input, alpha=1.0, inplace=False):
    """x where positive, else alpha (exp(x) - 1)."""
    if inplace:
        return input._write(lambda x: elu(x, alpha))
    return (input > 0)._select(input, input.clamp(max=0.0).expm1() * alpha)


def gelu(input, approximate="none"):
    """x Phi(x), exact ("none") or by "tanh" (GPT-2's)."""
    if approximate not in ("none", "tanh"):
        raise OpError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    require_floating("gelu", input)
    return (
        composed.gelu(input, approximate)
        if ops.LEVEL == "composed"
        else apply(ops.Gelu, input, approximate=approximate)
    )


def silu(input, inplace=False):
    """x sigmoid(x), also called swish."""
    require_floating("silu", input)
    if inplace:
        return input._write(lambda x: silu(x))
    return composed.silu(input) if ops.LEVEL == "composed" else apply(ops.Silu, input)


def glu(input, dim=-1):
    """First half times sigmoid of the second half along `dim`."""
    if not input.ndim or input.shape[dim] % 2:
        raise OpError(f"glu: {input.shape}: dimension {dim} must have an even size")
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


def swiglu(gate, value=None):
    """silu(gate) * value; of one tensor (..., 2 n) -> (..., n), whose halves are gate and value (arXiv:2002.05202)."""
    require_floating("swiglu", gate)
    if value is None:
        if not gate.ndim or gate.shape[-1] % 2:
            raise OpError(f"swiglu: {gate.shape}: the last dimension, gate beside value, must have an even size")
        return composed.swiglu(*gate.chunk(2, -1)) if ops.LEVEL == "composed" else apply(block.Swiglu, gate)
    if gate.shape != value.shape or gate.dtype != value.dtype or not gate.ndim or ops.LEVEL == "composed":
        return composed.swiglu(gate, value)  # which broadcasts and promotes
    return apply(block.Swiglu, gate, value)


def relu2(input):
    """max(0, x)^2, the squared ReLU (arXiv:2109.08668)."""
    require_floating("relu2", input)
    return composed.relu2(input) if ops.LEVEL == "composed" else apply(block.Relu2, input)


def rotary(q, k, cos, sin):
    """Queries and keys (..., T, d) turned by their positions' angles: each pair (x[i], x[i + d/2]) of x becomes
    (x[i] cos[i] - x[i + d/2] sin[i], x[i + d/2] cos[i + d/2] + x[i] sin[i + d/2]), as in Llama (arXiv:2104.09864).

    cos, sin: tables (T, d), or what broadcasts to q and to k; both halves of a row hold the angles of the d/2 pairs.
    Returns both in their own dtypes."""
    require_floating("rotary", q)
    if not q.ndim or q.shape[-1] % 2 or q.shape[-1] != k.shape[-1] or cos.shape != sin.shape:
        raise OpError(
            f"rotary: q {q.shape}, k {k.shape}, cos {cos.shape}, sin {sin.shape}: q and k must end in one even size, "
            "cos and sin have one shape"
        )
    if ops.LEVEL == "composed" or cos.requires_grad or sin.requires_grad:
        return composed.rotary(q, cos, sin), composed.rotary(k, cos, sin)
    return apply(block.Rotary, q, k, cos, sin)


def softplus(input, beta=1.0, threshold=20.0):
    """log(1 + exp(beta x)) / beta; x itself where beta x > threshold."""
    scaled = input * beta
    linear_part = scaled > threshold
    return linear_part._select(input, _softplus(scaled.masked_fill(linear_part, 0.0)) * (1 / beta))


def _softplus(z):
    """log(exp(z) + exp(0))."""
    return z.logaddexp(z.new_zeros(()))


def logsigmoid(input):
    """log(sigmoid(x)) = -softplus(-x), without overflow."""
    return -_softplus(-input)


def hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False):
    """min(max(x, min_val), max_val); gradient 0 on the bounds and beyond."""
    if min_val > max_val:
        raise OpError(f"hardtanh: min_val {min_val} is larger than max_val {max_val}")
    if inplace:
        return input._write(lambda x: hardtanh(x, min_val, max_val))
    if not dtypes.is_floating(input.array.dtype):
        return input.clamp(int(min_val), int(max_val))
    outside = (input <= min_val) | (input >= max_val)
    return outside._select(input.detach().clamp(min_val, max_val), input)


def tanhshrink(input):
    """x - tanh(x)."""
    return input - input.tanh()


def tanh(input):
    return input.tanh()


def sigmoid(input):
    return input.sigmoid()


def softmax(input, dim=None, dtype=None):
    """exp(x) / sum(exp(x)) along `dim`."""
    return input.softmax(_chosen(input, dim), dtype=dtype)


def log_softmax(input, dim=None, dtype=None):
    """log(softmax(x)) along `dim`, without overflow."""
    return input.log_softmax(_chosen(input, dim), dtype=dtype)


def _chosen(x, dim):
    if dim is None:  # PyTorch's old implicit choice
        return 0 if x.ndim in (0, 1, 3) else 1
    return dim


# ---- layers ----------------------------------------------------------------------------------------------------------


def linear(input, weight, bias=None):
    """x (..., in) @ weight (out, in)^T + bias (out) -> (..., out). weight may be (in): then (...)."""
    if isinstance(weight, PackedWeight):
        return _packed_linear(input, weight, bias)
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if modes.autocast and (dtype := autocast_dtype(input)) and float64 not in [t.array.dtype for t in tensors]:
        if weight.ndim == 2 and ops.LEVEL != "composed" and input.ndim and weight.array.dtype == float32:
            return apply(ops.Linear, cast(input, dtype), *tensors[1:], half=half_copy(weight, dtype))
        input, weight, bias = (*(cast(t, dtype) for t in tensors), None)[:3]
        tensors = (input, weight) if bias is None else (input, weight, bias)
    if len({t.array.dtype for t in tensors}) > 1:
        raise OpTypeError(f"linear: dtypes differ: {', '.join(str(t.array.dtype) for t in tensors)}")
    if weight.ndim != 2 or ops.LEVEL == "composed" or (bias is not None and bias.ndim != 1) or not input.array.size:
        y = input.matmul(weight.t())
        return y if bias is None else y + bias
    return apply(ops.Linear, *tensors)


def _packed_linear(x, weight, bias):
    if x.array.dtype != np.float32 or (bias is not None and bias.array.dtype != np.float32):
        raise OpTypeError(f"linear: a weight stored as {weight.kind} takes float32, got {x.array.dtype}")
    return apply(PackedLinear, x, *(() if bias is None else (bias,)), weight=weight)


def embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    """Rows of weight (rows, width) by integer ids: input.shape + (width,). Ids out of range are an IndexError.
    The row `padding_idx` gets no gradient."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise OpError("embedding: max_norm, scale_grad_by_freq and sparse are not offered")
    ops.check_ids("embedding", input)
    if isinstance(weight, PackedWeight):
        return apply(PackedEmbedding, input, weight=weight)
    if weight.ndim != 2:
        raise OpError(f"embedding: weight must be 2-D, got {weight.shape}")
    if padding_idx is not None:
        if not -weight.shape[0] <= padding_idx < weight.shape[0]:
            raise OpError(f"embedding: padding_idx {padding_idx} is out of range for {weight.shape[0]} rows")
        padding_idx %= weight.shape[0]
    if ops.LEVEL == "composed" and padding_idx is None:
        return composed.embedding(weight, input)
    return apply(ops.Embedding, weight, input, padding=padding_idx)


def dropout(input, p=0.5, training=True, inplace=False):
    """Zero each element with probability p and scale the rest by 1 / (1 - p), in training only. The mask is not
    stored: backward draws it again from the generator's stream."""
    ops.check_probability("dropout", p)
    if not training or p == 0:
        return input
    if inplace:
        return input._write(lambda x: dropout(x, p))
    if p == 1:
        return input * 0.0
    return apply(ops.Dropout, input, p=p, identity=default_generator(input.device).next_stream())


def one_hot(tensor, num_classes=-1):
    """int64 tensor with a 1 at each id along a new last dimension of size num_classes (largest id + 1 unless given)."""
    ids = tensor.array
    if ids.dtype != np.int64:
        raise OpTypeError(f"one_hot: ids must be int64, got {ids.dtype}")
    if ids.size == 0 and num_classes <= 0:
        raise OpError("one_hot: num_classes must be given for an empty tensor")
    if ids.size and int(ids.min()) < 0:
        raise OpError(f"one_hot: ids must not be negative, got {int(ids.min())}")
    if num_classes == -1:
        num_classes = int(ids.max()) + 1
    elif ids.size and int(ids.max()) >= num_classes:
        raise OpError(f"one_hot: id {int(ids.max())} does not fit {num_classes} classes")
    xp = tensor.device.xp
    return wrap((ids[..., None] == xp.arange(num_classes)).astype(np.int64), tensor.device)


def pad(input, pad, mode="constant", value=None):
    """Pad (or with negative widths crop) the last dimensions: (before last, after last, before second last, ...).
    mode "constant", "reflect", "replicate" or "circular"."""
    if mode == "constant":
        return pad_constant(input, pad, value or 0)
    if mode not in ("reflect", "replicate", "circular"):
        raise OpError(f"pad: mode must be constant, reflect, replicate or circular, got {mode!r}")
    if value is not None:
        raise OpError(f"pad: mode {mode!r} takes no value")
    if len(pad) % 2 or not len(pad) // 2 < input.ndim <= len(pad) // 2 + 2:
        raise OpError(
            f"pad: {input.shape}: mode {mode!r} pads the last {len(pad) // 2} dimensions of a tensor with 1 or 2 more"
        )
    x = input
    kinds = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    for i in range(len(pad) // 2):
        dim, before, after = x.ndim - 1 - i, pad[2 * i], pad[2 * i + 1]
        n = x.shape[dim]
        most = n - 1 if mode == "reflect" else n
        if mode != "replicate" and max(before, after) > most:
            raise OpError(f"pad: {x.shape}: {mode} pads dimension {dim} by at most {most}, got {(before, after)}")
        index, crop = np.arange(n), (max(-before, 0), max(-after, 0))
        if mode == "circular":  # what is cropped does not come back
            index = index[crop[0] : n - crop[1]]
        index = np.pad(index, (max(before, 0), max(after, 0)), mode=kinds[mode])
        if mode != "circular":
            index = index[crop[0] : len(index) - crop[1]]
        x = x.index_select(dim, wrap(x.device.asarray(index), x.device))
    return x


def normalize(input, p=2.0, dim=1, eps=1e-12):
    """x / max(norm_p(x), eps) along `dim`."""
    return input / input.norm(p, dim, keepdim=True).clamp(min=eps)


def cosine_similarity(x1, x2, dim=1, eps=1e-8):
    """Cosine of the angle between vectors along `dim`; norms below eps count as eps."""
    a, b = operands(x1, x2)
    size = np.broadcast_shapes(a.shape, b.shape)
    a, b = a.expand(size), b.expand(size)
    return ((a / a.norm(2, dim, keepdim=True).clamp(min=eps)) * (b / b.norm(2, dim, keepdim=True).clamp(min=eps))).sum(
        dim
    )


# ---- attention -------------------------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """softmax(scale q k^T + mask) v for q (..., H, T, d), k (..., H, S, d), v (..., H, S, e); scale 1 / sqrt(d).
    attn_mask: bool (True may be looked at) or added to the scores, broadcast to (..., T, S). is_causal hides what
    comes later. enable_gqa: k and v have H / groups heads. dropout_p always applies, as in PyTorch."""
    q, k, v = to_half((query, key, value)) if modes.autocast else (query, key, value)
    name = "scaled_dot_product_attention"
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise OpError(f"{name}: q {q.shape}, k {k.shape}, v {v.shape}: need (..., T, d), (..., S, d), (..., S, e)")
    if len({t.array.dtype for t in (q, k, v)}) > 1:
        raise OpTypeError(f"{name}: dtypes differ: {q.dtype}, {k.dtype}, {v.dtype}")
    if is_causal and attn_mask is not None:
        raise OpError(f"{name}: give attn_mask or is_causal, not both")
    ops.check_probability(name, dropout_p)
    require_floating(name, q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None and q.shape[-1] else 1.0 if scale is None else scale
    grouped = enable_gqa and q.shape[-3] != k.shape[-3]
    if grouped and (q.shape[-3] % k.shape[-3] or k.shape[-3] != v.shape[-3]):
        raise OpError(f"{name}: {q.shape[-3]} query heads are not a multiple of {k.shape[-3]} key heads")
    heads = -3 if grouped else -2  # sizes before this one broadcast
    lead = np.broadcast_shapes(q.shape[:heads], k.shape[:heads], v.shape[:heads])
    q, k, v = (t if t.shape[:heads] == lead else t.expand(*lead, *t.shape[heads:]) for t in (q, k, v))
    lead = q.shape[:-2]
    identity = default_generator(q.device).next_stream() if dropout_p else None
    if attn_mask is not None:
        if attn_mask.dtype != bool:
            attn_mask = cast(attn_mask, q.dtype)
        attn_mask = attn_mask.expand(np.broadcast_shapes(attn_mask.shape, (*lead, q.shape[-2], k.shape[-2])))
    if ops.LEVEL == "composed" or (is_tensor(attn_mask) and attn_mask.requires_grad) or not q.numel() * k.numel():
        if grouped:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        keep = None
        if identity is not None:
            keep = apply(ops.Dropout, q.new_ones(*lead, q.shape[-2], k.shape[-2]), p=dropout_p, identity=identity)
        return composed.attention(q, k, v, attn_mask, is_causal, scale, keep)
    # (batch, heads, T, d): all leading sizes but the last are the batch
    batch = math.prod(lead[:-1])
    shaped = [
        t.reshape(batch, *(t.shape[-3:] if t.ndim > 2 else (1, *t.shape))) if t.ndim != 4 else t for t in (q, k, v)
    ]
    if attn_mask is not None:
        shaped.append(attn_mask.reshape(batch, -1, *attn_mask.shape[-2:]))
    out = apply(ops.Attention, *shaped, causal=is_causal, scale=scale, p=dropout_p, identity=identity)
    return out if q.ndim == 4 else out.reshape(*lead, q.shape[-2], v.shape[-1])
