"""Attention and dropout at every level: against float64 composed mathematics, over sizes around the tile, grouped
queries, packed projections and masks; the dropped elements are the same everywhere."""

import math

import numpy as np
import pytest
from kernel_oracle import CPU, LAYOUTS, LEVELS, TOLERANCE, close, composed, laid, level, unchanged, use_threads

from tensorgrad.kernels import reference
from tensorgrad.ops import composed as definitions

IDENTITY = (123, 5)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture(params=LEVELS)
def kernels(request, monkeypatch):
    use_threads(monkeypatch, 2)
    return level(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def definition(q, k, v, mask, causal, scale, keep):
    """composed.attention with keys and values repeated for the query heads that share them."""
    share = q.shape[1] // k.shape[1]
    return definitions.attention(
        q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), mask, causal, scale, keep
    )


def check(kernels, q, k, v, g, causal=False, mask=None, p=0.0, tolerance=None):
    """Forward and gradients; returns the gradients."""
    identity, scale = (IDENTITY if p else None), 1 / math.sqrt(q.shape[-1])
    out, kept = unchanged(kernels.attention, CPU, q, k, v, mask, causal, scale, p, identity)
    grads = unchanged(kernels.attention_backward, CPU, q, k, v, kept, causal, scale, p, identity, g)
    keep = None
    if p:
        keep = reference.dropout_mask(np, (*q.shape[:3], k.shape[2]), p, identity) / (1 - p)
    want, dwant = composed(
        lambda q, k, v, m, keep: definition(q, k, v, m, causal, scale, keep), [q, k, v, mask, keep], g
    )
    close(out, want, q.dtype, "out", tolerance)
    for got, expected, name in zip(grads, dwant, ("dq", "dk", "dv"), strict=False):
        if name != "dv" and q.size and np.abs(expected).max() < 1e-4 * (terms := gradient_terms(q, k, v, g, scale)):
            # (nearly) 0 because what is subtracted from each other cancels
            assert np.abs(got - expected).max() <= (tolerance or TOLERANCE[q.dtype]) * terms, name
        else:
            close(got, expected, q.dtype, name, tolerance)
    return grads


def gradient_terms(q, k, v, g, scale):
    """The size of what dq and dk are sums and differences of."""
    return scale * max(np.abs(q).max(), np.abs(k).max()) * np.abs(v).max() * np.abs(g).max()


def inputs(rng, dtype, B, H, G, T, S, d, e, layout="contiguous"):
    """q, k, v, g."""
    shapes = (B, H, T, d), (B, G, S, d), (B, G, S, e), (B, H, T, e)
    return [laid(rng.standard_normal(shape).astype(dtype), layout) for shape in shapes]


SIZES = [  # B, H, G, T, S, d, e
    (1, 1, 1, 1, 1, 1, 1), (2, 3, 3, 5, 5, 8, 8), (2, 2, 2, 63, 63, 7, 7), (1, 4, 2, 64, 64, 16, 16),
    (2, 4, 1, 65, 65, 16, 5), (1, 6, 3, 129, 129, 8, 8), (2, 2, 2, 1, 77, 8, 8), (2, 4, 2, 33, 130, 8, 3),
    (1, 2, 1, 130, 33, 8, 8), (1, 3, 3, 200, 70, 4, 4), (3, 2, 2, 65, 1, 4, 4),
    (2, 6, 2, 190, 131, 8, 5), (2, 4, 2, 131, 190, 8, 8),
]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [True, False])
@each_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention(kernels, dtype, sizes, causal, p, rng):
    check(kernels, *inputs(rng, dtype, *sizes), causal=causal, p=p)


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_strided_inputs(kernels, dtype, layout, causal, rng):
    check(kernels, *inputs(rng, dtype, 2, 4, 2, 67, 67, 8, 8, layout), causal=causal)
    q, k, v, g = inputs(rng, dtype, 2, 2, 2, 66, 66, 8, 8)
    check(kernels, q[::-1], k, np.broadcast_to(v[:1], v.shape), np.broadcast_to(g[:, :, :1], g.shape), causal=causal)


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_attention_of_a_packed_projection(kernels, heads, groups, p, rng):
    """q, k and v as views into one (B, T, (H + 2 G) d); the compiled level's gradients lie in one such array again."""
    B, T, d = 2, 70, 8
    packed = rng.standard_normal((B, T, heads + 2 * groups, d)).astype(np.float32).transpose(0, 2, 1, 3)
    q, k, v = np.split(packed, [heads, heads + groups], axis=1)
    g = rng.standard_normal(q.shape).astype(np.float32)
    dq, dk, dv = check(kernels, q, k, v, g, causal=True, p=p)
    if kernels.__name__.endswith("compiled_all"):
        assert dq.base is dk.base is dv.base and dq.base.flags.c_contiguous
        assert dq.base.shape == (B, T, heads + 2 * groups, d)
        rows = dq.base.transpose(0, 2, 1, 3)
        for part, got in zip(np.split(rows, [heads, heads + groups], axis=1), (dq, dk, dv), strict=True):
            np.testing.assert_array_equal(part, got)


