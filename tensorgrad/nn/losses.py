"""Losses, under torch.nn.functional's names. reduction is "mean", "sum" or "none" (the losses one by one)."""

import math

from .. import dtypes
from ..engine import apply, modes
from ..errors import OpError
from ..ops import nn as ops
from ..ops.common import cast, operands, require_floating, to_single


def _reduce(name, loss, reduction):
    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise OpError(f"{name}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return loss.mean() if reduction == "mean" else loss.sum()


def _weighted(name, loss, weight, reduction):
    if weight is None:
        return _reduce(name, loss, reduction)
    if weight.shape != loss.shape:
        raise OpError(f"{name}: weight must have the input's shape {loss.shape}, got {weight.shape}")
    loss = loss * weight
    return loss.sum() / weight.sum() if reduction == "mean" else _reduce(name, loss, reduction)


def _no_old_spelling(name, size_average, reduce):
    if size_average is not None or reduce is not None:
        raise OpError(f"{name}: size_average and reduce are not offered; use reduction")


def mse_loss(input, target, reduction="mean", weight=None):
    """(x - y)^2; with a weight per element, mean divides by the sum of the weights."""
    input, target = to_single(input, target)
    return _weighted("mse_loss", (input - target).square(), weight, reduction)


def l1_loss(input, target, reduction="mean", weight=None):
    """|x - y|; with a weight per element, mean divides by the sum of the weights."""
    input, target = to_single(input, target)
    return _weighted("l1_loss", (input - target).abs(), weight, reduction)


def smooth_l1_loss(input, target, reduction="mean", beta=1.0):
    """0.5 d^2 / beta where d = |x - y| < beta, else d - beta / 2."""
    input, target = to_single(input, target)
    if beta < 0:
        raise OpError(f"smooth_l1_loss: beta must not be negative, got {beta}")
    d = (input - target).abs()
    if beta == 0:
        return _reduce("smooth_l1_loss", d, reduction)
    return _reduce("smooth_l1_loss", (d < beta)._select(d * d * (0.5 / beta), d - 0.5 * beta), reduction)


def _class_rows(name, input, target):
    """input (n, C) and target (n) from (C), (n, C) or (n, C, d1, ...), and the shape of an unreduced loss."""
    shape = input.shape
    if input.ndim < 1:
        raise OpError(f"{name}: the input needs a dimension of classes")
    if input.ndim == 1:
        expected = ()
        rows = input.unsqueeze(0)
    else:
        expected = (shape[0], *shape[2:])
        rows = input if input.ndim == 2 else input.movedim(1, -1).reshape(math.prod(expected), shape[1])
    if target.shape != expected:
        raise OpError(f"{name}: input {shape} needs a target of shape {expected}, got {target.shape}")
    return rows, target.reshape(-1), expected


def nll_loss(input, target, weight=None, ignore_index=-100, reduction="mean"):
    """-input[target] for log-probabilities (n, C) or (n, C, d1, ...); mean is weighted by the classes' weights."""
    input, target = to_single(input, target)
    ops.check_ids("nll_loss", target)
    rows, ids, shape = _class_rows("nll_loss", input, target)
    counted = ids != ignore_index
    safe = ids.masked_fill(~counted, 0)
    if weight is not None and weight.shape != rows.shape[1:]:
        raise OpError(f"nll_loss: weight must have shape {rows.shape[1:]}, got {weight.shape}")
    picked = -rows.gather(1, safe.unsqueeze(1)).squeeze(1)
    share = counted.to(rows.dtype) if weight is None else weight.index_select(0, safe).masked_fill(~counted, 0.0)
    loss = picked.masked_fill(~counted, 0.0) * share
    if reduction == "mean":
        return loss.sum() / share.sum()
    return _reduce("nll_loss", loss.reshape(shape), reduction)


def cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
):
    """-log softmax(logits)[target] for logits (n, C), (C) or (n, C, d1, ...). `target` holds class ids (the rows with
    ignore_index do not count) or probabilities of the input's shape."""
    _no_old_spelling("cross_entropy", size_average, reduce)
    if not 0 <= label_smoothing <= 1:
        raise OpError(f"cross_entropy: label_smoothing must lie between 0 and 1, got {label_smoothing}")
    require_floating("cross_entropy", input)
    if dtypes.is_floating(target.dtype):
        return _soft_cross_entropy(input, target, weight, reduction, label_smoothing)
    rows, ids, shape = _class_rows("cross_entropy", input, target)
    if weight is None and not label_smoothing and rows.array.size and ops.LEVEL != "composed":
        loss = apply(ops.CrossEntropy, rows, ids, ignore_index=ignore_index)  # float32 where the logits have 16 bits
        if loss.dtype != rows.dtype and not modes.autocast:
            loss = cast(loss, rows.dtype)
        if reduction == "mean":
            return loss.sum() / (ids != ignore_index).sum().to(loss.dtype)  # nan where nothing counts, as in PyTorch
        return _reduce("cross_entropy", loss.reshape(shape), reduction)
    rows = to_single(rows)[0]
    logp = rows.log_softmax(1)
    hard = nll_loss(logp, ids, weight, ignore_index, reduction)
    if not label_smoothing:
        return hard.reshape(shape) if reduction == "none" else hard
    counted = ids != ignore_index
    smooth = -(logp if weight is None else logp * weight).sum(1).masked_fill(~counted, 0.0)
    if reduction == "mean":
        share = (
            counted.to(rows.dtype)
            if weight is None
            else weight.index_select(0, ids.masked_fill(~counted, 0)).masked_fill(~counted, 0.0)
        )
        smooth = smooth.sum() / share.sum()
    else:
        smooth = _reduce("cross_entropy", smooth, reduction)
    loss = hard * (1 - label_smoothing) + smooth * (label_smoothing / rows.shape[1])
    return loss.reshape(shape) if reduction == "none" else loss


