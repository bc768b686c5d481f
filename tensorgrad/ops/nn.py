"""Operations of neural networks that run as one routine of `kernels/` each way."""

from weakref import ref

from .. import dtypes
from ..engine import Op, apply, modes, wrap
from ..errors import OpError, OpTypeError
from ..kernels import LEVEL as LEVEL
from ..kernels import routines
from ..walk import run_backward
from . import composed
from .common import cast, dim_index, is_tensor, take_saved


def best(ctx, x):
    """The best module of routines for the array `x` on this operation's device."""
    return routines(ctx.device, x.dtype)


class Alias(Op):
    """x itself, as a node of its own."""

    def forward(ctx, x):
        return x.view()

    def backward(ctx, g):
        return g


class Fused(Op):
    """An operation whose gradient is computed on arrays. It saves its inputs first; `define(*inputs)` is its composed
    definition, which takes over under create_graph; `gradient(saved, g)` returns arrays for the inputs."""

    fresh = True

    def define(ctx, *inputs):
        raise TypeError(f"{ctx.name} has no composed definition")

    def gradient(ctx, saved, g):
        raise TypeError(f"{ctx.name} has no gradient")

    def backward(ctx, g):
        saved = ctx.saved
        if modes.grad:
            return ctx._define_backward(saved, g)
        arrays = ctx.gradient([None if s is None else s.array for s in saved], g.array)
        return tuple(None if a is None else wrap(a, ctx.device) for a in arrays)

    def _define_backward(ctx, saved, g):
        # a tensor may stand in several places: through aliases each place gets its own gradient
        inputs = [None if t is None else apply(Alias, t) for t in saved[: len(ctx.parents)]]
        out = ctx.define(*inputs)
        wanted = {t.node for t in inputs if t is not None and t.node is not None}
        found = run_backward([(out.node, g)], True, True, wanted, stop=True)
        return tuple(None if t is None or t.node is None else found.get(t.node) for t in inputs)


class Linear(Fused):
    """x (..., in) @ weight (out, in)^T + bias. `half`: the weight as 16-bit array, where x has 16 bits and weight and
    bias more; their gradients keep the width."""

    summed = None  # (weak reference to a gradient, its writes, its sums over rows), from the activation behind

    def forward(ctx, x, weight, bias=None, half=None):
        ctx.half = half
        ctx.save(*((x, weight) if bias is None else (x, weight, bias)))
        if weight.ndim != 2 or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError("x must end in the weight's second size, the bias have its first")
        y = best(ctx, x).linear(
            ctx.xp, x.reshape(-1, x.shape[-1]), weight if half is None else half, bias
        )
        return y.reshape(*x.shape[:-1], weight.shape[0])

    def define(ctx, *inputs):
        return composed.linear(*(t.to(inputs[0].dtype) for t in inputs))

    @property
    def wants_sums(ctx):
        """Is there a bias whose gradient is wanted, the sums over the rows of this node's gradient?"""
        return len(ctx.parents) == 3 and ctx.parents[2] is not None

    def backward(ctx, g):
        (known, writes, sums), ctx.summed = ctx.summed or (None, 0, None), None
        ctx.sums = sums if known is not None and known() is g and writes == g.version()[0] else None
        return super().backward(g)

    def gradient(ctx, saved, g):
        x, weight = saved[:2]
        rows = x.reshape(-1, weight.shape[1])
        into, needs = ctx.direct(1), ctx.needs
        if ctx.sums is not None:
            needs[2] = False
        dx, dw, db = best(ctx, x).linear_backward(
            ctx.xp,
            rows,
            weight if ctx.half is None else ctx.half,
            g.reshape(-1, weight.shape[0]),
            needs,
            into,
        )
        db, ctx.sums = db if ctx.sums is None else ctx.sums, None
        return (None if dx is None else dx.reshape(x.shape), dw, db)[: len(ctx.parents)]


class Activation(Fused):
    """A nonlinearity. Where it stands behind a linear layer and its device's routine (with `sums`) adds up the rows of
    the gradient on the way, the layer gets the sums, its bias's gradient, together with the gradient; it need not be
    read again for them."""

    def differentiate(ctx, routine, *arguments):
        """What the routine of this name returns; its sums are kept for `backward`."""
        routines, layer = best(ctx, arguments[0]), ctx.parents[0]
        run = getattr(routines, routine)
        behind = len(ctx.parents) == 1 and layer.__class__ is Linear and layer.wants_sums
        if not behind or not getattr(routines, "SUMS_COLUMNS", False):
            return run(ctx.xp, *arguments)
        result, ctx.sums = run(ctx.xp, *arguments, sums=True)
        return result

    def backward(ctx, g):
        ctx.sums = None
        result = super().backward(g)
        if ctx.sums is not None:
            ctx.parents[0].summed = ref(result[0]), result[0].version()[0], ctx.sums
            ctx.sums = None
        return result


