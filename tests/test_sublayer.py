"""A block's sublayers computed at once: against the operations of which they consist, in float64; when they are not,
and that nothing else changes by it."""
import numpy as np
import pytest
from kernel_oracle import use_threads

import tensorgrad as tg
from gpt import GPT, GPTConfig
from gpt.model.lora import LoRAConfig, inject
from tensorgrad import kernels, nn
from tensorgrad.errors import OpError
from tensorgrad.nn.sublayer import ACTIVATIONS, feed_forward, self_attention
from tensorgrad.walk import parents_of

pytest.importorskip("numba", reason="needs the extra fast")
pytestmark = pytest.mark.skipif(kernels.LEVEL not in ("fast", "numba"), reason="TENSORGRAD_LEVEL says otherwise")
AT_ONCE = [name for name in ACTIVATIONS if name != "relu"]


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    use_threads(monkeypatch, 2)


def tensors(rng, shapes, dtype=tg.float32):
    """Leaves of these shapes, None for None; like weights, their products neither grow nor shrink."""
    return [None if s is None else tg.tensor(rng.standard_normal(s) / s[-1] ** 0.5, dtype=dtype, requires_grad=True)
            for s in shapes]


def in_float64(inputs):
    return [None if t is None else t.detach().double().requires_grad_() for t in inputs]


def compare(function, inputs, g, name):
    """Output and gradients of float32 inputs, taken at once, against the same function of float64."""
    wide = in_float64(inputs)
    y, want = function(*inputs), function(*wide)
    assert y.node.name == name and want.node.name != name
    y.backward(g)
    want.backward(g.double())
    for got, expected in [(y, want), *((t.grad, w.grad) for t, w in zip(inputs, wide, strict=True) if t is not None)]:
        got, expected = got.detach().numpy(), expected.detach().numpy()
        assert got.dtype == np.float32 and got.shape == expected.shape
        assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("activation", AT_ONCE)
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("lead", [(701,), (3, 97), (2, 5, 64)])
def test_feed_forward(activation, biases, lead):
    rng = np.random.default_rng(0)
    rows = 516 if activation == "swiglu" else 258
    inputs = tensors(rng, [(*lead, 67), (rows, 67), (rows,) if biases[0] else None, (61, 258),
                           (61,) if biases[1] else None])
    g = tg.tensor(rng.standard_normal((*lead, 61)), dtype=tg.float32)
    compare(lambda *t: feed_forward(*t, activation), inputs, g, "feed_forward")


@pytest.mark.parametrize("texts, length, heads, groups, size", [
    (2, 70, 4, 4, 32), (9, 33, 4, 2, 24), (13, 8, 6, 1, 40), (4, 130, 2, 2, 64), (12, 64, 4, 4, 32)])
@pytest.mark.parametrize("biases", [False, True])
def test_self_attention(texts, length, heads, groups, size, biases):
    rng = np.random.default_rng(1)
    rows = (heads + 2 * groups) * size
    inputs = tensors(rng, [(texts, length, 101), (rows, 101), (rows,) if biases else None, (190, heads * size),
                           (190,) if biases else None])
    g = tg.tensor(rng.standard_normal((texts, length, 190)), dtype=tg.float32)
    compare(lambda *t: self_attention(*t, heads, groups), inputs, g, "self_attention")


def test_attention_drops_the_same():
    """The stream of random numbers is used as by the operations."""
    inputs = tensors(np.random.default_rng(2), [(4, 64, 96), (288, 96), None, (96, 96), None])
    results = []
    for threads in (2, 1):
        kernels.pool.pool().threads = threads
        try:
            tg.manual_seed(3)
            results.append([self_attention(*inputs, 4, dropout_p=0.3), tg.rand(3)])
        finally:
            kernels.pool.pool().threads = 2
    assert [y.node.name for y, _ in results] == ["self_attention", "linear"]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=0, atol=1e-6)


def test_gradients_add_up_and_go_into_flat_buffers():
    """Two passes give twice the gradient, whether it is the tensor's own or a piece of an optimizer's buffer, and none
    is computed for an input that wants none."""
    rng = np.random.default_rng(4)
    x, up, _, down, _ = tensors(rng, [(128, 96), (256, 96), None, (96, 256), None])
    x = x.detach()
    seen = []
    for optimized in (False, True):
        up.grad = down.grad = None
        optimizer = tg.optim.AdamW([up, down]) if optimized else None
        for _ in range(2):
            y = feed_forward(x, up, None, down, None)
            assert y.node.name == "feed_forward"
            y.square().sum().backward()
            seen.append([t.grad.numpy().copy() for t in (up, down)])
        del optimizer
    assert x.grad is None
    for once, twice in zip(seen[0], seen[1], strict=True):
        np.testing.assert_allclose(twice, 2 * once, rtol=0, atol=1e-6 * np.abs(twice).max())
    for own, flat in zip(seen[0] + seen[1], seen[2] + seen[3], strict=True):
        np.testing.assert_array_equal(own, flat)


@pytest.mark.parametrize("kind", ["feed_forward", "self_attention"])
def test_second_order(kind):
    """Under create_graph the composed definition computes."""
    rng = np.random.default_rng(5)
    shapes = {"feed_forward": [(128, 96), (256, 96), (256,), (96, 256), (96,)],
              "self_attention": [(8, 32, 96), (288, 96), (288,), (96, 96), (96,)]}[kind]
    inputs = tensors(rng, shapes)
    function = feed_forward if kind == "feed_forward" else lambda *t: self_attention(*t, 4)

    def penalty(given):
        y = function(*given)
        first = tg.autograd.grad(y.square().sum(), given, create_graph=True)
        return y.node.name, tg.autograd.grad(sum(t.square().sum() for t in first), given)

    (name, got), (other, want) = penalty(inputs), penalty(in_float64(inputs))
    assert name == kind != other
    for a, b in zip(got, want, strict=True):
        assert np.abs(a.numpy() - b.numpy()).max() <= 1e-4 * np.abs(b.numpy()).max()


