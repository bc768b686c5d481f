"""The result of a routine does not depend on the number of threads: bit by bit where elements or rows are independent,
to 1e-6 of the largest where sums are split. The weight gradients of norms, which the compiled level adds up row after
row, to sqrt(rows) units of float32's precision."""

import numpy as np
import pytest
from kernel_oracle import CPU, level, use_threads

LEVELS = ("threaded", "compiled_all")
IDENTITY = (3, 4)


def independent(kernels, rng):
    """name -> result, of routines whose elements or rows do not depend on each other."""
    x, g = (rng.standard_normal((701, 513)).astype(np.float32) for _ in range(2))
    target, weight = rng.integers(0, 513, 701), rng.standard_normal(513).astype(np.float32)
    y, mean, rstd = kernels.layer_norm(np, x, weight, weight, 1e-5)
    z, rms = kernels.rms_norm(np, x, weight, 1e-5)
    loss, lse, counted = kernels.cross_entropy(np, x, target, 7)
    flat, grad, m, v = (rng.standard_normal(300_007).astype(np.float32) ** 2 for _ in range(4))
    kernels.adamw(np, flat, grad, m, v, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=3)
    scaled = x.reshape(-1).copy()
    kernels.scale(np, scaled, 0.7)
    results = {
        "layer_norm": y, "mean": mean, "rstd": rstd, "rms_norm": z, "rms": rms, "loss": loss, "lse": lse,
        "layer_norm_backward": kernels.layer_norm_backward(np, x, weight, mean, rstd, g, True)[0],
        "rms_norm_backward": kernels.rms_norm_backward(np, x, weight, rms, g, True)[0],
        "cross_entropy_backward": kernels.cross_entropy_backward(np, x, target, lse, counted, g[:, 0]),
        "softmax": kernels.softmax(np, x, 1), "dropout": kernels.dropout(CPU, x, 0.2, IDENTITY),
        "silu": kernels.silu(np, x), "silu_backward": kernels.silu_backward(np, x, g), "add": kernels.add(x, g),
        "scale": scaled, "adamw": flat, "exp_avg": m, "exp_avg_sq": v,
        "embedding_backward": kernels.embedding_backward(CPU, rng.integers(0, 300, 701), x, 300),
    }
    halves = x[:, :256], x[:, 257:]
    dhalves = np.empty((2, 701, 256), np.float32)
    kernels.swiglu_backward(np, *halves, np.ascontiguousarray(g[:, :256]), *dhalves)
    heads = x[:700, :512].reshape(2, 350, 8, 64).transpose(0, 2, 1, 3)
    cos, sin = g[:350, :64], g[350:700, :64]
    sy, smean, _, total = kernels.add_layer_norm(np, x, g, weight, weight, 1e-5)
    ry, rrms, _ = kernels.add_rms_norm(np, x, g, weight, 1e-5)
    logs = kernels.log_softmax(np, x, 1)
    results |= {
        "swiglu": kernels.swiglu(np, *halves), "swiglu_backward": dhalves, "relu2": kernels.relu2(np, x),
        "relu2_backward": kernels.relu2_backward(np, x, g), "rotary": kernels.rotary(np, heads, cos, sin, False),
        "rotary_backward": kernels.rotary(np, heads, cos, sin, True), "add_layer_norm": sy, "total": total,
        "add_layer_norm_backward":
            kernels.add_layer_norm_backward(np, total, weight, smean, rstd, g, x, True)[0],
        "add_rms_norm": ry, "add_rms_norm_backward":
            kernels.add_rms_norm_backward(np, total, weight, rrms, g, x, True)[0],
        "softmax_backward": kernels.softmax_backward(np, results["softmax"], g, 1), "log_softmax": logs,
        "log_softmax_backward": kernels.log_softmax_backward(np, logs, g, 1),
    }
    for kind in ("none", "tanh"):
        results[f"gelu {kind}"] = y = kernels.gelu(np, x, kind)
        results[f"gelu_backward {kind}"] = kernels.gelu_backward(np, x, y, g, kind)
    return results