class Gelu(Activation):
    def forward(ctx, x, approximate):
        ctx.approximate = approximate
        y = best(ctx, x).gelu(ctx.xp, x, approximate)
        ctx.save(x, y)
        return y

    def define(ctx, x):
        return composed.gelu(x, ctx.approximate)

    def gradient(ctx, saved, g):
        return [ctx.differentiate("gelu_backward", *saved, g, ctx.approximate)]


class Silu(Activation):
    def forward(ctx, x):
        ctx.save(x)
        return best(ctx, x).silu(ctx.xp, x)

    def define(ctx, x):
        return composed.silu(x)

    def gradient(ctx, saved, g):
        return [ctx.differentiate("silu_backward", *saved, g)]


class Relu(Op):
    def forward(ctx, x):
        y = ctx.xp.maximum(x, 0)
        ctx.save(y)
        return y

    def backward(ctx, g):
        (y,) = ctx.saved
        return g * wrap((y.array > 0).astype(g.array.dtype), ctx.device)


class Softmax(Op):
    def forward(ctx, x, dim):
        ctx.dim = dim
        y = best(ctx, x).softmax(ctx.xp, x, dim)
        ctx.save(y)
        return y

    def backward(ctx, g):
        (y,) = ctx.saved
        if not modes.grad:
            return wrap(best(ctx, g.array).softmax_backward(ctx.xp, y.array, g.array, ctx.dim), ctx.device)
        return y * (g - (g * y).sum(ctx.dim, keepdim=True))


class LogSoftmax(Op):
    def forward(ctx, x, dim):
        ctx.dim = dim
        y = best(ctx, x).log_softmax(ctx.xp, x, dim)
        ctx.save(y)
        return y

    def backward(ctx, g):
        (y,) = ctx.saved
        if not modes.grad:
            return wrap(best(ctx, g.array).log_softmax_backward(ctx.xp, y.array, g.array, ctx.dim), ctx.device)
        return g - y.exp() * g.sum(ctx.dim, keepdim=True)


class LayerNorm(Fused):
    """Over the last dimension of x (..., width); weight and bias (width) or absent."""

    def forward(ctx, x, *affine, eps):
        ctx.eps = eps
        weight, bias = (*affine, None, None)[:2]
        rows = x.reshape(-1, x.shape[-1])
        y, mean, rstd = best(ctx, x).layer_norm(ctx.xp, rows, weight, bias, eps)
        ctx.save(x, *affine, mean, rstd)
        return y.reshape(x.shape)

    def define(ctx, *inputs):
        return composed.layer_norm(*inputs, eps=ctx.eps)

    def gradient(ctx, saved, g):
        x, *affine, mean, rstd = saved
        rows, grows = x.reshape(-1, x.shape[-1]), g.reshape(-1, x.shape[-1])
        weight = affine[0] if affine else None
        dx, dw, db = best(ctx, x).layer_norm_backward(ctx.xp, rows, weight, mean, rstd, grows, bool(affine))
        return (dx.reshape(x.shape), dw, db)[: 1 + len(affine)]


class RMSNorm(Fused):
    """Over the last dimension of x (..., width); weight (width) or absent."""

    name = "rms_norm"

    def forward(ctx, x, *affine, eps):
        ctx.eps = eps
        rows = x.reshape(-1, x.shape[-1])
        y, rstd = best(ctx, x).rms_norm(ctx.xp, rows, affine[0] if affine else None, eps)
        ctx.save(x, *affine, rstd)
        return y.reshape(x.shape)

    def define(ctx, *inputs):
        return composed.rms_norm(*inputs, eps=ctx.eps)

    def gradient(ctx, saved, g):
        x, *affine, rstd = saved
        rows, grows = x.reshape(-1, x.shape[-1]), g.reshape(-1, x.shape[-1])
        weight = affine[0] if affine else None
        dx, dw = best(ctx, x).rms_norm_backward(ctx.xp, rows, weight, rstd, grows, bool(affine))
        return (dx.reshape(x.shape), dw)[: 1 + len(affine)]


class CrossEntropy(Fused):
    """Loss per row of logits (n, classes) for target (n)."""

    def forward(ctx, logits, target, ignore_index):
        ctx.ignore_index = ignore_index
        classes = logits.shape[1]
        ctx.device.check_range("cross_entropy: target", target, classes, f"{classes} classes", ignore_index)
        loss, lse, counted = best(ctx, logits).cross_entropy(ctx.xp, logits, target, ignore_index)
        ctx.save(logits, target, lse, counted)
        return loss

    def define(ctx, logits, target):
        return composed.cross_entropy(logits, target, ctx.ignore_index)

    def backward(ctx, g):
        if modes.grad:
            return super().backward(g)
        others = [saved.array for saved in ctx.saved[1:]]
        out = take_saved(ctx, 0)  # the gradient takes the logits' place, where nobody else can see them
        logits = ctx._saved[0][0] if out is None else out
        dx = best(ctx, logits).cross_entropy_backward(ctx.xp, logits, *others, g.array, out)
        return wrap(dx, ctx.device), None