def _soft_cross_entropy(input, target, weight, reduction, label_smoothing):
    """The target is a distribution over the classes."""
    if target.shape != input.shape:
        raise OpError(f"cross_entropy: probabilities must have the input's shape {input.shape}, got {target.shape}")
    input, target = to_single(input, target)
    dim = 0 if input.ndim == 1 else 1
    classes = input.shape[dim]
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / classes
    logp = input.log_softmax(dim)
    if weight is not None:
        logp = logp * weight.reshape((-1,) + (1,) * (input.ndim - dim - 1))
    loss = -(logp * target).sum(dim)
    if reduction == "mean":
        return loss.sum() * (1 / n if (n := input.array.size // max(classes, 1)) else math.nan)
    return _reduce("cross_entropy", loss, reduction)


def binary_cross_entropy_with_logits(
    input, target, weight=None, size_average=None, reduce=None, reduction="mean", pos_weight=None
):
    """-(pos_weight y log sigmoid(x) + (1 - y) log(1 - sigmoid(x))), without overflow."""
    _no_old_spelling("binary_cross_entropy_with_logits", size_average, reduce)
    input, target = to_single(input, target)
    if target.shape != input.shape:
        raise OpError(
            f"binary_cross_entropy_with_logits: target {target.shape} must have the input's shape {input.shape}"
        )
    log_p = -(-input).logaddexp(input.new_zeros(()))  # log(1 - sigmoid(x)) = log sigmoid(x) - x
    if pos_weight is None:
        loss = (1 - target) * input - log_p
    else:
        loss = (1 - target) * input - (1 + (pos_weight - 1) * target) * log_p
    return _reduce("binary_cross_entropy_with_logits", loss if weight is None else loss * weight, reduction)


def kl_div(input, target, size_average=None, reduce=None, reduction="mean", log_target=False):
    """target (log target - input) for log-probabilities `input`; 0 where target is 0. reduction "batchmean" divides by
    the first size."""
    _no_old_spelling("kl_div", size_average, reduce)
    input, target = to_single(input, target)
    if log_target:
        loss = target.exp() * (target - input)
    else:
        a, b = operands(input, target)
        zero = b == 0
        loss = (b * b.masked_fill(zero, 1.0).log()) - b * a
    if reduction == "batchmean":
        return loss.sum() / input.shape[0] if input.ndim else loss.sum()
    return _reduce("kl_div", loss, reduction)
