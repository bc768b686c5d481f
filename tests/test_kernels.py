"""Every fused routine at every level against the float64 composed definition: values, gradients, layouts, extremes."""

import math

import numpy as np
import pytest
from kernel_oracle import (
    CPU,
    LAYOUTS,
    LEVELS,
    SHAPES,
    TOLERANCE,
    close,
    composed,
    laid,
    level,
    unchanged,
    use_threads,
)

from tensorgrad.kernels import blas, products
from tensorgrad.ops import composed as definitions

EACH_SHAPE = [(*shape, "contiguous") for shape in SHAPES] + [
    (*shape, layout) for shape in ((7, 13), (301, 257)) for layout in LAYOUTS[1:]
]
rows_and_layouts = pytest.mark.parametrize("rows, width, layout", EACH_SHAPE)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture(params=LEVELS)
def kernels(request, monkeypatch):
    use_threads(monkeypatch, 2)
    return level(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def normal(rng, shape, dtype, layout="contiguous", scale=1.0):
    return laid((rng.standard_normal(shape) * scale).astype(dtype), layout)


# --- elementwise ------------------------------------------------------------------------------------------------------

ACTIVATIONS = ("none", "tanh", "silu")


def activation(kernels, kind, x, g):
    """(y, dx) of gelu ("none", "tanh") or silu."""
    if kind == "silu":
        return unchanged(kernels.silu, np, x), unchanged(kernels.silu_backward, np, x, g)
    y = unchanged(kernels.gelu, np, x, kind)
    return y, unchanged(kernels.gelu_backward, np, x, y, g, kind)


def check_activation(kernels, kind, x, g):
    y, dx = activation(kernels, kind, x, g)
    definition = definitions.silu if kind == "silu" else lambda t: definitions.gelu(t, kind)
    want, (dwant,) = composed(definition, [x], g)
    close(y, want, x.dtype, "y")
    close(dx, dwant, x.dtype, "dx")


@pytest.mark.parametrize("kind", ACTIVATIONS)
@each_dtype
@rows_and_layouts
def test_activations(kernels, kind, dtype, rows, width, layout, rng):
    check_activation(
        kernels, kind, normal(rng, (rows, width), dtype, layout, 3), normal(rng, (rows, width), dtype, layout)
    )


@pytest.mark.parametrize("kind", ACTIVATIONS)
@each_dtype
def test_activations_of_scalars_and_many_dimensions(kernels, kind, dtype, rng):
    for shape in ((), (0,), (2, 3, 5), (3, 41, 5, 63)):
        x, g = (np.array(rng.standard_normal(shape), dtype) for _ in range(2))
        check_activation(kernels, kind, x, g)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@each_dtype
@pytest.mark.parametrize("n", [9, 70003])
def test_activations_of_extremes(kernels, kind, dtype, n, rng):
    """Zeros of both signs, the smallest numbers, and magnitudes at which exp overflows; each also among its own kind,
    where nothing large hides an error."""
    values = [0.0, -0.0, 1e-38, -1e-38, 1e-45, 1e-6, -1e-6, 5.0, -5.0, 12.0, -12.0, 90.0, -90.0, 1e4, -1e4, 1e9, -1e9]
    for value in values:
        with np.errstate(over="ignore", under="ignore"):
            x, g = np.full(n, value, dtype), np.ones(n, dtype)
            y, dx = activation(kernels, kind, x, g)
            definition = definitions.silu if kind == "silu" else lambda t: definitions.gelu(t, kind)
            want, (dwant,) = composed(definition, [x[:1]], g[:1])
        tolerance, least = TOLERANCE[x.dtype], float(np.finfo(dtype).smallest_subnormal)
        assert np.abs(y - want[0]).max() <= tolerance * (min(1, abs(float(x[0]))) + abs(want[0])) + least, value
        assert np.abs(dx - dwant[0]).max() <= tolerance * (1 + abs(dwant[0])), value


@each_dtype
@rows_and_layouts
def test_add(kernels, dtype, rows, width, layout, rng):
    a, b = (normal(rng, (rows, width), dtype, layout) for _ in range(2))
    np.testing.assert_array_equal(unchanged(kernels.add, a, b), a + b)
    want = a + b
    assert kernels.add(a, b, out=a) is a
    np.testing.assert_array_equal(a, want)


@each_dtype
def test_add_broadcasts(kernels, dtype, rng):
    a, b = normal(rng, (300, 257), dtype), normal(rng, (257,), dtype)
    np.testing.assert_array_equal(kernels.add(a, b), a + b)
    want = a + b
    np.testing.assert_array_equal(kernels.add(a, b, out=a), want)


# --- softmax, norms ---------------------------------------------------------------------------------------------------


def check_softmax(kernels, x, g, dim):
    for name in ("softmax", "log_softmax"):
        y = unchanged(getattr(kernels, name), np, x, dim)
        dx = unchanged(getattr(kernels, f"{name}_backward"), np, y, g, dim)
        want, (dwant,) = composed(getattr(definitions, name), [x], g, dim=dim)
        close(y, want, x.dtype, name)
        close(dx, dwant, x.dtype, f"{name}_backward")


@each_dtype
@rows_and_layouts
def test_softmax(kernels, dtype, rows, width, layout, rng):
    check_softmax(kernels, normal(rng, (rows, width), dtype, layout, 4), normal(rng, (rows, width), dtype), 1)


@each_dtype
@pytest.mark.parametrize("shape, dim", [((9,), 0), ((70001,), 0), ((300, 301), 0), ((4, 130, 150), 1), ((7, 3, 5), 0)])
def test_softmax_along_any_dimension(kernels, dtype, shape, dim, rng):
    check_softmax(kernels, normal(rng, shape, dtype), normal(rng, shape, dtype), dim)


@each_dtype
@pytest.mark.parametrize("rows", [3, 1001])
def test_softmax_of_extremes(kernels, dtype, rows, rng):
    """Logits far beyond exp's range, and -inf, which gives probability 0; a row of nothing but -inf gives nan."""
    x, g = normal(rng, (rows, 67), dtype, scale=1e4), normal(rng, (rows, 67), dtype)
    check_softmax(kernels, x, g, 1)
    x = normal(rng, (rows, 67), dtype)
    x[rng.random(x.shape) < 0.3] = -np.inf
    x[:, 5], x[1], x[2] = 0.0, 0.0, -3e38
    check_softmax(kernels, x, g, 1)
    assert not kernels.softmax(np, x, 1)[x == -np.inf].any()
    x[0] = -np.inf
    with np.errstate(invalid="ignore"):
        y = kernels.softmax(np, x, 1)
    assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@each_dtype
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_is_not_hidden(kernels, dtype, bad, rng):
    """One number that is not finite makes its row nan, and no other."""
    x, g = normal(rng, (301, 67), dtype), normal(rng, (301, 67), dtype)
    x[5, 3] = bad
    loss = kernels.cross_entropy(np, x, np.zeros(301, np.int64), -100)[0]
    for row in (kernels.softmax(np, x, 1), kernels.log_softmax(np, x, 1), loss[:, None]):
        assert np.isnan(row[5]).any() and np.isfinite(row[:5]).all() and np.isfinite(row[6:]).all()
    for y in (kernels.softmax(np, x, 1), kernels.log_softmax(np, x, 1)):
        backward = kernels.softmax_backward if y[0].sum() > 0 else kernels.log_softmax_backward
        dx = backward(np, y, g, 1)
        assert np.isnan(dx[5]).any() and np.isfinite(dx[:5]).all() and np.isfinite(dx[6:]).all()


def affine_of(rng, kind, width, dtype):
    """(weight, bias) that the kind has, None else."""
    weight, bias = (rng.uniform(0.5, 2, 2 * width) * rng.choice([-1, 1], 2 * width)).astype(dtype).reshape(2, width)
    return {"both": (weight, bias), "weight": (weight, None), "none": (None, None)}[kind]


def check_norm(kernels, kind, x, g, weight, bias, eps=1e-5):
    affine = weight is not None
    if kind == "layer":
        y, mean, rstd = unchanged(kernels.layer_norm, np, x, weight, bias, eps)
        grads = unchanged(kernels.layer_norm_backward, np, x, weight, mean, rstd, g, affine)
        definition, inputs = definitions.layer_norm, [x, weight, bias]
    else:
        y, rstd = unchanged(kernels.rms_norm, np, x, weight, eps)
        grads = unchanged(kernels.rms_norm_backward, np, x, weight, rstd, g, affine)
        definition, inputs = definitions.rms_norm, [x, weight]
    want, dwant = composed(definition, inputs, g, eps=eps)
    close(y, want, x.dtype, "y")
    if not affine:
        assert all(d is None for d in grads[1:])
    for got, expected, name in zip(grads, dwant, ("dx", "dweight", "dbias"), strict=False):
        if name == "dx" and x.shape[1] == 1:  # (nearly) 0 by cancellation of terms of this size
            assert np.abs(got - expected).max() <= TOLERANCE[x.dtype] * np.abs(g * rstd).max() * 2
        else:
            close(got, expected, x.dtype, name)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@each_dtype
@rows_and_layouts
def test_norms(kernels, kind, affine, dtype, rows, width, layout, rng):
    x, g = normal(rng, (rows, width), dtype, layout, 3), normal(rng, (rows, width), dtype, layout)
    check_norm(kernels, kind, x, g, *affine_of(rng, affine, width, dtype))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@each_dtype
@rows_and_layouts
def test_norms_of_a_sum(kernels, kind, dtype, rows, width, layout, rng):
    """The sum's own gradient is added to what comes through the norm."""
    x, r, g, gtotal = (normal(rng, (rows, width), dtype, layout) for _ in range(4))
    weight, bias = affine_of(rng, "none" if width == 257 else "both", width, dtype)
    affine = [weight] if kind == "rms" else [weight, bias]
    definition = definitions.layer_norm if kind == "layer" else definitions.rms_norm
    y, *statistics, total = unchanged(getattr(kernels, f"add_{kind}_norm"), np, x, r, *affine, 1e-5)
    np.testing.assert_array_equal(total, x + r)
    want, dwant = composed(definition, [total, *affine], g, eps=1e-5)
    close(y, want, dtype, "y")
    grads = unchanged(getattr(kernels, f"add_{kind}_norm_backward"), np, total, weight, *statistics, g, gtotal,
                      weight is not None)
    if width == 1:  # what comes through the norm is (nearly) 0 by cancellation
        off = np.abs(grads[0] - gtotal - dwant[0]).max(initial=0)
        assert off <= TOLERANCE[x.dtype] * (np.abs(g * statistics[-1]).max() * 2 + np.abs(gtotal).max())
    else:
        close(grads[0], dwant[0] + gtotal, dtype, "dx")
    for got, expected in zip(grads[1:], dwant[1:], strict=False):
        close(got, expected, dtype, "daffine")


@pytest.mark.parametrize("kind", ["layer", "rms"])
@each_dtype
def test_norms_of_strided_weights_and_zeros(kernels, kind, dtype, rng):
    weight, bias = laid(normal(rng, (2, 96), dtype), "every other")
    x, g = normal(rng, (700, 96), dtype), normal(rng, (700, 96), dtype)
    x[3] = 0  # eps alone divides
    check_norm(kernels, kind, x, g, weight, bias if kind == "layer" else None)


# --- losses, embedding ------------------------------------------------------------------------------------------------


def check_cross_entropy(kernels, x, target, g, ignore_index=-100):
    loss, lse, counted = unchanged(kernels.cross_entropy, np, x, target, ignore_index)
    dx = unchanged(kernels.cross_entropy_backward, np, x, target, lse, counted, g)
    place = x.copy()
    assert kernels.cross_entropy_backward(np, place, target, lse, counted, g, place) is place
    want, (dwant,) = composed(definitions.cross_entropy, [x, target], g, ignore_index=ignore_index)
    close(loss, want, x.dtype, "loss")
    close(dx, dwant, x.dtype, "dx")
    close(place, dwant, x.dtype, "dx in place")
    ignored = target == ignore_index
    assert not loss[ignored].any() and not dx[ignored].any()


@pytest.mark.parametrize("ignore_index", [-100, 0])
@each_dtype
@rows_and_layouts
def test_cross_entropy(kernels, dtype, rows, width, layout, ignore_index, rng):
    target = rng.integers(0, width, rows)
    target[rng.random(rows) < 0.3] = ignore_index
    x = normal(rng, (rows, width), dtype, layout, 4)
    check_cross_entropy(kernels, x, target, rng.random(rows).astype(dtype), ignore_index)


@each_dtype
@pytest.mark.parametrize("rows", [3, 501])
def test_cross_entropy_of_extremes(kernels, dtype, rows, rng):
    """Large logits, -inf where the target is not, every row ignored, int32 and strided targets, a broadcast g."""
    target, g = rng.integers(0, 131, rows), normal(rng, (rows,), dtype)
    check_cross_entropy(kernels, normal(rng, (rows, 131), dtype, scale=1e4), target, g)
    x = normal(rng, (rows, 131), dtype)
    x[:, 7] = -np.inf
    target[target == 7] = 8  # the loss is infinite there
    check_cross_entropy(kernels, x, target, g)
    check_cross_entropy(kernels, normal(rng, (rows, 131), dtype), np.full(rows, -100), g)
    x = normal(rng, (rows, 131), dtype)
    check_cross_entropy(kernels, x, target.astype(np.int32), g)
    check_cross_entropy(kernels, x, laid(target, "every other"), np.broadcast_to(g[:1], (rows,)))


@each_dtype
@pytest.mark.parametrize("table", [1, 256, 257, 1000])
@pytest.mark.parametrize("n, width", [(0, 8), (1, 1), (37, 5), (4001, 33), (300, 259)])
def test_embedding_backward(kernels, dtype, table, n, width, rng):
    ids = rng.integers(0, max(1, table // 2), n)  # each row several times, and rows that nobody asks for
    for layout in LAYOUTS:
        g = normal(rng, (n, width), dtype, layout)
        grad = unchanged(kernels.embedding_backward, CPU, ids, g, table)
        want = composed(definitions.embedding, [np.zeros((table, width)), ids], g)[1][0]
        close(grad, want, dtype)
    close(kernels.embedding_backward(CPU, ids.astype(np.int32), g, table), want, dtype)


# --- products ---------------------------------------------------------------------------------------------------------

LINEAR = [(0, 3, 5), (1, 1, 1), (1, 130, 700), (37, 41, 43), (513, 129, 65), (65, 129, 511), (5, 0, 4)]


@each_dtype
@pytest.mark.parametrize("n, inner, outer", LINEAR)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear(kernels, dtype, n, inner, outer, layout, rng):
    x, weight = normal(rng, (n, inner), dtype, layout), normal(rng, (outer, inner), dtype, layout)
    bias, g = normal(rng, (outer,), dtype, layout), normal(rng, (n, outer), dtype, layout)
    for b in (None, bias):
        inputs = [x, weight] if b is None else [x, weight, b]
        want, dwant = composed(definitions.linear, inputs, g)
        close(unchanged(kernels.linear, np, x, weight, b), want, dtype, "y")
        for needs in ((True,) * 3, (True, False, False), (False, True, True), (False, False, True)):
            grads = unchanged(kernels.linear_backward, np, x, weight, g, needs[: len(inputs)])
            for got, expected, need in zip(grads, dwant, needs, strict=False):
                if need:
                    close(got, expected, dtype)
                else:
                    assert got is None


@each_dtype
@pytest.mark.parametrize(
    "a, b",
    [((3, 4), (4, 5)), ((0, 4), (4, 5)), ((3, 0), (0, 5)), ((1, 70), (70, 601)), ((65, 129), (129, 511)),
     ((513, 129), (129, 257)),
     ((2, 3, 4), (2, 4, 5)), ((0, 3, 4), (0, 4, 5)), ((9, 65, 63), (9, 63, 129)), ((6, 1, 64, 65), (5, 65, 127)),
     ((129, 200), (3, 200, 67)), ((4, 2, 100, 80), (1, 2, 80, 90)), ((1, 2, 300, 80), (1, 2, 80, 300))],
)
def test_matmul(kernels, dtype, a, b, rng):
    kinds = (*LAYOUTS, "swapped")
    for left, right in [*zip(kinds, kinds, strict=True), *zip(kinds, kinds[::-1], strict=True)]:
        x = swapped(rng, a, dtype) if left == "swapped" else normal(rng, a, dtype, left)
        y = swapped(rng, b, dtype) if right == "swapped" else normal(rng, b, dtype, right)
        want = np.matmul(x.astype(np.float64), y.astype(np.float64))
        close(unchanged(kernels.matmul, np, x, y), want, dtype, f"{left} @ {right}")


def swapped(rng, shape, dtype):
    """A matrix of this shape whose columns are contiguous."""
    return normal(rng, (*shape[:-2], shape[-1], shape[-2]), dtype).swapaxes(-1, -2)


@each_dtype
@pytest.mark.parametrize("n, k, m", [(5, 7, 3), (0, 4, 4), (4, 0, 4), (1, 9, 1), (300, 131, 257), (33, 3000, 65)])
def test_products_into_existing_arrays(dtype, n, k, m, rng, monkeypatch):
    """gemm, product and run_pair write into `out`, a part of a larger array, or add to it, and touch nothing else."""
    use_threads(monkeypatch, 2)
    for layout in ("contiguous", "transposed", "columns", "every other"):
        for place in ("contiguous", "columns", "transposed"):
            a, b = normal(rng, (n, k), dtype, layout), normal(rng, (k, m), dtype, layout)
            want = a.astype(np.float64) @ b
            for accumulate in (False, True):
                out, other = (laid(np.ones((n, m), dtype), place) for _ in range(2))
                blas.gemm(a, b, out, accumulate)
                products.run_pair((a, b, other, accumulate), (b.T, a.T, pair := np.ones((m, n), dtype), accumulate))
                for got in (out, other, pair.T):
                    close(got, want + accumulate, dtype, f"{layout} into {place}")
                if place == "columns" and out.base is not None:
                    assert np.isnan(out.base).sum() == 3 * n
                products.product(a, b, out, accumulate=True)
                close(out, 2 * want + accumulate, dtype, "product")


@pytest.mark.parametrize("n, k, m", [(1, 768, 3072), (15, 768, 3072), (16, 768, 3072), (768, 128, 512),
                                     (384, 768, 128)])
def test_parts_of_a_product(monkeypatch, n, k, m):
    """They cover the result, the last, the calling thread's, is longer by what waking the others takes, but for few
    rows: there the weights' size is the work, and they are shared alike."""
    use_threads(monkeypatch, 2)
    a, b, out = (np.zeros(shape, np.float32) for shape in ((n, k), (k, m), (n, m)))
    parts = products.split_product(a, b, out)
    assert len(parts) == 2
    for left, right, target, add in parts:
        assert left.shape == (target.shape[0], k) and right.shape == (k, target.shape[1]) and not add
        target += 1
    assert (out == 1).all()
    first, last = (target.size * k for _, _, target, _ in parts)
    lead, unit = (0 if n < 16 else products.GRAIN), 32 * k * min(n, m)
    assert lead - unit <= last - first <= lead + unit


def test_gemm_names_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"gemm: \(2, 3\) @ \(4, 5\)"):
        blas.gemm(np.ones((2, 3)), np.ones((4, 5)), np.ones((2, 5)))


# --- optimizer --------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("n", [0, 1, 7, 5001, 65536, 200003])
@pytest.mark.parametrize("weight_decay, scale", [(0.0, 1.0), (0.1, 1.0), (0.1, 0.3), (0.0, 1e-25)])
def test_adamw(kernels, dtype, n, weight_decay, scale, rng):
    lr, (beta1, beta2), eps = 1e-2, (0.9, 0.95), 1e-8
    p = normal(rng, (n,), dtype)
    want = p.astype(np.float64)
    m, v = np.zeros(n, dtype), np.zeros(n, dtype)
    m64, v64 = np.zeros(n), np.zeros(n)
    for step in range(1, 5):
        g = normal(rng, (n,), dtype) * dtype((step != 3) / scale)  # the third gradient is 0
        g[: n // 7] = 0  # and these are 0 always: 0 / (sqrt(0) + eps)
        unchanged(lambda g, step=step: kernels.adamw(np, p, g, m, v, lr=lr, betas=(beta1, beta2), eps=eps,
                                                     weight_decay=weight_decay, step=step,
                                                     **({} if scale == 1 else {"grad_scale": scale})), g)
        g = g.astype(np.float64) * scale
        want *= 1 - lr * weight_decay
        m64 = beta1 * m64 + (1 - beta1) * g
        v64 = beta2 * v64 + (1 - beta2) * g**2
        want -= lr * (m64 / (1 - beta1**step)) / (np.sqrt(v64 / (1 - beta2**step)) + eps)
    for got, expected, name in ((p, want, "p"), (m, m64, "exp_avg"), (v, v64, "exp_avg_sq")):
        close(got, expected, dtype, name)


@each_dtype
@pytest.mark.parametrize("n", [0, 1, 65535, 65537, 300001])
@pytest.mark.parametrize("step", [1, 2])
def test_sum_of_squares_and_scale(kernels, dtype, n, step, rng):
    x = normal(rng, (n * step,), dtype)[::step]
    want = math.fsum(float(v) ** 2 for v in x)
    total = unchanged(kernels.sum_of_squares, np, x)
    assert abs(float(total) - want) <= (2e-6 if dtype == np.float32 else 1e-13) * want
    expected = x * dtype(0.3)
    kernels.scale(np, x, 0.3)
    np.testing.assert_array_equal(x, expected)


def test_sum_of_squares_of_16_bit_numbers_does_not_overflow(kernels):
    total = float(kernels.sum_of_squares(np, np.full(100_001, 300, np.float16)))
    assert total == pytest.approx(100_001 * 300**2, rel=1e-6)
