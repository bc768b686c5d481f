"""The graph as its users meet it: second backward, deep graphs, nested checkpoints, NumPy beside tensors."""

from __future__ import annotations

import numpy as np
import pytest

import tensorgrad as tg
from tensorgrad.nn import functional as F


def leaf(data):
    return tg.tensor(data, dtype=tg.float64, requires_grad=True)


def equal(tensor, expected):
    np.testing.assert_array_equal(tensor.detach().numpy(), expected)


@pytest.mark.parametrize("call", [lambda a, x: a * x, lambda a, x: a + x, lambda a, x: a - x, lambda a, x: a / x,
                                  lambda a, x: a @ x, lambda a, x: a**x, lambda a, x: a[0, 0] * x,
                                  lambda a, x: a > x])
def test_numpy_on_the_left(call):
    """NumPy leaves `array * tensor` to the tensor: the result is one, with its gradient."""
    x = leaf([[1.0, 2.0], [3.0, 4.0]])
    out = call(np.ones((2, 2)), x)
    assert isinstance(out, tg.Tensor) and out.dtype in (tg.float64, tg.bool)
    if out.dtype != tg.bool:
        out.sum().backward()
        assert x.grad.shape == x.shape


def test_deep_chain_of_several_outputs_and_second_order():
    x = leaf([1.0, 2.0])
    y = x
    for _ in range(3_000):
        y = tg.cat(tuple(y.split(1)))
    (g,) = tg.autograd.grad((y * y).sum(), x, create_graph=True)
    g.sum().backward()
    equal(x.grad, [2.0, 2.0])


def test_checkpoint_nested():
    rng = np.random.default_rng(0)
    x, w = leaf(rng.normal(size=(3, 4))), leaf(rng.normal(size=(4, 4)))

    def layer(h):
        return F.dropout((h @ w).tanh(), 0.3)

    def two(h):
        return tg.utils.checkpoint(layer, tg.utils.checkpoint(layer, h))

    grads = []
    for run in (lambda h: layer(layer(h)), two, lambda h: tg.utils.checkpoint(two, h)):
        tg.manual_seed(3)
        grads.append(tg.autograd.grad(run(x).sum(), [x, w]))
    for g in grads[1:]:
        equal(g[0], grads[0][0].numpy())
        equal(g[1], grads[0][1].numpy())


def test_second_backward_message():
    """The second backward through a freed graph says which operation and what to do."""
    x = leaf([1.0, 2.0])
    y = (x * x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match=r"mul.*retain_graph=True"):
        y.backward()
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    equal(x.grad, [6.0, 12.0])
