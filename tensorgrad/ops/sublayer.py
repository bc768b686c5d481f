"""A transformer block's sublayers as one operation each: what `kernels/compiled_sublayer.py` computes at once."""

import numpy as np

from . import composed
from .nn import Attention, Fused, best

DEFINITIONS = {
    "gelu": composed.gelu,
    "gelu_tanh": lambda x: composed.gelu(x, "tanh"),
    "silu": composed.silu,
    "relu2": composed.relu2,
    "swiglu": lambda x: composed.swiglu(*x.chunk(2, -1)),
}


class _Sublayer(Fused):
    """Inputs: x (..., in), the two weights, and those biases of theirs that `biased`, two bools, says are there."""

    def backward_with(ctx, routine, saved, g, *others):
        """The inputs' gradients from the routine of this name, which takes x, weights, what forward kept, g, others."""
        kept = len(ctx.parents)
        (x, *weights), needs = saved[:3], ctx.needs
        into, owned = [], []
        for i, weight in enumerate(weights, 1):
            place = ctx.direct(i)
            owned.append(np.empty(weight.shape, weight.dtype) if place is None else None)
            into.append((owned[-1], False) if place is None else place)
        run = getattr(best(ctx, x).sublayer, routine)
        rows, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        dx, biases = run(rows, *weights, *saved[kept:], g, *others, needs[0], into, ctx.biased)
        dx = None if dx is None else dx.reshape(x.shape)
        return [dx, *owned, *(b for b, there in zip(biases, ctx.biased, strict=True) if there)]

    def both(ctx, biases):
        """The two biases, None where there is none."""
        biases = iter(biases)
        return [next(biases) if there else None for there in ctx.biased]


class FeedForward(_Sublayer):
    """activation(x @ up^T + bias) @ down^T + bias."""

    def forward(ctx, x, up, down, *biases, activation, biased):
        ctx.activation, ctx.biased = activation, biased
        rows = x.reshape(-1, x.shape[-1])
        y, h, a = best(ctx, x).sublayer.feed_forward(rows, up, down, *ctx.both(biases), activation)
        ctx.save(x, up, down, *biases, h, a)
        return y.reshape(*x.shape[:-1], -1)

    def define(ctx, x, up, down, *biases):
        up_bias, down_bias = ctx.both(biases)
        return composed.linear(DEFINITIONS[ctx.activation](composed.linear(x, up, up_bias)), down, down_bias)

    def gradient(ctx, saved, g):
        return ctx.backward_with("feed_forward_backward", saved, g, ctx.activation)


class SelfAttention(_Sublayer):
    """attention(x @ qkv^T + bias) @ proj^T + bias for x (B, T, in); options: as Attention's."""

    def forward(ctx, x, qkv, proj, *biases, heads, groups, options, biased):
        ctx.heads, ctx.options, ctx.biased = (heads, groups), options, biased
        rows, both = x.reshape(-1, x.shape[-1]), ctx.both(biases)
        routine = best(ctx, x).sublayer.self_attention
        y, *kept = routine(rows, qkv, proj, *both, x.shape[1], heads, groups, options)
        ctx.save(x, qkv, proj, *biases, *kept)
        return y.reshape(*x.shape[:-1], -1)

    def define(ctx, x, qkv, proj, *biases):
        (heads, groups), (qkv_bias, proj_bias) = ctx.heads, ctx.both(biases)
        packed = composed.linear(x, qkv, qkv_bias)
        each = packed.reshape(*x.shape[:2], heads + 2 * groups, -1).transpose(1, 2)   # (B, H + 2 G, T, d)
        attention = Attention()
        attention.options, attention.scores_shape = ctx.options, (x.shape[0], heads, x.shape[1], x.shape[1])
        y = attention.define(*each.split([heads, groups, groups], 1))                 # (B, H, T, d)
        return composed.linear(y.transpose(1, 2).reshape(*x.shape[:2], -1), proj, proj_bias)

    def gradient(ctx, saved, g):
        return ctx.backward_with("self_attention_backward", saved, g, saved[0].shape[1], *ctx.heads, ctx.options)
