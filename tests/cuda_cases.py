"""What each CUDA kernel has to compute: cases against NumPy in float64, run wherever something can `launch` the kernels
(`Emulator` on a CPU, or a GPU).

A case is a function case(k, rows, width); CASES lists them with the kernels they launch. `k` (a Runner) makes the
arrays, launches and compares. Outputs start as NaN, so what a kernel forgets to write is seen.
"""

import math

import numpy as np
from cuda_runner import Runner, wide

from tensorgrad.kernels.cuda.signatures import adamw_hyper, norm_strips, square_partials, tile_strips
from tensorgrad.kernels.reference import adamw_block, dropout_key, dropout_mask

__all__ = ["CASES", "WITHIN", "Runner"]


# ---- elementwise -----------------------------------------------------------------------------------------------------


def dropout(k, rows, width):
    x, y = k.normal(rows, width, letter="T"), k.empty((rows, width), "T")
    p, identity = 0.3, (77, 5)
    k.launch("dropout", x, y, x.size, *dropout_key(p, identity), 1 / (1 - p))
    kept = dropout_mask(np, x.shape, p, identity)
    k.close(y, np.where(kept, wide(x) / (1 - p), 0), "T")
    assert rows * width < 200 or 0.5 < kept.mean() < 0.9
    k.launch("dropout", x, x, x.size, *dropout_key(p, identity), 1 / (1 - p))
    np.testing.assert_array_equal(x, y)


def note_outside(k, rows, width):
    lowest = np.iinfo(np.int64).min

    def worst(low, high, ignore):
        found = np.full(1, lowest)
        k.launch("note_outside", index, found, index.size, low, high, ignore)
        return found[0]

    index = k.given(k.rng.integers(0, 50, (rows, width)), "int64")
    assert worst(0, 50, 0) == lowest, "all are inside"
    if index.size:
        index[0, 0], index[-1, -1] = -7, -100
        assert [worst(0, 50, n) for n in (-100, -7, 0)] == [-7, -100, -7]
        index[0, 0] = 99
        assert worst(-100, 50, 0) == 99 and worst(-100, 100, 0) == lowest


# ---- activations -----------------------------------------------------------------------------------------------------


def _phi(x):
    return 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))


def _sigmoid(x):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _gelu_tanh_slope(x):
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * (1 + np.tanh(u)) + 0.5 * x / np.cosh(np.clip(u, -300, 300)) ** 2 * math.sqrt(2 / math.pi) * (
        1 + 3 * 0.044715 * x * x
    )


ACTIVATIONS = {
    "gelu": (lambda x: x * _phi(x), lambda x: _phi(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)),
    "gelu_tanh": (
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        _gelu_tanh_slope,
    ),
    "silu": (lambda x: x * _sigmoid(x), lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x)))),
    "relu2": (lambda x: np.maximum(x, 0) ** 2, lambda x: 2 * np.maximum(x, 0)),
}


def _extremes(x, name):
    """Values at which exp overflows; for relu2 what float16 can still square."""
    if x.size:
        x.reshape(-1)[:2] = (200, -200) if name.startswith("relu2") else (1e4, -1e4)


def _finish(k, partial, terms, what):
    """Is the sum of the partial sums that of the rows of `terms`?"""
    width = partial.shape[-1]
    out = k.empty((width,))
    k.launch("column_sum_finish", partial, out, len(partial), width, types=())
    k.close(out, terms.sum(0), scale=np.abs(terms).sum(0).max(initial=0) + 1, what=what)


def activation_forward(k, rows, width):
    value, _ = ACTIVATIONS[k.name.removesuffix("_forward")]
    x, y = k.normal(rows, width, letter="T", scale=3), k.empty((rows, width), "T")
    _extremes(x, k.name)
    k.launch(k.name, x, y, x.size)
    k.close(y, value(wide(x)), "T", scale=1)
    k.launch(k.name, x, x, x.size)
    np.testing.assert_array_equal(x, y)


def activation_backward(k, rows, width):
    _, slope = ACTIVATIONS[k.name.removesuffix("_backward")]
    x, g = k.normal(rows, width, letter="T", scale=3), k.normal(rows, width, letter="T")
    _extremes(x, k.name)
    dx, partial = k.empty((rows, width), "T"), k.empty((tile_strips(rows, width, x.itemsize), width))
    k.launch(k.name, x, g, dx, partial, rows, width)
    want = wide(g) * slope(wide(x))
    k.close(dx, want, "T", scale=10)
    _finish(k, partial, want, "sums")
    k.launch(k.name, x, g, g, None, rows, width)  # in place, without sums
    np.testing.assert_array_equal(g, dx)