class Embedding(Fused):
    """Rows of weight by ids; the gradient of row `padding` stays zero."""

    def forward(ctx, weight, ids, padding):
        ctx.padding, ctx.rows = padding, weight.shape[0]
        ctx.save(ids)
        ctx.device.check_range("embedding: id", ids, len(weight), f"a table of {len(weight)} rows")
        return best(ctx, weight).embedding(ctx.xp, weight, ids)

    def backward(ctx, g):
        (ids,) = ctx.saved
        width = g.shape[-1]
        if modes.grad:
            rows = g.reshape(-1, width)
            if ctx.padding is not None:
                rows = rows.masked_fill(ids.reshape(-1, 1) == ctx.padding, 0.0)
            return g.new_zeros(ctx.rows, width).index_add(0, ids.reshape(-1), rows), None
        into = ctx.direct(0) if ctx.padding is None else None
        grad = best(ctx, g.array).embedding_backward(
            ctx.device, ids.array.reshape(-1), g.array.reshape(-1, width), ctx.rows, into
        )
        if ctx.padding is not None:
            grad[ctx.padding] = 0
        return None if into else wrap(grad, ctx.device), None


class Dropout(Op):
    """Zero with probability p, the rest scaled by 1 / (1 - p); linear, so its gradient is itself on the same stream."""

    fresh = True

    def forward(ctx, x, p, identity):
        ctx.p, ctx.identity = p, identity
        return best(ctx, x).dropout(ctx.device, x, p, identity)

    def backward(ctx, g):
        return apply(Dropout, g, p=ctx.p, identity=ctx.identity)


class Attention(Fused):
    """softmax(scale q k^T + mask) v for q (B, H, T, d), k (B, G, S, d), v (B, G, S, e), H a multiple of G."""

    def forward(ctx, q, k, v, *mask, causal, scale, p, identity):
        ctx.options = (causal, scale, p, identity)
        ctx.scores_shape = (*q.shape[:-1], k.shape[-2])
        out, kept = best(ctx, q).attention(ctx.device, q, k, v, mask[0] if mask else None, *ctx.options)
        ctx.save(q, k, v, *mask, *kept)
        return out

    def define(ctx, q, k, v, mask=None):
        causal, scale, p, identity = ctx.options
        keep = None
        if identity is not None:
            keep = apply(Dropout, q.new_ones(ctx.scores_shape), p=p, identity=identity)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) if t.shape[1] != q.shape[1] else t for t in (k, v))
        return composed.attention(q, k, v, mask, causal, scale, keep)

    def gradient(ctx, saved, g):
        q, k, v, *rest = saved
        mask = len(ctx.parents) - 3
        grads = best(ctx, q).attention_backward(ctx.device, q, k, v, rest[mask:], *ctx.options, g)
        return *grads, *(None for _ in range(mask))


class ActivationMethods:
    """The neural-network functions that PyTorch also has as methods."""

    def relu(self):
        """max(0, x); gradient 0 at 0."""
        return apply(Relu, self)

    def softmax(self, dim, *, dtype=None):
        """exp(x) / sum(exp(x)) along `dim`."""
        return _normalise(self, dim, dtype, Softmax, composed.softmax)

    def log_softmax(self, dim, *, dtype=None):
        """log of softmax, computed without overflow."""
        return _normalise(self, dim, dtype, LogSoftmax, composed.log_softmax)


def _normalise(x, dim, dtype, op, definition):
    if dtype is not None:
        x = cast(x, dtypes.as_dtype(dtype))
    if not dtypes.is_floating(x.array.dtype):
        raise OpTypeError(f"{op.name}: needs a floating dtype, got {x.array.dtype}; pass dtype=tg.float32")
    dim = dim_index(dim, x.array.ndim)
    if not x.array.ndim:
        return _normalise(x.reshape(1), 0, None, op, definition).reshape(())
    if x.array.shape[dim] == 0:
        return x.clone()
    return definition(x, dim) if LEVEL == "composed" else apply(op, x, dim=dim)


def check_ids(name, ids):
    if not is_tensor(ids) or ids.array.dtype.kind not in "iu":
        got = ids.array.dtype if is_tensor(ids) else type(ids).__name__
        raise OpTypeError(f"{name}: ids must be an integer tensor, got {got}")


def check_probability(name, p):
    if not 0 <= p <= 1:
        raise OpError(f"{name}: the probability must lie between 0 and 1, got {p}")
