"""Fused operations between the products of a transformer block: gates, rotations of queries and keys, norms of sums."""

from ..engine import Op, apply, modes, wrap
from . import composed
from .nn import Activation, Fused, best


class Swiglu(Activation):
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
        ctx.differentiate("swiglu_backward", gate, value, rows, *_gate_and_value(*gradients))
        return gradients


def _gate_and_value(x, value=None):
    """Both as matrices (n, width)."""
    rows = x.reshape(-1, x.shape[-1])
    if value is not None:
        return rows, value.reshape(rows.shape)
    half = rows.shape[1] // 2
    return rows[:, :half], rows[:, half:]


class Relu2(Activation):
    """max(0, x)^2."""

    def forward(ctx, x):
        ctx.save(x)
        return best(ctx, x).relu2(ctx.xp, x)

    def define(ctx, x):
        return composed.relu2(x)

    def gradient(ctx, saved, g):
        return [ctx.differentiate("relu2_backward", *saved, g)]


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


class _AddNorm(Fused):
    """(norm(x + r), x + r) of x, r (..., width), weight and perhaps bias (width) or neither. Of the two inputs only the
    sum is saved; its own gradient is added in the same pass."""

    fresh = False  # both summands get the same array

    def forward(ctx, x, r, *affine, eps):
        ctx.eps = eps
        rows = [a.reshape(-1, a.shape[-1]) for a in (x, r)]
        y, *statistics, total = ctx.normalise(*rows, affine)
        total = total.reshape(x.shape)
        ctx.save(total, *affine, *statistics)
        return y.reshape(x.shape), total

    def backward(ctx, g, gtotal):
        count = len(ctx.parents) - 2  # of weight and bias
        if g is None:
            return gtotal, gtotal, *[None] * count
        saved = ctx.saved
        if modes.grad:
            dx, *others = ctx._define_backward(saved[: 1 + count], g)
            dx = dx if gtotal is None else dx + gtotal
            return dx, dx, *others
        total, *others = (t.array for t in saved)
        width = total.shape[-1]
        rows, grows = total.reshape(-1, width), g.array.reshape(-1, width)
        weight = others[0] if count else None
        more = None if gtotal is None else gtotal.array.reshape(-1, width)
        dx, *affine = ctx.differentiate(rows, weight, others[count:], grows, more, bool(count))
        dx = wrap(dx.reshape(total.shape), ctx.device)
        return dx, dx, *(wrap(a, ctx.device) for a in affine[:count])


class AddLayerNorm(_AddNorm):
    def normalise(ctx, x, r, affine):
        weight, bias = (*affine, None, None)[:2]
        return best(ctx, x).add_layer_norm(ctx.xp, x, r, weight, bias, ctx.eps)

    def define(ctx, *inputs):
        return composed.layer_norm(*inputs, eps=ctx.eps)

    def differentiate(ctx, total, weight, statistics, g, more, affine):
        if more is None:
            return best(ctx, g).layer_norm_backward(ctx.xp, total, weight, *statistics, g, affine)
        return best(ctx, g).add_layer_norm_backward(ctx.xp, total, weight, *statistics, g, more, affine)


class AddRMSNorm(_AddNorm):
    name = "add_rms_norm"

    def normalise(ctx, x, r, affine):
        return best(ctx, x).add_rms_norm(ctx.xp, x, r, affine[0] if affine else None, ctx.eps)

    def define(ctx, *inputs):
        return composed.rms_norm(*inputs, eps=ctx.eps)

    def differentiate(ctx, total, weight, statistics, g, more, affine):
        if more is None:
            return best(ctx, g).rms_norm_backward(ctx.xp, total, weight, *statistics, g, affine)
        return best(ctx, g).add_rms_norm_backward(ctx.xp, total, weight, *statistics, g, more, affine)