def bias_add(k, rows, width):
    x, bias, y = k.normal(rows, width, letter="T"), k.normal(width), k.empty((rows, width), "T")
    k.launch("bias_add", x, bias, y, rows, width)
    k.close(y, wide(x) + wide(bias), "T")
    k.launch("bias_add", x, bias, x, rows, width)
    np.testing.assert_array_equal(x, y)


def column_sum(k, rows, width):
    g = k.normal(rows, width, letter="T")
    partial = k.empty((tile_strips(rows, width, g.itemsize), width))
    k.launch("column_sum", g, partial, rows, width)
    _finish(k, partial, wide(g), "sums")


def swiglu(k, rows, width):
    for packed in (True, False):
        if packed:
            both = k.normal(rows, 2 * width, letter="T", scale=3)
            gate, up, stride = both[:, :width], both[:, width:], 2 * width
            grads = k.empty((rows, 2 * width), "T")
            dgate, dup = grads[:, :width], grads[:, width:]
        else:
            gate, up, stride = k.normal(rows, width, letter="T"), k.normal(rows, width, letter="T"), width
            dgate, dup = k.empty((rows, width), "T"), k.empty((rows, width), "T")
        g, y = k.normal(rows, width, letter="T"), k.empty((rows, width), "T")
        value, slope = ACTIVATIONS["silu"]
        k.launch("swiglu_forward", gate, up, y, rows, width, stride)
        k.close(y, value(wide(gate)) * wide(up), "T")
        partial = k.empty((tile_strips(rows, width, g.itemsize), 2 * width)) if packed else None
        k.launch("swiglu_backward", gate, up, g, dgate, dup, partial, rows, width, stride)
        want = wide(g) * wide(up) * slope(wide(gate)), wide(g) * value(wide(gate))
        k.close(dgate, want[0], "T")
        k.close(dup, want[1], "T")
        if packed:
            _finish(k, partial, np.concatenate(want, 1), "sums")


# ---- norms -----------------------------------------------------------------------------------------------------------


def norm(k, rows, width):
    """Forward and backward, with all optional arguments and with none."""
    centred = k.name.startswith("layer")
    eps = 1e-5
    for full in (True, False):
        x = k.given(k.rng.standard_normal((rows, width)) * 2 + 1, "T")
        branch = k.normal(rows, width, letter="T") if full else None
        weight = k.normal(width) if full else None
        bias = k.normal(width) if full and centred else None
        total = k.empty((rows, width), "T") if full else None
        y, mean, rstd = k.empty((rows, width), "T"), k.empty((rows,)), k.empty((rows,))
        affine, stats = ((weight, bias), (mean, rstd)) if centred else ((weight,), (rstd,))
        prefix = "layer_norm" if centred else "rms_norm"
        k.launch(f"{prefix}_forward", x, branch, *affine, total, y, *stats, rows, width, eps)
        if full:
            k.close(total, wide(x) + wide(branch), "T", what="total")
        else:
            total = x
        t = wide(total)
        centre = t.mean(1, keepdims=True) if centred else np.zeros((rows, 1))
        factor = 1 / np.sqrt(((t - centre) ** 2).mean(1, keepdims=True) + eps)
        xhat = (t - centre) * factor
        w = wide(weight) if full else 1.0
        k.close(y, xhat * w + (wide(bias) if bias is not None else 0), "T", what="y", scale=10)
        k.close(rstd, factor[:, 0], what="rstd")
        if centred:
            k.close(mean, centre[:, 0], what="mean", scale=2)

        g = k.normal(rows, width, letter="T")
        dtotal = k.normal(rows, width, letter="T") if full else None
        dx = k.empty((rows, width), "T")
        partials = [k.empty((norm_strips(rows), width)) if full else None for _ in range(1 + centred)]
        k.launch(f"{prefix}_backward", total, weight, *stats, g, dtotal, dx, *partials, rows, width)
        h = wide(g) * w
        want = h - xhat * (h * xhat).mean(1, keepdims=True) - (h.mean(1, keepdims=True) if centred else 0)
        want = want * factor + (wide(dtotal) if full else 0)
        scale = 10 * (1 + factor.max(initial=0))
        k.close(dx, want, "T", what="dx", scale=scale)
        if full:
            for partial, terms, what in zip(partials, (wide(g) * xhat, wide(g)), ("dweight", "dbias"), strict=False):
                _finish(k, partial, terms, what)