def model_and_ids(**options):
    tg.manual_seed(0)
    options = {"n_head": 2, "n_embd": 64, "block_size": 64, "vocab_size": 65, "n_layer": 2, "dropout": 0.0} | options
    return GPT(GPTConfig(**options)), tg.randint(0, 65, (8, 64))


def nodes_of(model, ids):
    """The names of all nodes behind the model's loss."""
    found, stack = set(), [model(ids, ids)[1].node]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack.extend(parents_of(node))
    return {node.name for node in found}


BOTH = {"feed_forward", "self_attention"}


@pytest.mark.parametrize("options, expected", [
    ({}, BOTH), ({"dropout": 0.1, "bias": True, "n_kv_head": 1}, BOTH), ({"norm_position": "post"}, BOTH),
    ({"activation": "relu"}, {"self_attention"}), ({"qk_norm": True}, {"feed_forward"}),
    ({"position": "rotary", "activation": "swiglu"}, {"feed_forward"})])
def test_the_model_uses_them(options, expected):
    assert nodes_of(*model_and_ids(**options)) & BOTH == expected


def test_where_somebody_looks_they_are_single_operations():
    """Hooks see their layers called, also after others are removed; a profile counts the parts."""
    model, ids = model_and_ids()
    block, calls = model.transformer.h[0], []
    handles = [layer.register_forward_hook(lambda *a: calls.append(1))
               for layer in (block.mlp.c_fc, block.attn.c_proj)]
    model(ids)
    assert len(calls) == 2
    for handle in handles:
        handle.remove()
    assert nodes_of(model, ids) >= BOTH
    model(ids)
    assert len(calls) == 2
    with tg.autograd.profile() as profile:
        model(ids)
    table = profile.table()
    assert "gelu" in table and "feed_forward" not in table and "self_attention" not in table


def test_where_they_are_not_for():
    model, ids = model_and_ids()
    for parameter in model.parameters():
        parameter.requires_grad_("c_proj" not in parameter_name(model, parameter))
    assert not nodes_of(model, ids) & BOTH  # some weights are frozen
    model, ids = model_and_ids()
    inject(model, LoRAConfig(r=4, target_modules=["c_attn", "c_fc"]))
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_()
    assert not nodes_of(model, ids) & BOTH  # and those that have adapters are others
    model, ids = model_and_ids()
    with tg.autocast("bfloat16"):
        assert not nodes_of(model, ids) & BOTH
    assert not nodes_of(model.double(), ids) & BOTH
    model, ids = model_and_ids()
    for threads in (1, 3):
        kernels.pool.pool().threads = threads
        try:
            assert not nodes_of(model, ids) & BOTH
        finally:
            kernels.pool.pool().threads = 2
    assert not nodes_of(model, ids[:1, :8]) & BOTH  # too small
    few = tensors(np.random.default_rng(0), [(63, 256), (1024, 256), (256, 1024)])
    assert feed_forward(few[0], few[1], None, few[2], None).node.name == "linear"  # one thread would do it all
    square = tensors(np.random.default_rng(0), [(64, 256), (256, 256)])
    assert feed_forward(square[0], square[1], None, square[1], None).node.name == "linear"  # one weight in both places


def parameter_name(model, parameter):
    return next(name for name, other in model.named_parameters() if other is parameter)


def test_without_gradients_no_node_is_made_and_the_result_is_the_same():
    model, ids = model_and_ids()
    with_graph = model(ids)[0]
    with tg.no_grad():
        without = model(ids)[0]
    assert without.node is None
    np.testing.assert_array_equal(with_graph.detach().numpy(), without.numpy())


def test_errors():
    x, up, _, down, _ = tensors(np.random.default_rng(0), [(64, 96), (256, 96), None, (96, 256), None])
    with pytest.raises(OpError, match="activation must be one of gelu, gelu_tanh, .* not 'tanh'"):
        feed_forward(x, up, None, down, None, "tanh")
    for wrong in ((x, down, None, down, None), (x, up, None, up, None), (x, up, tg.ones(96), down, None)):
        with pytest.raises(OpError, match="linear|matmul"):
            feed_forward(*wrong)
    with pytest.raises(OpError, match="self_attention: x .* 5 heads, 5 key heads do not fit"):
        self_attention(x, up, None, down, None, 5)
    x = x.reshape(2, 32, 96)
    with pytest.raises(OpError, match="linear"):
        self_attention(x, tg.ones(288, 96), None, tg.ones(96, 95), None, 4)
    with pytest.raises(OpError, match="probability must lie between 0 and 1"):
        self_attention(x, tg.ones(288, 96), None, tg.ones(96, 96), None, 4, dropout_p=1.5)


def test_a_step_of_training_is_the_same():
    """Parameters after five steps, against those with a pool of one thread, where all operations are single."""
    results = []
    for threads in (2, 1):
        kernels.pool.pool().threads = threads
        try:
            model, ids = model_and_ids(dropout=0.1, bias=True)
            optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99))
            for _ in range(5):
                loss = model(ids, ids)[1]
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            results.append([loss.item(), *(p.detach().numpy() for p in model.parameters())])
        finally:
            kernels.pool.pool().threads = 2
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)