@each_dtype
@pytest.mark.parametrize("T, S", [(5, 7), (66, 66)])
def test_attention_masks(kernels, dtype, T, S, rng):
    """Bool and added masks; a query that may look at nothing gives zeros and no gradient."""
    q, k, v, g = inputs(rng, dtype, 2, 4, 4, T, S, 8, 8)
    mask = rng.random((2, 4, T, S)) < 0.7
    mask[:, :, 3] = False
    check(kernels, q, k, v, g, mask=mask)
    scale = 1 / math.sqrt(8)
    out, kept = kernels.attention(CPU, q, k, v, mask, False, scale, 0.0, None)
    dq = kernels.attention_backward(CPU, q, k, v, kept, False, scale, 0.0, None, g)[0]
    assert not out[:, :, 3].any() and not dq[:, :, 3].any()
    check(kernels, q, k, v, g, mask=np.where(mask, rng.standard_normal(mask.shape), -np.inf).astype(dtype))


@each_dtype
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_attention_with_large_scores(kernels, dtype, causal, scale, rng):
    """Scores of 100 and 10,000, whose own rounding is what the tolerance allows; queries of zero look at all alike."""
    q, k, v, g = inputs(rng, dtype, 1, 2, 2, 80, 80, 8, 8)
    q[:, :, 5] = 0
    largest = np.abs(q @ k.swapaxes(-1, -2)).max() * scale**2 / math.sqrt(8)
    check(kernels, q * dtype(scale), k * dtype(scale), v, g, causal,
          tolerance=max(TOLERANCE[q.dtype], 4 * largest * np.finfo(dtype).eps))


@each_dtype
def test_attention_of_nothing(kernels, dtype, rng):
    for sizes in ((0, 2, 2, 5, 5, 4, 4), (2, 2, 2, 0, 5, 4, 4), (2, 2, 2, 0, 0, 4, 4)):
        check(kernels, *inputs(rng, dtype, *sizes), causal=True)


# --- dropout ----------------------------------------------------------------------------------------------------------


def hashed(i, p, identity):
    """Is element i kept? In Python's own integers."""
    multiplier, offset, threshold = (int(n) for n in reference.dropout_key(p, identity))
    h = (i * multiplier + offset) % 2**32
    h = (h ^ h >> 16) * 0x7FEB352D % 2**32
    h = (h ^ h >> 15) * 0x846CA68B % 2**32
    return (h ^ (h >> 16)) >= threshold


@each_dtype
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 13), (300, 257), (3, 70001)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(kernels, dtype, shape, layout, p, rng):
    """The same elements at every level, however the array lies; what is kept is scaled by 1 / (1 - p)."""
    x = laid(rng.standard_normal(shape).astype(dtype), layout)
    keep = reference.dropout_mask(np, shape, p, IDENTITY)
    close(unchanged(kernels.dropout, CPU, x, p, IDENTITY), x * keep / (1 - p), dtype)
    ones = kernels.dropout(CPU, np.ones(shape, dtype), p, IDENTITY)
    np.testing.assert_array_equal(ones != 0, keep)


def test_dropout_is_the_stated_hash(kernels):
    kept = kernels.dropout(CPU, np.ones(100_000, np.float32), 0.3, IDENTITY) != 0
    for i in (*range(50), 65_535, 65_536, 99_999):
        assert kept[i] == hashed(i, 0.3, IDENTITY), i


def test_dropout_keeps_the_right_share_and_streams_differ(kernels):
    ones = np.ones((512, 512), np.float32)
    streams = [(seed, number) for seed in (0, 1, 2**63) for number in range(4)]
    for p in (0.1, 0.5, 0.9):
        masks = [kernels.dropout(CPU, ones, p, identity) != 0 for identity in streams]
        share = math.sqrt(p * (1 - p) / ones.size)  # standard deviation of the share of independent draws
        for i, a in enumerate(masks):
            assert abs(a.mean() - (1 - p)) < 5 * share
            assert abs(a.mean(0) - (1 - p)).max() < 6 * share * math.sqrt(512)  # and in every column
            assert abs((a[:, 1:] & a[:, :-1]).mean() - (1 - p) ** 2) < 6 * share
            for b in masks[:i]:
                assert abs((a & b).mean() - (1 - p) ** 2) < 6 * share  # independent of each other


def test_dropout_extremes(kernels):
    ones = np.ones(70_000, np.float32)
    assert (kernels.dropout(CPU, ones, 1e-12, IDENTITY) == 1).all()
    assert np.count_nonzero(kernels.dropout(CPU, ones, 1 - 1e-9, IDENTITY)) <= 1