# ---- softmax and cross-entropy ---------------------------------------------------------------------------------------


def softmax(k, rows, width):
    """Causal with and without dropout, with the keys of a longer past, and unmasked; one row sees nothing."""
    queries, scale, p, identity = max(rows, 1), 0.7, 0.25, (3, 9)
    for offset, drop in ((0, False), (0, True), (width - queries, True), (width, False), (-1, False)):
        scores = k.normal(2, rows, width, letter="T", scale=3)
        t = wide(scores) * scale
        hidden = np.arange(width)[None, :] > np.arange(rows)[:, None] + offset
        scores[:, hidden] = np.nan  # never looked at
        key, factor = ((*dropout_key(p, identity), 1 / (1 - p)), 1 / (1 - p)) if drop else ((0, 0, 0, 1), 1)
        dropped = k.empty(scores.shape, "T") if drop else None
        k.launch("softmax_forward", scores, dropped, 2 * rows, queries, width, offset, scale, *key)
        t = np.where(hidden, -np.inf, t)
        top = t.max(-1, keepdims=True, initial=-1e30)
        e = np.exp(t - top)
        total = e.sum(-1, keepdims=True)
        probabilities = e / np.where(total == 0, 1, total)
        k.close(scores, probabilities, "T", what="probabilities", scale=1)
        assert (scores[:, hidden] == 0).all()
        kept = dropout_mask(np, scores.shape, p, identity) * factor if drop else np.ones(scores.shape)
        if drop:
            k.close(dropped, wide(scores) * kept, "T", what="dropped")
        g = k.normal(2, rows, width, letter="T")
        dp = np.where(hidden, 0, wide(g) * kept)
        g[:, hidden] = np.nan
        k.launch("softmax_backward", scores, g, 2 * rows, queries, width, offset, scale, *key)
        want = wide(scores) * (dp - (dp * wide(scores)).sum(-1, keepdims=True)) * scale
        k.close(g, want, "T", what="gradient", scale=3)
        assert (g[:, hidden] == 0).all()


def _with_odd_rows(x):
    """The first rows of x with infinities and NaN: one infinity or NaN, all -inf, all -inf but one NaN; or all -inf but
    the last element."""
    for row, name in zip(x, ("nan", "inf", "-inf", "-inf and nan", "one"), strict=False):
        if name.startswith("-inf") or name == "one":
            row[:-1] = -np.inf
        if name != "one":
            row[-1] = float(name.split()[-1])
    return x


def row_softmax(k, rows, width):
    """Both ways, for softmax and log-softmax, also of rows with infinities and NaN."""
    log = "log" in k.name
    prefix = k.name.removesuffix("_forward")
    for odd in (False, True):
        x, y = k.normal(rows, width, letter="T", scale=3), k.empty((rows, width), "T")
        if odd:
            _with_odd_rows(x)
        k.launch(f"{prefix}_forward", x, y, rows, width)
        with np.errstate(invalid="ignore", divide="ignore"):
            z = wide(x) - wide(x).max(1, keepdims=True, initial=-np.inf)
            total = np.exp(z).sum(1, keepdims=True)
            want = z - np.log(total) if log else np.exp(z) / total
        k.close(y, want, "T", scale=10 if log else 1, what="y")
        if odd:
            assert np.isnan(wide(y)).all(1).sum() == min(rows, 4)
            continue
        g, dx = k.normal(rows, width, letter="T"), k.empty((rows, width), "T")
        k.launch(f"{prefix}_backward", y, g, dx, rows, width)
        y, g = wide(y), wide(g)
        want = g - np.exp(y) * g.sum(1, keepdims=True) if log else y * (g - (g * y).sum(1, keepdims=True))
        k.close(dx, want, "T", scale=np.abs(g).sum(1).max(initial=1), what="dx")


