"""Normalisations, under torch.nn.functional's names, and those of a sum, as a residual stream has them."""

import math

import numpy as np

from ..dtypes import float32
from ..engine import apply
from ..errors import OpError
from ..kernels.half import is_half
from ..ops import block, composed
from ..ops import nn as ops


def _normalized(name, input, normalized_shape, *affine):
    """The input with its normalised dimensions as one, and weight and bias (where given) as vectors."""
    shape = tuple(normalized_shape)
    if not shape or input.shape[-len(shape) :] != shape:
        raise OpError(f"{name}: {input.shape} does not end in normalized_shape {shape}")
    for t in affine:
        if t is not None and t.shape != shape:
            raise OpError(f"{name}: weight and bias must have shape {shape}, got {t.shape}")
    given = [t for t in affine if t is not None]
    if len(shape) == 1:
        return input, given
    width = math.prod(shape)
    return input.reshape(*input.shape[: -len(shape)], width), [t.reshape(width) for t in given]


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimensions `normalized_shape` (arXiv:1607.06450)."""
    if bias is not None and weight is None:
        return layer_norm(input, normalized_shape, None, None, eps) + bias
    x, affine = _normalized("layer_norm", input, normalized_shape, weight, bias)
    if ops.LEVEL == "composed" or not x.array.size:
        y = composed.layer_norm(x, *affine, eps=eps)
    else:
        y = apply(ops.LayerNorm, x, *affine, eps=eps)
    return y if x is input else y.reshape(input.shape)


def rms_norm(input, normalized_shape, weight=None, eps=None):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimensions; eps is the dtype's machine epsilon unless given
    (arXiv:1910.07467)."""
    x, affine = _normalized("rms_norm", input, normalized_shape, weight)
    eps = _machine_epsilon(input) if eps is None else eps
    if ops.LEVEL == "composed" or not x.array.size:
        y = composed.rms_norm(x, *affine, eps=eps)
    else:
        y = apply(ops.RMSNorm, x, *affine, eps=eps)
    return y if x is input else y.reshape(input.shape)


def _machine_epsilon(x):
    return float(np.finfo(float32 if is_half(x.array.dtype) else x.array.dtype).eps)


def add_layer_norm(input, residual, normalized_shape, weight=None, bias=None, eps=1e-5):
    """(layer_norm(s), s) of the sum s = input + residual, in one pass each way where both have one shape and dtype."""
    if not _one_pass(input, residual, normalized_shape) or (bias is not None and weight is None):
        total = input + residual
        return layer_norm(total, normalized_shape, weight, bias, eps), total
    _, affine = _normalized("add_layer_norm", input, normalized_shape, weight, bias)
    return apply(block.AddLayerNorm, input, residual, *affine, eps=eps)


def add_rms_norm(input, residual, normalized_shape, weight=None, eps=None):
    """(rms_norm(s), s) of the sum s = input + residual, in one pass each way where both have one shape and dtype."""
    if not _one_pass(input, residual, normalized_shape):
        total = input + residual
        return rms_norm(total, normalized_shape, weight, eps), total
    _, affine = _normalized("add_rms_norm", input, normalized_shape, weight)
    return apply(block.AddRMSNorm, input, residual, *affine, eps=_machine_epsilon(input) if eps is None else eps)


def _one_pass(x, r, normalized_shape):
    return (
        ops.LEVEL != "composed"
        and len(normalized_shape) == 1
        and x.array.shape == r.array.shape
        and x.array.dtype == r.array.dtype
        and x.array.size > 0
    )
