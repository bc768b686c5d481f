"""Weights stored in 16 or 8 bits: values, products, gradients, and models that are run and adapted with them."""
import ml_dtypes
import numpy as np
import pytest
from interop_tools import MODERN, logits_of, make_model
from kernel_oracle import CPU, use_threads

import tensorgrad as tg
from gpt.inference import generate
from gpt.model.cache import KVCache, next_logits
from gpt.model.lora import LoRAConfig, adapter_names, inject, merge, unmerge
from tensorgrad import kernels, nn
from tensorgrad.kernels import packed
from tensorgrad.nn import functional as F

KINDS = ("bfloat16", "float16", "int8")
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["reference", "numpy", "numba"])
def at_level(request, monkeypatch):
    """Packed products at one level, over two threads."""
    use_threads(monkeypatch, 2)
    if request.param == "numba":
        pytest.importorskip("numba", reason="needs the extra fast")
        from tensorgrad.kernels import compiled_all as best
    else:
        from tensorgrad.kernels import threaded as best
    monkeypatch.setattr(packed, "LEVEL", request.param)
    monkeypatch.setattr(kernels, "_routines", best)
    monkeypatch.setattr(packed, "routines", lambda device: best)
    return request.param


def values(weight):
    """The numbers a PackedWeight stands for, float64, by other means than the package's."""
    if weight.kind == "bfloat16":
        return weight.array.view(ml_dtypes.bfloat16).astype(np.float64)
    if weight.scale is None:
        return weight.array.astype(np.float64)
    groups = weight.array.reshape(*weight.scale.shape, -1).astype(np.float64)
    return (groups * weight.scale[..., None]).reshape(weight.array.shape)


def test_bfloat16_rounds_to_nearest_even():
    special = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, np.inf, -np.inf, np.nan, 3e38, 1e-40, -1.5]
    numbers = np.concatenate([np.array(special, np.float32), np.random.default_rng(0).normal(size=10000)])
    numbers = numbers.astype(np.float32).reshape(1, -1)
    got = packed.pack_bfloat16(numbers).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got.astype(np.float32), numbers.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_int8_error_is_half_a_step():
    w = np.random.default_rng(0).normal(size=(7, 192)).astype(np.float32)
    w[3] = 0
    q, scale = packed.pack_int8(w, 64)
    assert q.dtype == np.int8 and scale.shape == (7, 3) and not q[3].any()
    error = np.abs(packed.widen(np, q, scale) - w).reshape(7, 3, 64)
    assert (error <= 0.5001 * scale[..., None]).all() and error.max() > 0.4 * scale.max()
    assert (np.abs(q).reshape(7, 3, 64).max(2)[[0, 1, 2, 4, 5, 6]] == 127).all()


@each_kind
@pytest.mark.parametrize("out, width", [(1, 1), (5, 64), (33, 100), (130, 192), (2500, 128)])
def test_linear_and_its_gradient(at_level, kind, out, width):
    rng = np.random.default_rng(out)
    weight = nn.pack(rng.normal(size=(out, width)).astype(np.float32), kind)
    exact, bias = values(weight), rng.normal(size=out).astype(np.float32)
    for rows in (0, 1, 2, 3, 4, 7, 8, 16, 17, 70):
        x, g = rng.normal(size=(rows, width)).astype(np.float32), rng.normal(size=(rows, out)).astype(np.float32)
        xt, bt = tg.tensor(x, requires_grad=True), tg.tensor(bias, requires_grad=True)
        y = F.linear(xt, weight, bt)
        y.backward(tg.tensor(g))
        assert y.dtype == tg.float32
        for got, want, terms in ((y.detach(), x @ exact.T + bias, width), (xt.grad, g @ exact, out),
                                 (bt.grad, g.sum(0, dtype=np.float64), rows)):
            np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=3e-6 * (1 + np.sqrt(terms)) * 4)
    strided = np.repeat(rng.normal(size=(3, width)).astype(np.float32), 2, axis=1)[:, ::2]
    got = packed.linear(CPU, strided, weight.array, weight.scale, None)
    np.testing.assert_allclose(got, strided @ exact.T, rtol=0, atol=1e-4)