def cross_entropy(k, rows, width):
    """Forward and backward with padded columns, ignored rows, targets that are no class, and a NaN."""
    classes, ignore = max(width - 5, 1), -100
    targets = k.rng.integers(0, classes, rows)
    if rows > 2:
        targets[1], targets[2] = ignore, classes  # the first column of padding
    logits = k.normal(rows, width, letter="T", scale=3)
    logits[:, classes:] = np.nan
    if rows > 3:
        logits[3, classes - 1] = np.nan
    x = wide(logits)[:, :classes]
    counted = (targets >= 0) & (targets < classes)
    top = np.fmax.reduce(x, 1, initial=-np.inf)
    rest = np.log(np.exp(x - top[:, None]).sum(1))
    safe = np.where(counted, targets, 0)
    loss = np.where(counted, top - x[np.arange(rows), safe] + rest, 0)
    slope = np.zeros((rows, width))
    slope[:, :classes] = np.exp(x - top[:, None] - rest[:, None])
    slope[np.arange(rows), safe] -= 1
    slope[~counted] = 0

    got, lse = k.empty((rows,)), k.empty((rows, 2))
    k.launch("cross_entropy_forward", logits, targets, got, lse, rows, classes, width, ignore)
    k.close(got, loss, what="loss", scale=10)
    k.close(lse, np.stack([top, rest], 1), what="lse", scale=10)
    assert np.isnan(got).sum() == (rows > 3)
    for g, stride in ((k.normal(rows), 1), (k.given([0.37]), 0)):
        gradient = k.empty((rows, width), "T")
        k.launch("cross_entropy_backward", logits, targets, lse, g, gradient, rows, classes, width, stride, ignore)
        k.close(gradient, slope * (wide(g)[:, None] if stride else wide(g)), "T", what="gradient", scale=1)
    k.launch("cross_entropy_backward", logits, targets, lse, g, logits, rows, classes, width, stride, ignore)
    np.testing.assert_array_equal(wide(logits), wide(gradient))


# ---- embedding, heads ------------------------------------------------------------------------------------------------


def embedding(k, rows, width):
    vocabulary = 7
    ids = k.rng.integers(0, vocabulary, rows)
    if rows > 2:
        ids[0], ids[2] = vocabulary, -1
    found = (ids >= 0) & (ids < vocabulary)
    table, out = k.normal(vocabulary, width, letter="T"), k.empty((rows, width), "T")
    k.launch("embedding_forward", table, ids, out, rows, width, vocabulary)
    np.testing.assert_array_equal(out, np.where(found[:, None], table[np.where(found, ids, 0)], 0))


def embedding_backward(k, rows, width):
    vocabulary = 7
    ids = k.rng.integers(0, vocabulary, rows)
    if rows > 2:
        ids[0], ids[2] = vocabulary, -1
    found = (ids >= 0) & (ids < vocabulary)
    g, before = k.normal(rows, width, letter="T"), k.normal(vocabulary, width)
    want = wide(before)
    np.add.at(want, ids[found], wide(g)[found])
    order = np.argsort(ids, kind="stable")
    for name, index in (("atomic", (ids,)), ("sorted", (ids[order], order))):
        dtable = k.given(before)
        k.launch(f"embedding_backward_{name}", *index, g, dtable, rows, width, vocabulary)
        k.close(dtable, want, what=name, scale=rows + 1)
        if name == "sorted" and rows:  # the very order of additions
            one = ids[found][0]
            total = before[one].copy()
            for i in np.flatnonzero(ids == one):
                total += g[i].astype(np.float32)
            np.testing.assert_array_equal(dtable[one], total)


