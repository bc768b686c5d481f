"""What stands between a block's products, at every level, against float64 composed mathematics: gates and rotations."""

import numpy as np
import pytest
from kernel_oracle import LAYOUTS, LEVELS, SHAPES, TOLERANCE, close, composed, laid, level, unchanged, use_threads

import tensorgrad as tg
from tensorgrad.nn import functional as F
from tensorgrad.ops import composed as definitions

each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])
EACH_SHAPE = [(*shape, "contiguous") for shape in SHAPES] + [
    (*shape, layout) for shape in ((7, 13), (301, 257)) for layout in LAYOUTS[1:]
]
rows_and_layouts = pytest.mark.parametrize("rows, width, layout", EACH_SHAPE)


@pytest.fixture(params=LEVELS)
def kernels(request, monkeypatch):
    use_threads(monkeypatch, 2)
    return level(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def normal(rng, shape, dtype, layout="contiguous", scale=1.0):
    return laid((rng.standard_normal(shape) * scale).astype(dtype), layout)


# --- gates ------------------------------------------------------------------------------------------------------------


def check_swiglu(kernels, gate, value, g, dgate, dvalue):
    """Forward and backward, the gradients written into the two arrays given."""
    y = unchanged(kernels.swiglu, np, gate, value)
    want, dwant = composed(definitions.swiglu, [gate, value], g)
    close(y, want, gate.dtype, "y")
    before = gate.copy(), value.copy(), g.copy()
    kernels.swiglu_backward(np, gate, value, g, dgate, dvalue)
    for a, b in zip((gate, value, g), before, strict=True):
        np.testing.assert_array_equal(a, b)
    for got, expected, name in zip((dgate, dvalue), dwant, ("dgate", "dvalue"), strict=True):
        close(got, expected, gate.dtype, name)


@each_dtype
@rows_and_layouts
def test_swiglu_of_two(kernels, dtype, rows, width, layout, rng):
    gate, value, g = (normal(rng, (rows, width), dtype, layout, 3) for _ in range(3))
    check_swiglu(kernels, gate, value, g, *(laid(np.zeros((rows, width), dtype), layout) for _ in range(2)))


@each_dtype
@pytest.mark.parametrize("rows, width", SHAPES)
def test_swiglu_of_halves(kernels, dtype, rows, width, rng):
    """Gate and value side by side in one array, the gradients too."""
    x, dx = normal(rng, (rows, 2 * width), dtype, scale=3), np.full((rows, 2 * width), np.nan, dtype)
    halves = [a for array in (x, dx) for a in (array[:, :width], array[:, width:])]
    check_swiglu(kernels, *halves[:2], normal(rng, (rows, width), dtype), *halves[2:])


@each_dtype
@pytest.mark.parametrize("n", [9, 70003])
def test_gates_of_extremes(kernels, dtype, n):
    for value in (0.0, -0.0, 1e-30, -1e-30, 12.0, -12.0, 90.0, -90.0, 1e4, -1e4):
        x, ones = np.full((n, 2), value, dtype), np.ones((n, 2), dtype)
        dgate, dvalue = np.empty_like(x), np.empty_like(x)
        with np.errstate(over="ignore", under="ignore"):
            y = kernels.swiglu(np, x, ones)
            kernels.swiglu_backward(np, x, ones, ones, dgate, dvalue)
            want, (wgate, wvalue) = composed(definitions.swiglu, [x[:1], ones[:1]], ones[:1])
        for got, expected in ((y, want), (dgate, wgate), (dvalue, wvalue)):
            assert np.abs(got - expected).max() <= TOLERANCE[x.dtype] * (min(1, abs(value)) + np.abs(expected).max())
        np.testing.assert_array_equal(kernels.relu2(np, x), np.maximum(x, 0) ** 2)


@each_dtype
@rows_and_layouts
def test_relu2(kernels, dtype, rows, width, layout, rng):
    x, g = (normal(rng, (rows, width), dtype, layout) for _ in range(2))
    want, (dwant,) = composed(definitions.relu2, [x], g)
    close(unchanged(kernels.relu2, np, x), want, dtype, "y")
    close(unchanged(kernels.relu2_backward, np, x, g), dwant, dtype, "dx")


@each_dtype
@pytest.mark.parametrize("n", [9, 70003])
def test_nan_is_not_hidden(kernels, dtype, n):
    x = np.ones((n, 2), dtype)
    x[n // 2] = np.nan
    for y in (kernels.relu2(np, x), kernels.relu2_backward(np, x, x), kernels.swiglu(np, x, np.ones_like(x)),
              kernels.swiglu(np, np.ones_like(x), x)):
        np.testing.assert_array_equal(np.isnan(y), np.isnan(x))


# --- rotary positions -------------------------------------------------------------------------------------------------

HEADS = [  # B, H, T, d: nothing, one, odd sizes, and enough for several threads
    (0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (1, 1, 1, 2), (2, 3, 5, 6), (1, 1, 257, 130), (3, 5, 67, 26),
]


def tables(rng, shape, dtype):
    """cos and sin whose halves differ, which a gradient must not mix up."""
    angles = rng.uniform(-4, 4, shape)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def check_rotary(kernels, x, cos, sin, g):
    want, (dwant, *_) = composed(definitions.rotary, [x, cos, sin], g)
    close(unchanged(kernels.rotary, np, x, cos, sin, False), want, x.dtype, "y")
    close(unchanged(kernels.rotary, np, g, cos, sin, True), dwant, x.dtype, "dx")


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_rotary(kernels, dtype, shape, layout, rng):
    x, g = (normal(rng, shape, dtype, layout) for _ in range(2))
    B, _, T, d = shape
    check_rotary(kernels, x, *tables(rng, (T, d), dtype), g)
    check_rotary(kernels, x, *tables(rng, (B, 1, T, d), dtype), g)
    cos, sin = (laid(table, layout) for table in tables(rng, (T, d), dtype))
    check_rotary(kernels, x, cos, sin, g)


@each_dtype
def test_rotary_of_a_packed_projection(kernels, dtype, rng):
    """Heads that lie side by side, and tables that are the beginning of longer ones."""
    packed = normal(rng, (2, 71, 7, 24), dtype).transpose(0, 2, 1, 3)                                  # (B, H, T, d)
    cos, sin = (table[3:74] for table in tables(rng, (90, 24), dtype))
    for x in (packed[:, :4], packed[:, 4:6]):
        check_rotary(kernels, x, cos, sin, normal(rng, x.shape, dtype))


@each_dtype
def test_rotary_of_other_shapes(kernels, dtype, rng):
    """Any number of dimensions, and tables that differ from head to head."""
    for shape, table in (((5, 6), (5, 6)), ((2, 2, 3, 70, 32), (70, 32)), ((2, 9, 70, 32), (9, 70, 32)),
                         ((9, 70, 32), (9, 70, 32)), ((2, 9, 70, 32), (2, 9, 70, 32)), ((2, 4, 70, 32), (1, 32))):
        check_rotary(kernels, normal(rng, shape, dtype), *tables(rng, table, dtype), normal(rng, shape, dtype))


def test_rotary_turns_back_by_the_negative_angle(kernels, rng):
    """With the tables that a model uses, whose halves are equal, the gradient's map undoes the rotation."""
    x = normal(rng, (2, 4, 70, 32), np.float32)
    cos, sin = (np.concatenate([t, t], axis=1) for t in tables(rng, (70, 16), np.float32))
    turned = kernels.rotary(np, x, cos, sin, False)
    np.testing.assert_allclose(kernels.rotary(np, turned, cos, sin, True), x, atol=1e-5)
    np.testing.assert_allclose(kernels.rotary(np, turned, cos, -sin, False), x, atol=1e-5)


def test_rotary_in_the_table_s_precision(kernels, rng):
    """16-bit heads and float32 tables: computed in float32, rounded once."""
    x = normal(rng, (2, 3, 70, 32), np.float16)
    cos, sin = tables(rng, (70, 32), np.float32)
    got, want = kernels.rotary(np, x, cos, sin, False), composed(definitions.rotary, [x, cos, sin])[0]
    assert got.dtype == np.float16
    assert (np.abs(got - want) <= 2.0**-11 * np.abs(want) + 1e-6).all()  # half a unit in the last place


# --- 16 bits ----------------------------------------------------------------------------------------------------------

FUSED = {  # name -> (function of tensors and their shapes)
    "swiglu": (lambda x: F.swiglu(x), [(40, 128)]),
    "swiglu of two": (lambda x, y: F.swiglu(x, y), [(40, 128)] * 2),
    "relu2": (lambda x: F.relu2(x), [(40, 128)]),
    "rotary": (lambda q, k: F.rotary(q, k, tg.full((40, 32), 0.6), tg.full((40, 32), 0.8)), [(2, 3, 40, 32)] * 2),
    "add_layer_norm": (lambda x, r, w: F.add_layer_norm(x, r, (128,), w), [(40, 128), (40, 128), (128,)]),
    "add_rms_norm": (lambda x, r, w: F.add_rms_norm(x, r, (128,), w), [(40, 128), (40, 128), (128,)]),
}


@pytest.mark.parametrize("dtype, digits", [("float16", 2e-3), ("bfloat16", 1.6e-2)])
@pytest.mark.parametrize("name", FUSED)
def test_sixteen_bits_are_rounded_from_float32(name, dtype, digits, rng):
    """Values and gradients of 16-bit tensors, beside those of the same numbers in float32."""
    function, shapes = FUSED[name]
    dtype = getattr(tg, dtype)
    given = [tg.tensor(rng.standard_normal(shape).astype(np.float32)).to(dtype) for shape in shapes]
    found = []
    for inputs in (given, [x.float() for x in given]):
        inputs = [x.detach().requires_grad_() for x in inputs]
        outs = function(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        assert all(out.dtype == inputs[0].dtype for out in outs)
        sum((out.float() * (i + 1)).sum() + out.float().square().sum() for i, out in enumerate(outs)).backward()
        assert all(x.grad.dtype == x.dtype for x in inputs)
        found.append([t.detach().float().numpy() for t in (*outs, *(x.grad for x in inputs))])
    for got, want in zip(*found, strict=True):
        assert np.abs(got - want).max() <= digits * np.abs(want).max()
