"""Products of float32 matrices in bfloat16: the rounding against ml_dtypes, the products against float64."""
import warnings

import numpy as np
import pytest

import tensorgrad as tg
from tensorgrad import nn
from tensorgrad.kernels import LEVEL, bfloat16
from tensorgrad.nn import functional as F

here = pytest.mark.skipif(bool(bfloat16.unavailable()) or LEVEL in ("composed", "reference"),
                          reason=f"no bfloat16 products: {bfloat16.unavailable() or f'level {LEVEL}'}")


@pytest.fixture
def medium():
    tg.set_float32_matmul_precision("medium")
    yield
    tg.set_float32_matmul_precision("highest")


def rounders():
    yield bfloat16._round_bits
    try:
        from tensorgrad.kernels.compiled_bfloat16 import round_bits
    except ImportError:
        return
    yield round_bits


def values():
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(70001) * 10.0 ** rng.integers(-44, 38, 70001)
    halves = (np.arange(1, 999, dtype=np.uint32) << 16 | 0x8000).view(np.float32)  # as near to one as to the other
    return np.concatenate([spread, halves, [np.inf, -np.inf, np.nan, -0.0, 3.4e38, 1e-45]]).astype(np.float32)


@pytest.mark.parametrize("round_bits", list(rounders()))
def test_rounding_is_to_nearest_even(round_bits):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    x = values()
    out = np.empty(x.size, np.uint16)
    round_bits(0, 7, x.view(np.uint32), out)
    round_bits(7, x.size, x.view(np.uint32), out)
    np.testing.assert_array_equal(out, x.astype(dtype).view(np.uint16))
    np.testing.assert_array_equal(bfloat16.widen(out), x.astype(dtype).astype(np.float32))


def rounded(x):
    return bfloat16.widen(bfloat16.rounded(x)).astype(np.float64)


@here
@pytest.mark.parametrize("n, k, m", [(64, 128, 48), (301, 77, 1001), (16, 1024, 16), (1000, 16, 17)])
def test_linear_and_its_gradients_are_products_of_rounded_values(medium, n, k, m):
    rng = np.random.default_rng(1)
    x, w, g = (rng.standard_normal(s, dtype=np.float32) for s in ((n, k), (m, k), (n, m)))
    tx, tw, tb = (tg.tensor(a, requires_grad=True) for a in (x, w, np.zeros(m, np.float32)))
    y = F.linear(tx, tw, tb)
    y.backward(tg.tensor(g))
    for got, a, b in ((y.detach(), x, w.T), (tx.grad, g, w), (tw.grad, g.T, x)):
        want = rounded(a) @ rounded(b)
        np.testing.assert_allclose(got.numpy(), want, atol=1e-5 * np.abs(want).max())
        exact = np.abs(got.numpy() - a.astype(np.float64) @ b).max() / np.abs(want).max()
        assert 1e-4 < exact < 1e-2, "nothing was rounded, or too much"
    np.testing.assert_allclose(tb.grad.numpy(), g.sum(0, dtype=np.float64), rtol=1e-4, atol=1e-4)


@here
def test_transposed_operands_and_accumulation(medium):
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((200, 96), dtype=np.float32).T, rng.standard_normal((150, 200), dtype=np.float32).T
    np.testing.assert_allclose((tg.tensor(a) @ tg.tensor(b)).numpy(), rounded(a) @ rounded(b), atol=2e-4)
    out = np.ones((96, 150), np.float32)
    bfloat16.gemm(bfloat16.rounded(a), bfloat16.rounded(b), out, accumulate=True)
    np.testing.assert_allclose(out, 1 + rounded(a) @ rounded(b), atol=2e-4)


@here
def test_small_products_and_other_dtypes_stay_exact(medium):
    rng = np.random.default_rng(3)
    for shape, dtype in (((8, 8), np.float32), ((2, 4000), np.float32), ((300, 300), np.float64)):
        a = rng.standard_normal(shape).astype(dtype)
        np.testing.assert_allclose((tg.tensor(a) @ tg.tensor(a.T)).numpy(), a.astype(np.float64) @ a.T, rtol=1e-4,
                                   atol=1e-4)


@here
def test_training_goes_as_in_float32():
    def train(precision):
        tg.set_float32_matmul_precision(precision)
        try:
            tg.manual_seed(0)
            net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
            opt = tg.optim.AdamW(net.parameters(), lr=3e-3)
            x = tg.randn(128, 64)
            losses = []
            for _ in range(60):
                loss = F.mse_loss(net(x), x.flip(1))
                opt.zero_grad()
                loss.backward()
                opt.step()
                losses.append(loss.item())
            return losses
        finally:
            tg.set_float32_matmul_precision("highest")

    wide, narrow = train("highest"), train("medium")
    assert narrow != wide and narrow[-1] < narrow[0] / 5
    np.testing.assert_allclose(narrow, wide, rtol=0.05, atol=0.01)


def test_a_processor_without_it_says_so_and_goes_on(monkeypatch):
    monkeypatch.setattr(bfloat16, "unavailable", lambda: "this processor has no bfloat16 products")
    x = tg.randn(64, 64)
    exact = (x @ x).numpy()
    try:
        with pytest.warns(UserWarning, match="stay in float32: this processor has no"):
            tg.set_float32_matmul_precision("medium")
        assert ((x @ x).numpy() == exact).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            tg.set_float32_matmul_precision("medium")
    finally:
        tg.set_float32_matmul_precision("highest")
    with pytest.raises(ValueError, match="highest, high or medium, not 'low'"):
        tg.set_float32_matmul_precision("low")
