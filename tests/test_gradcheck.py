"""The gradient checker itself: wrong gradients of every kind are refused, right ones pass."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tensorgrad as tg

gradcheck, gradgradcheck = tg.autograd.gradcheck, tg.autograd.gradgradcheck


def leaf(*shape):
    return tg.tensor(np.random.default_rng(0).uniform(0.5, 2.0, shape), requires_grad=True)


def operation(forward, backward):
    """A function of one tensor with the given backward(x, g)."""

    class Operation(tg.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, g):
            return backward(*ctx.saved_tensors, g)

    return Operation.apply


class Noise:
    """Factors that differ by 1e-9 from call to call."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return 1 + 1e-9 * self.calls


noise = Noise()
W = tg.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=tg.float64)
WRONG = {
    "value": operation(lambda x: x * x, lambda x, g: 2.01 * x * g),
    "one entry": operation(lambda x: x * x, lambda x, g: 2 * x * g + (x == x.max()) * 1e-3),
    "sign": operation(lambda x: 1 / x, lambda x, g: g / (x * x)),
    "transposed": operation(lambda x: x @ W, lambda x, g: g @ W),
    "permuted": operation(lambda x: x * x, lambda x, g: (2 * x * g).flip(0)),
    "output dtype": operation(lambda x: (x * x).to(tg.float32), lambda x, g: 2 * x * g),
    "shape": operation(lambda x: x * x, lambda x, g: (2 * x * g).reshape(-1)),
    "none": operation(lambda x: x * x, lambda x, g: None),
    "not repeatable": operation(lambda x: x * x, lambda x, g: 2 * x * g * noise()),
    "cotangent ignored": operation(lambda x: x * x, lambda x, g: 2 * x),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_gradient_is_refused(kind):
    with pytest.raises(RuntimeError):
        gradcheck(WRONG[kind], (leaf(2, 2),))


def test_gradient_of_lower_precision():
    """The engine casts a gradient to its input's dtype; that it was computed in float32 shows at a tight tolerance."""
    right = operation(lambda x: x * x, lambda x, g: 2 * x * g)
    rounded = operation(lambda x: x * x, lambda x, g: (2 * x * g).to(tg.float32))
    x = leaf(2, 2)
    (g,) = tg.autograd.grad(rounded(x).sum(), x)
    assert g.dtype == tg.float64
    assert gradcheck(right, (x,), atol=5e-9, rtol=5e-9)
    assert not gradcheck(rounded, (x,), atol=5e-9, rtol=5e-9, raise_exception=False)


def test_wrong_gradient_can_be_reported_instead():
    assert gradcheck(WRONG["value"], (leaf(2, 2),), raise_exception=False) is False


def test_message_shows_both_gradients():
    with pytest.raises(RuntimeError) as caught:
        gradcheck(WRONG["value"], (leaf(1),))
    assert "numeric 2" in str(caught.value) and "analytic 2" in str(caught.value)


@pytest.mark.parametrize("reduce", [lambda x: x, lambda x: x.sum()], ids=["elements", "scalar"])
def test_message_names_the_entry(reduce):
    wrong = operation(lambda x: reduce(x * x), lambda x, g: 2 * x * g + (x == x.max()) * 1e-2)
    x = leaf(2, 3)
    place = tuple(int(i) for i in np.argwhere(x.detach().numpy() == x.detach().numpy().max())[0])
    with pytest.raises(RuntimeError, match=re.escape(f"input{place}")):
        gradcheck(wrong, (x,))


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0,)])
def test_right_gradient_passes(shape):
    right = operation(lambda x: x * x * x, lambda x, g: 3 * x * x * g)
    assert gradcheck(right, (leaf(*shape),))
    assert gradgradcheck(right, (leaf(*shape),))


def test_second_gradient_that_is_wrong():
    """The first gradient is right; its own gradient is lost by detach."""
    half = operation(lambda x: x * x * x, lambda x, g: 3 * x * x.detach() * g)
    assert gradcheck(half, (leaf(3),))
    with pytest.raises(RuntimeError):
        gradgradcheck(half, (leaf(3),))


@pytest.mark.parametrize("factor", [1, 2])
def test_every_input_and_output_is_checked(factor):
    class Two(tg.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x * y, x + y

        @staticmethod
        def backward(ctx, g, h):
            x, y = ctx.saved_tensors
            return g * y + h, g * x + factor * h

    assert gradcheck(Two.apply, (leaf(2), leaf(2)), raise_exception=False) is (factor == 1)


def test_float32_is_refused():
    """Differences of 1e-6 mean nothing in float32."""
    with pytest.raises(ValueError, match="float64"):
        gradcheck(lambda x: x * x, (tg.ones(2, requires_grad=True),))


def test_needs_an_input_with_gradient():
    with pytest.raises(ValueError):
        gradcheck(lambda x: x * x, (tg.ones(2, dtype=tg.float64),))


def test_leaves_the_inputs_alone():
    x = leaf(2, 2)
    before = x.detach().numpy().copy()
    gradcheck(lambda x: x * x, (x,))
    np.testing.assert_array_equal(x.detach().numpy(), before)
    assert x.grad is None
