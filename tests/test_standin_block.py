"""Norms of sums, rotary positions and attention by CUDA's kernels, emulated, against the CPU in float64, in each
type."""

from __future__ import annotations

import numpy as np
import pytest
import standin
from standin_device import kernels  # noqa: F401

import tensorgrad as tg
from tensorgrad.kernels.cuda.attention import folded
from tensorgrad.nn import functional as F

DTYPES = {"float32": 2e-5, "bfloat16": 0.03, "float16": 0.004}
pytestmark = pytest.mark.parametrize("dtype", DTYPES)


def both(function, shapes, narrow, dtype, wanted=None):
    """Results and gradients of function(*tensors): (CUDA in `dtype`, CPU in float64). The first `narrow` inputs have
    that dtype, the others float32; `wanted`: which results have a gradient."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    rng, found = np.random.default_rng(0), []
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    for device, kind, other in (("cuda", dtype, "float32"), ("cpu", "float64", "float64")):
        inputs = []
        for i, array in enumerate(arrays):
            x = tg.tensor(array).to(dtype if i < narrow else "float32")  # both get the rounded numbers
            inputs.append(x.to(kind if i < narrow else other).to(device).detach().requires_grad_())
        results = function(*inputs)
        rng2 = np.random.default_rng(1)
        cotangents = [tg.tensor(rng2.standard_normal(r.shape).astype(np.float32)).to(dtype) for r in results]
        chosen = [i for i in range(len(results)) if wanted is None or i in wanted]
        gradients = tg.autograd.grad([results[i] for i in chosen], inputs,
                                     [cotangents[i].to(results[i].dtype).to(device) for i in chosen])
        if device == "cuda":
            assert [r.dtype for r in results] == [tg.dtypes.as_dtype(dtype)] * len(results)
            assert [g.dtype for g in gradients] == [x.dtype for x in inputs]
        found.append([t.detach().cpu().double().numpy() for t in (*results, *gradients)])
    return found


def compare(found, dtype):
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=DTYPES[dtype], atol=DTYPES[dtype] * np.abs(want).max())


@pytest.mark.parametrize("wanted", [(0, 1), (0,), (1,)], ids=["both", "norm only", "sum only"])
@pytest.mark.parametrize("norm, affine", [("layer_norm", 0), ("layer_norm", 1), ("layer_norm", 2), ("rms_norm", 0),
                                          ("rms_norm", 1)])
def test_norm_of_a_sum(norm, affine, wanted, dtype, kernels):  # noqa: F811
    function = getattr(F, "add_" + norm)
    for width in (64, 77):
        kernels.names.clear()
        shapes = [(3, 11, width), (3, 11, width), *[(width,)] * affine]
        used = shapes[:2] if wanted == (1,) else shapes
        fixed = [tg.ones(width)] * (len(shapes) - len(used))
        found = both(lambda x, r, *w, fixed=fixed, width=width: function(
            x, r, (width,), *w, *(f.to(x.device) for f in fixed), eps=1e-5), used, 2, dtype, wanted)
        compare(found, dtype)
        passes = [name for name in kernels.names if name != "column_sum_finish"]
        assert passes == [norm + "_forward"] + [norm + "_backward"] * (wanted != (1,)), "one pass each way"


def angles(length, dim, device, dtype, *lead):
    turned = np.random.default_rng(3).uniform(0, 6, (*lead, length, dim // 2))
    turned = tg.tensor(np.concatenate([turned, turned], -1)).to(dtype).to(device)
    return turned.cos(), turned.sin()


@pytest.mark.parametrize("dim", [16, 10])
def test_rotary_where_the_heads_lie(dim, dtype, kernels):  # noqa: F811
    """Heads of a packed projection are read in place; the gradient turns back."""
    def function(packed):
        q, k, _ = packed.reshape(2, 7, 3, 4, dim).permute(2, 0, 3, 1, 4).unbind(0)
        table = "float64" if packed.dtype == tg.float64 else "float32"
        return F.rotary(q, k, *angles(7, dim, packed.device, table))

    compare(both(function, [(2, 7, 3 * 4 * dim)], 1, dtype), dtype)
    assert kernels.names == ["rotary"] * 4


def test_rotary_of_rows_with_tables_of_their_own(dtype, kernels):  # noqa: F811
    """Texts at different positions: the table has a first dimension, which the kernel takes for a token per text."""
    for length, launched in ((5, []), (1, ["rotary"] * 4)):
        def function(x, length=length):
            table = "float64" if x.dtype == tg.float64 else "float32"
            return F.rotary(x, x[:, :1], *angles(length, 8, x.device, table, 2, 1))

        kernels.names.clear()
        compare(both(function, [(2, 3, length, 8)], 1, dtype), dtype)
        assert kernels.names == launched


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("heads, groups, queries", [(4, 2, 1), (2, 2, 5)])
def test_attention_with_a_mask(heads, groups, queries, added, dtype, kernels):  # noqa: F811
    """A query that may look at nothing gives zeros and no gradient."""
    mask = np.random.default_rng(5).random((3, 1, queries, 9)) < 0.7
    mask[1, :, -1] = False

    def function(q, k, v):
        own = tg.tensor(np.where(mask, 0.5, -np.inf).astype(np.float32) if added else mask, device=q.device)
        return (F.scaled_dot_product_attention(q, k, v, own, enable_gqa=True),)

    compare(both(function, [(3, heads, queries, 8), (3, groups, 9, 8), (3, groups, 9, 8)], 3, dtype), dtype)
    assert kernels.names == ["softmax_forward", "softmax_backward"]


def test_attention_reads_a_cache_where_it_lies(dtype):
    cache = standin.zeros((5, 2, 16, 8), np.float32)
    assert folded(standin, cache[1:4, :, :9], 2).base is cache
