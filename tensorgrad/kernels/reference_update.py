"""Updates of flat arrays, for NumPy and CuPy alike: optimizer steps, gradient norms, sums. Part of reference.py."""

import math
import threading

import numpy as np

from .blocks import BLOCK

__all__ = ["adamw", "adamw_block", "add", "is_one", "scale", "sum_of_squares", "unless", "unscale"]

SUM_BLOCK = 1 << 15  # elements whose squares are added up in float32

# ---- optimizer and gradient norm -------------------------------------------------------------------------------------


def is_one(factor):
    """Is a factor, a number or a 0-d array of a device at which one must not look, known to be 1?"""
    return isinstance(factor, int | float) and factor == 1


def adamw_block(xp, p, grad, exp_avg, exp_avg_sq, scratch, *, lr, betas, eps, weight_decay, step, grad_scale=1.0):
    """One AdamW step on blocks of memory, in place: first p *= 1 - lr * weight_decay, then with m, v = the moving
    averages of g = grad * grad_scale and of g**2, and step = 1, 2, ...

        p -= lr * m / (1 - beta1**step) / (sqrt(v / (1 - beta2**step)) + eps)
    """
    beta1, beta2 = betas
    root = math.sqrt if isinstance(step, int) else xp.sqrt  # of a device's number, at which one must not look
    if weight_decay:
        p *= 1 - lr * weight_decay
    if is_one(grad_scale):
        xp.subtract(grad, exp_avg, out=scratch)
    else:
        xp.multiply(grad, grad_scale, out=scratch)
        scratch -= exp_avg
    scratch *= 1 - beta1
    exp_avg += scratch
    exp_avg_sq *= beta2
    if is_one(grad_scale):
        xp.multiply(grad, grad, out=scratch)
    else:
        xp.multiply(grad, grad_scale, out=scratch)  # before it is squared: what is clipped may be huge
        scratch *= scratch
    scratch *= 1 - beta2
    exp_avg_sq += scratch
    xp.sqrt(exp_avg_sq, out=scratch)
    scratch /= root(1 - beta2**step)
    scratch += eps
    xp.divide(exp_avg, scratch, out=scratch)
    scratch *= lr / (1 - beta1**step)
    p -= scratch


_kept = threading.local()


def _scratch(xp, size, dtype):
    """An array of this thread's own that lives on between calls."""
    kept = _kept.__dict__.setdefault((xp.__name__, dtype.name), None)
    if kept is None or kept.size < size:
        kept = _kept.__dict__[xp.__name__, dtype.name] = xp.empty(size, dtype)
    return kept


def adamw(xp, p, grad, exp_avg, exp_avg_sq, **options):
    """One AdamW step over flat arrays, in place, in blocks that share one scratch array; options as in adamw_block."""
    block = BLOCK if xp is np else p.size
    scratch = _scratch(xp, block, p.dtype)
    for i in range(0, p.size, block):
        part = slice(i, min(i + block, p.size))
        adamw_block(xp, p[part], grad[part], exp_avg[part], exp_avg_sq[part], scratch[: part.stop - i], **options)


def unless(xp, found, arrays, update):
    """Call update(), which changes `arrays` in place, and undo that where `found`, a 0-d array, is set."""
    before = [a.copy() for a in arrays]
    update()
    for a, b in zip(arrays, before, strict=True):
        a[...] = xp.where(found, b, a)


def sum_of_squares(xp, x):
    """The sum of x^2 over a flat array, added up in float64 block by block."""
    total = xp.zeros((), np.float64)
    for i in range(0, x.size, SUM_BLOCK):
        part = x[i : i + SUM_BLOCK]
        part = part if part.dtype.char in "fd" else part.astype(np.float32)
        total += part.dot(part)
    return total


def scale(xp, x, factor):
    """x *= factor, in place."""
    x *= factor


def unscale(xp, x, inverse, found):
    """x *= inverse (0-d, float32), in place, for a flat array; `found` (0-d, int32) becomes 1 where one of its numbers
    was not finite."""
    block = BLOCK if xp is np else x.size
    for i in range(0, x.size, block):
        part = x[i : i + block]
        found |= ~xp.isfinite(part).all()
        xp.multiply(part, inverse, out=part, casting="unsafe")  # 16 bits through float32


def add(a, b, out=None):
    """a + b, or a += b where `out` is a."""
    if out is None:
        return a + b
    out += b  # `out` is a
    return out
