"""A transformer block's sublayers as functions of their weights. At sizes where threads would spend much of the time
waking each other, they are one operation each (extra `fast`); otherwise, and where somebody looks at single operations,
those of which they consist."""

import math

import numpy as np

from ..engine import apply, hooks, modes
from ..errors import OpError
from ..kernels import routines
from ..kernels.precision import get_float32_matmul_precision
from ..ops.sublayer import FeedForward, SelfAttention
from ..random import default_generator
from ..tensor import Tensor
from . import functional as F
from .layers import Linear
from .parameter import Parameter

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": F.relu2,
    "swiglu": F.swiglu,
}


def plain(layer):
    """Is calling this layer F.linear of its weight and bias and nothing else: an nn.Linear, not what wraps one, without
    hooks and unseen by a profile?"""
    return (layer.__class__ is Linear and not layer._forward_hooks and not layer._forward_pre_hooks
            and modes.module_path is None)


def feed_forward(x, up, up_bias, down, down_bias, activation="gelu"):
    """activation(x @ up^T + up_bias) @ down^T + down_bias: (..., in) -> (..., out), weights up (hidden, in) and down
    (out, hidden), biases or None. activation: gelu, gelu_tanh, silu, relu, relu2, or swiglu (whose `up` has twice the
    rows, the gate's and then the value's)."""
    if activation not in ACTIVATIONS:
        raise OpError(f"feed_forward: activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    kernels = _kernels(x, up, up_bias, down, down_bias)
    if kernels is not None and activation in kernels.ACTIVATIONS:
        fits = up.shape[0] == down.shape[1] * (2 if activation == "swiglu" else 1)
        if fits and kernels.pays(x.array.size // x.shape[-1], up.array, down.array):
            biases, biased = _both(up_bias, down_bias)
            return apply(FeedForward, x, up, down, *biases, activation=activation, biased=biased)
    return F.linear(ACTIVATIONS[activation](F.linear(x, up, up_bias)), down, down_bias)


def self_attention(x, qkv, qkv_bias, proj, proj_bias, heads, groups=None, dropout_p=0.0):
    """Causal self-attention of x (B, T, in): scaled_dot_product_attention of x @ qkv^T + qkv_bias, whose rows are the
    queries, keys and values [q | k | v] head by head, then @ proj^T + proj_bias -> (B, T, out). qkv ((heads + 2 groups)
    d, in), proj (out, heads d), biases or None; `groups` key heads (default: heads), each shared by heads / groups."""
    groups = groups or heads
    if x.ndim != 3 or heads % groups or qkv.ndim != 2 or qkv.shape[0] % (heads + 2 * groups):
        raise OpError(f"self_attention: x {x.shape}, qkv {qkv.shape}, {heads} heads, {groups} key heads do not fit: "
                      "need (B, T, in), ((heads + 2 groups) d, in), heads a multiple of groups")
    B, T, _ = x.shape
    size = qkv.shape[0] // (heads + 2 * groups)
    kernels = _kernels(x, qkv, qkv_bias, proj, proj_bias) if 0 <= dropout_p < 1 else None
    fits = kernels is not None and proj.shape[1] == heads * size
    if fits and kernels.attention_pays(B, T, qkv.array, proj.array):
        identity = default_generator(x.device).next_stream() if dropout_p else None
        options, (biases, biased) = (True, 1 / math.sqrt(size), dropout_p, identity), _both(qkv_bias, proj_bias)
        return apply(SelfAttention, x, qkv, proj, *biases, heads=heads, groups=groups, options=options, biased=biased)
    each = F.linear(x, qkv, qkv_bias).view(B, T, heads + 2 * groups, -1).transpose(1, 2)        # (B, H + 2 G, T, d)
    q, k, v = each.split([heads, groups, groups], dim=1)
    y = F.scaled_dot_product_attention(q, k, v, None, dropout_p, True, enable_gqa=groups != heads)   # (B, H, T, d)
    return F.linear(y.transpose(1, 2).reshape(B, T, -1), proj, proj_bias)


def _both(first, second):
    """(those of two biases that are there, which are)"""
    return [bias for bias in (first, second) if bias is not None], (first is not None, second is not None)


def _kernels(x, first, first_bias, second, second_bias):
    """The routines that compute all at once; None where these tensors or the present modes are not for them."""
    if hooks or modes.autocast or x.device.type != "cpu" or get_float32_matmul_precision() == "medium":
        return None
    weights = [t for t in (first, second, first_bias, second_bias) if t is not None]
    for t in (x, *weights):
        if t.__class__ not in (Parameter, Tensor) or t.device is not x.device:
            return None
        if t.array.dtype != np.float32 or not t.array.flags.c_contiguous:
            return None
    if first is second or x.ndim < 2 or first.shape[1:] != x.shape[-1:] or second.ndim != 2:
        return None
    if any(bias is not None and bias.shape != weight.shape[:1]
           for weight, bias in ((first, first_bias), (second, second_bias))):
        return None
    wanted = {t.requires_grad for t in weights}
    if modes.grad and (len(wanted) > 1 or (x.requires_grad and not any(wanted))):  # frozen weights
        return None
    return getattr(routines(x.device, x.array.dtype), "sublayer", None)
