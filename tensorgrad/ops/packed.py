"""Linear layers and embeddings over packed weights (kernels/packed.py): gradients flow to x, never to the weight."""

import numpy as np

from ..engine import Op, apply
from ..kernels import packed


class PackedLinear(Op):
    """x (..., in) @ weight (out, in)^T + bias, weight a PackedWeight of the caller's, no input."""

    fresh = True

    def forward(ctx, x, bias=None, *, weight):
        ctx.weight = weight
        out, width = weight.array.shape
        if x.shape[-1:] != (width,) or (bias is not None and bias.shape != (out,)):
            raise ValueError(f"x must end in {width}, the bias have {out} elements")
        y = packed.linear(ctx.device, x.reshape(-1, width), weight.array, weight.scale, bias)
        return y.reshape(*x.shape[:-1], out)

    def backward(ctx, g):
        dx = apply(PackedTransposed, g, weight=ctx.weight) if ctx.parents[0] is not None else None
        if len(ctx.parents) == 1:
            return dx
        return dx, g.reshape(-1, g.shape[-1]).sum(0) if ctx.parents[1] is not None else None


class PackedTransposed(Op):
    """g (..., out) @ weight (out, in): the gradient of PackedLinear, and it of this."""

    fresh = True

    def forward(ctx, g, *, weight):
        ctx.weight = weight
        out, width = weight.array.shape
        dx = packed.linear_transposed(ctx.device, g.reshape(-1, out), weight.array, weight.scale)
        return dx.reshape(*g.shape[:-1], width)

    def backward(ctx, h):
        return apply(PackedLinear, h, weight=ctx.weight)


class PackedEmbedding(Op):
    """Rows of a PackedWeight by ids, float32."""

    def forward(ctx, ids, *, weight):
        rows = weight.array.shape[0]
        if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < rows:
            raise IndexError(f"id {ids.min() if ids.min() < 0 else ids.max()} is out of range for {rows} rows")
        flat, scale = ids.reshape(-1), weight.scale
        vectors = packed.widen(ctx.xp, weight.array[flat], None if scale is None else scale[flat])
        return vectors.reshape(*ids.shape, -1)