def summed(kernels, rng):
    """name -> result, of routines whose sums the threads may split or block in another way."""
    x, g = (rng.standard_normal((1303, 257)).astype(np.float32) for _ in range(2))
    weight, bias = rng.standard_normal((257, 257)).astype(np.float32), rng.standard_normal(257).astype(np.float32)
    _, mean, rstd = kernels.layer_norm(np, x, bias, None, 1e-5)
    _, dweight, dbias = kernels.layer_norm_backward(np, x, bias, mean, rstd, g, True)
    q, k, v, dout = (rng.standard_normal((3, n, 130, 16)).astype(np.float32) for n in (4, 2, 2, 4))
    results = {
        "linear": kernels.linear(np, x, weight, bias), "layer_norm dweight": dweight, "layer_norm dbias": dbias,
        "rms_norm dweight": kernels.rms_norm_backward(np, x, bias, rstd, g, True)[1],
        "sum_of_squares": np.asarray(kernels.sum_of_squares(np, x.reshape(-1))),
        "matmul": kernels.matmul(np, x.reshape(1303, 257, 1)[:256].reshape(4, 64, 257), weight),
    }
    grads = kernels.linear_backward(np, x, weight, g, (True, True, True))
    for name, grad in zip(("dx", "dweight", "dbias"), grads, strict=True):
        results[f"linear {name}"] = grad
    for causal, identity in ((True, None), (False, None), (True, IDENTITY)):
        out, kept = kernels.attention(CPU, q, k, v, None, causal, 0.25, 0.1, identity)
        grads = kernels.attention_backward(CPU, q, k, v, kept, causal, 0.25, 0.1, identity, dout)
        results.update({f"attention {causal} {identity} {i}": a for i, a in enumerate((out, *grads))})
    return results


def with_threads(monkeypatch, routines, kernels, threads):
    use_threads(monkeypatch, threads)
    return routines(kernels, np.random.default_rng(5))


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("threads", [2, 3])
def test_independent_results_are_equal_bit_by_bit(name, threads, monkeypatch):
    kernels = level(name)
    alone, several = (with_threads(monkeypatch, independent, kernels, n) for n in (1, threads))
    different = [key for key in alone if not np.array_equal(alone[key], several[key])]
    assert not different


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("threads", [2, 3])
def test_sums_are_equal_to_rounding(name, threads, monkeypatch):
    kernels = level(name)
    alone, several = (with_threads(monkeypatch, summed, kernels, n) for n in (1, threads))
    for key, want in alone.items():
        tolerance = 1303**0.5 * np.finfo(np.float32).eps if "_norm d" in key else 1e-6
        assert np.abs(several[key] - want).max() <= tolerance * np.abs(want).max(), key


@pytest.mark.parametrize("name", LEVELS)
def test_the_same_threads_give_the_same_bits(name, monkeypatch):
    """Whichever thread comes first."""
    kernels = level(name)
    first = with_threads(monkeypatch, summed, kernels, 3)
    for _ in range(3):
        again = with_threads(monkeypatch, summed, kernels, 3)
        assert not [key for key in first if not np.array_equal(first[key], again[key])]


@pytest.mark.parametrize("name", LEVELS)
def test_more_threads_than_most_machines_have(name, monkeypatch):
    """The gradients of a norm's weights are right with 100 threads, each of which has sums of its own."""
    kernels = level(name)
    rng = np.random.default_rng(1)
    x, g = (rng.standard_normal((200, 16384)).astype(np.float32) for _ in range(2))
    weight = np.ones(16384, np.float32)
    use_threads(monkeypatch, 100)
    _, mean, rstd = kernels.layer_norm(np, x, weight, None, 1e-5)
    _, dweight, dbias = kernels.layer_norm_backward(np, x, weight, mean, rstd, g, True)
    rms = kernels.rms_norm_backward(np, x, weight, rstd, g, True)[1]
    np.testing.assert_allclose(dbias, g.sum(0, dtype=np.float64), atol=1e-4)
    np.testing.assert_allclose(dweight, (g * (x - mean) * rstd).sum(0, dtype=np.float64), atol=1e-4)
    np.testing.assert_allclose(rms, (g * x * rstd).sum(0, dtype=np.float64), atol=1e-4)