def _head_layouts(k, batch, heads, length, dim):
    """Queries in a packed projection, and (batch, heads, length, dim) laid out plainly."""
    packed = k.normal(batch, length, 3, heads, dim, letter="T")
    x = packed[:, :, 1].transpose(0, 2, 1, 3)
    y = k.empty((batch, heads, length, dim), "T")
    strides = [[s // x.itemsize for s in a.strides[:3]] for a in (x, y)]
    return x, y, (batch, heads, length, dim), strides


def heads(k, rows, width):
    dim = width // 2 * 2
    x, y, sizes, (s, t) = _head_layouts(k, 2, 3, rows, dim)
    if k.name == "copy_heads":
        k.launch("copy_heads", x, y, *sizes, *s, *t)
        np.testing.assert_array_equal(y, x)
        x[...] = 0
        k.launch("copy_heads", y, x, *sizes, *t, *s)
        np.testing.assert_array_equal(y, x)
        return
    cos, sin = k.normal(rows, dim), k.normal(rows, dim)  # independent numbers: nothing can be mixed up unseen
    k.launch("rotary", x, cos, sin, y, *sizes, *s, *t, 1.0)
    low, high = np.split(wide(x), 2, -1)
    k.close(y, wide(x) * wide(cos) + np.concatenate([-high, low], -1) * wide(sin), "T", what="forward")
    g = k.normal(*sizes, letter="T")
    dx = k.empty(sizes, "T")
    k.launch("rotary", g, cos, sin, dx, *sizes, *t, *t, -1.0)
    turned = wide(g) * wide(sin)
    low, high = np.split(turned, 2, -1)
    k.close(dx, wide(g) * wide(cos) + np.concatenate([high, -low], -1), "T", what="backward")
    k.launch("rotary", g, cos, sin, g, *sizes, *t, *t, -1.0)
    np.testing.assert_array_equal(g, dx)


# ---- optimizer -------------------------------------------------------------------------------------------------------


def adamw(k, rows, width):
    """Three steps against reference.adamw_block in float64: with clipping, without, and one that is left out."""
    n, decayed = rows * width, rows * width // 3
    p, m, v = k.normal(n), k.given(np.zeros(n)), k.given(np.zeros(n))
    expected = [wide(a) for a in (p, m, v)]
    options = dict(lr=0.02, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for step, clip in ((1, (0.5, 0)), (2, (1, 0)), (3, None)):
        g, shadow = k.normal(n, scale=4), k.empty((n,), "U")
        hyper = k.given(adamw_hyper(**options, step=step, gradient_scale=0.25))
        total = wide(g) * 0.25 * (clip[0] if clip else 1)
        clip = clip and k.given(clip)
        k.launch("adamw", p, g, m, v, shadow, hyper, clip, n, decayed)
        for part, decay in ((slice(0, decayed), 0.1), (slice(decayed, n), 0.0)):
            blocks = [a[part] for a in expected]
            adamw_block(np, blocks[0], total[part], *blocks[1:], np.empty_like(blocks[0]), step=step,
                        **{**options, "weight_decay": decay})  # fmt: skip
        for got, want, what in zip((p, m, v), expected, ("p", "exp_avg", "exp_avg_sq"), strict=True):
            k.close(got, want, what=what)
        k.close(shadow, wide(p), "U", what="shadow")
    before = p.copy()
    for shadow in (None, k.empty((n,), "U")):
        k.launch("adamw", p, g, m, v, shadow, hyper, k.given([1, 1]), n, decayed)
        np.testing.assert_array_equal(p, before)
    k.close(shadow, wide(p), "U", what="shadow")


def unscale(k, rows, width):
    inverse = k.given([0.25])
    for bad in (None, np.inf, -np.inf, np.nan):
        g, found = k.normal(rows, width, letter="T"), np.zeros(1, np.int32)
        if bad and g.size:
            g[-1, -1] = bad
        want = wide(g) * 0.25
        k.launch("unscale", g, inverse, found, g.size)
        k.close(g, want, "T")
        assert found[0] == bool(bad and g.size)


def sum_of_squares(k, rows, width):
    x = k.normal(rows, width, letter="T")
    partial = np.full(square_partials(x.size, x.itemsize), np.nan)
    k.launch("sum_of_squares", x, partial, x.size)
    want = (wide(x) ** 2).sum()
    assert abs(partial.sum() - want) <= 2e-6 * want


CASES = {
    "dropout": dropout,
    "note_outside": note_outside,
    "bias_add": bias_add,
    "column_sum": column_sum,
    "swiglu_forward": swiglu,
    "layer_norm_forward": norm,
    "rms_norm_forward": norm,
    "softmax_forward": softmax,
    "row_softmax_forward": row_softmax,
    "row_log_softmax_forward": row_softmax,
    "cross_entropy_forward": cross_entropy,
    "embedding_forward": embedding,
    "embedding_backward_sorted": embedding_backward,
    "copy_heads": heads,
    "rotary": heads,
    "sum_of_squares": sum_of_squares,
    "unscale": unscale,
    "adamw": adamw,
    **{f"{name}_forward": activation_forward for name in ACTIVATIONS},
    **{f"{name}_backward": activation_backward for name in ACTIVATIONS},
}
WITHIN = {  # kernels that have no case of their own: launched by the case of another one
    "column_sum_finish": "column_sum",
    "swiglu_backward": "swiglu_forward",
    "layer_norm_backward": "layer_norm_forward",
    "rms_norm_backward": "rms_norm_forward",
    "softmax_backward": "softmax_forward",
    "row_softmax_backward": "row_softmax_forward",
    "row_log_softmax_backward": "row_log_softmax_forward",
    "cross_entropy_backward": "cross_entropy_forward",
    "embedding_backward_atomic": "embedding_backward_sorted",
}
