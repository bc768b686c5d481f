"""Fused operations between the products of a transformer block: gates, rotations of queries and keys."""

from ..engine import Op, apply
from . import composed
from .nn import Fused, best


class Swiglu(Fused):
    """silu(gate) * value, of two tensors or of the halves of one's last dimension."""

    def forward(ctx, x, value=None):
        ctx.save(*((x,) if value is None else (x, value)))
        gate, value = _gate_and_value(x, value)
        y = best(ctx, gate).swiglu(ctx.xp, gate, value)
        return y.reshape(*x.shape[:-1], gate.shape[1])

    def define(ctx, x, value=None):
        return composed.swiglu(*(x.chunk(2, -1) if value is None else (x, value)))

    def gradient(ctx, saved, g):
        gradients = [ctx.xp.empty(a.shape, a.dtype) for a in saved]
        gate, value = _gate_and_value(*saved)
        rows = g.reshape(gate.shape)
        best(ctx, gate).swiglu_backward(ctx.xp, gate, value, rows, *_gate_and_value(*gradients))
        return gradients


def _gate_and_value(x, value=None):
    """Both as matrices (n, width)."""
    rows = x.reshape(-1, x.shape[-1])
    if value is not None:
        return rows, value.reshape(rows.shape)
    half = rows.shape[1] // 2
    return rows[:, :half], rows[:, half:]


class Relu2(Fused):
    """max(0, x)^2."""

    def forward(ctx, x):
        ctx.save(x)
        return best(ctx, x).relu2(ctx.xp, x)

    def define(ctx, x):
        return composed.relu2(x)

    def gradient(ctx, saved, g):
        return [best(ctx, g).relu2_backward(ctx.xp, *saved, g)]


class Rotary(Op):
    """Each of `xs` (..., T, d), inputs before the tables cos and sin, turned by its positions' angles; linear, so the
    gradient is the transposed map, which for ordinary tables turns back."""

    fresh = True

    def forward(ctx, *arrays, adjoint=False):
        *xs, cos, sin = arrays
        ctx.adjoint = adjoint
        ctx.save(cos, sin)
        return tuple(best(ctx, x).rotary(ctx.xp, x, cos, sin, adjoint) for x in xs)

    def backward(ctx, *gradients):
        given = [g for g in gradients if g is not None]
        turned = iter(apply(Rotary, *given, *ctx.saved, adjoint=not ctx.adjoint))
        return *(None if g is None else next(turned) for g in gradients), None, None