@each_kind
def test_embedding_and_second_order(kind):
    weight = nn.pack(np.random.default_rng(1).normal(size=(9, 64)).astype(np.float32), kind)
    ids = np.array([[3, 0, 8], [3, 3, 1]])
    np.testing.assert_array_equal(F.embedding(tg.tensor(ids), weight).numpy(), values(weight)[ids].astype(np.float32))
    with pytest.raises(IndexError, match="9 is out of range"):
        F.embedding(tg.tensor([9]), weight)
    x = tg.randn(2, 64, requires_grad=True)
    first, = tg.autograd.grad((F.linear(x, weight) ** 2).sum(), [x], create_graph=True)
    second, = tg.autograd.grad(first.sum(), [x])   # of |W x|^2: 2 W^T W 1
    exact = values(weight)
    np.testing.assert_allclose(second.numpy()[0], 2 * (exact.T @ exact).sum(0), rtol=1e-4, atol=1e-2)


def test_few_rows_of_float32(monkeypatch):
    pytest.importorskip("numba", reason="needs the extra fast")
    from tensorgrad.kernels import compiled_few
    use_threads(monkeypatch, 2)
    rng = np.random.default_rng(0)
    for out, width in ((1000, 67), (129, 515)):
        w, bias = (rng.normal(size=size).astype(np.float32) for size in ((out, width), out))
        for rows in (1, 2, 4, 5, 16, 17):
            x = rng.normal(size=(rows, width)).astype(np.float32)
            got = compiled_few.linear(np, x, w, bias)
            np.testing.assert_allclose(got, x.astype(float) @ w.T.astype(float) + bias, rtol=0, atol=1e-4)
            turned = compiled_few.linear(np, x, np.asfortranarray(w), bias)    # as GPT-2's files have it
            np.testing.assert_allclose(turned, got, rtol=0, atol=1e-4)


@each_kind
def test_takes_no_gradient(kind):
    model = nn.quantize(make_model(), kind)
    with pytest.raises(TypeError, match=f"stored as {kind} takes no gradient"):
        model.requires_grad_(True)
    with pytest.raises(ValueError, match="read-only"):
        model.load_state_dict(make_model().state_dict())
    with pytest.raises(TypeError, match="takes float32, got float64"):
        F.linear(tg.zeros(2, 32, dtype=tg.float64), model.lm_head.weight)


@pytest.mark.parametrize("changes", [{}, MODERN | {"tie_weights": False}], ids=["gpt2", "llama"])
@each_kind
def test_a_model(kind, changes):
    """Its logits are those of a float32 model with the rounded weights, cached and not; tied weights stay tied."""
    model, rounded = nn.quantize(make_model(**changes), kind), make_model(**changes)
    packed_weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    assert packed_weights and all(isinstance(p, nn.PackedWeight) for p in packed_weights.values())
    assert (model.lm_head.weight is model.transformer.wte.weight) == model.config.tie_weights
    for name, p in rounded.named_parameters():
        if name in packed_weights:
            p.array[...] = values(packed_weights[name])
    ids = np.random.default_rng(0).integers(0, 97, (3, 20))
    np.testing.assert_allclose(logits_of(model, ids), logits_of(rounded, ids), rtol=0, atol=2e-5)
    cache = KVCache(model, 1)
    for end in (5, 6, 20):
        got = next_logits(model, [ids[0, :end].tolist()], cache).numpy()
    np.testing.assert_allclose(got, logits_of(rounded, ids[:1])[:, -1], rtol=0, atol=2e-5)
    [one], [two] = (generate(m, ids[0].tolist(), max_new_tokens=40, temperature=0) for m in (model, rounded))
    assert one.ids == two.ids


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@each_kind
def test_lora_on_it(kind, dora):
    model = nn.quantize(make_model(**MODERN), kind)
    bits = {name: p.array.copy() for name, p in model.named_parameters()}
    inject(model, LoRAConfig(r=4, target_modules="all-linear", use_dora=dora))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert adapter_names(model) == ["default"] and all(p.dtype == tg.float32 for p in trained)
    ids = np.random.default_rng(0).integers(0, 97, (4, 24))
    optimizer, losses = tg.optim.AdamW(trained, lr=0.01), []
    for _ in range(12):
        _, loss = model(tg.tensor(ids[:, :-1]), tg.tensor(ids[:, 1:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    logits = logits_of(model, ids)
    merge(model)
    np.testing.assert_allclose(logits_of(model, ids), logits, rtol=0, atol=1e-4)
    unmerge(model)
    np.testing.assert_array_equal(logits_of(model, ids), logits)
    left = {name: p.array for name, p in model.named_parameters() if not p.requires_grad}
    assert left.keys() == bits.keys()
    for name in bits:
        np.testing.assert_array_equal(left[name], bits[name])
