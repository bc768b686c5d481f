"""In-place changes: version counters, what is refused, and gradients through writes to tensors and views."""

from __future__ import annotations

import numpy as np
import pytest

import tensorgrad as tg
from tensorgrad.nn import functional as F


def leaf(data):
    return tg.tensor(data, dtype=tg.float64, requires_grad=True)


def plain(data):
    return tg.tensor(data, dtype=tg.float64)


def version(x):
    return x.version()[0]


def equal(tensor, expected):
    np.testing.assert_array_equal(tensor.detach().numpy(), expected)


# --- what counts ------------------------------------------------------------------------------------------------------

WRITES = {
    "add_": lambda x: x.add_(1.0), "mul_": lambda x: x.mul_(2.0), "fill_": lambda x: x.fill_(3.0),
    "zero_": lambda x: x.zero_(), "copy_": lambda x: x.copy_(plain([[5.0, 6.0], [7.0, 8.0]])),
    "setitem": lambda x: x.__setitem__(0, 1.0), "setitem mask": lambda x: x.__setitem__(x > 1, 0.0),
    "masked_fill_": lambda x: x.masked_fill_(x > 1, 0.0), "clamp_": lambda x: x.clamp_(0.0, 1.0),
    "+=": lambda x: x.__iadd__(1), "*=": lambda x: x.__imul__(x), "normal_": lambda x: x.normal_(),
}
READS = {
    "add": lambda x: x + 1, "exp": lambda x: x.exp(), "view": lambda x: x.view(-1), "getitem": lambda x: x[0],
    "sum": lambda x: x.sum(), "clone": lambda x: x.clone(), "detach": lambda x: x.detach(),
    "numpy": lambda x: x.numpy(),
    "item": lambda x: x[0, 0].item(), "repr": repr,
}
VIEWS = {
    "view": lambda x: x.view(-1), "reshape": lambda x: x.reshape(4), "transpose": lambda x: x.t(),
    "row": lambda x: x[0], "slice": lambda x: x[:, 1:], "unsqueeze": lambda x: x.unsqueeze(0),
    "expand": lambda x: x.expand(3, 2, 2),
    "detach": lambda x: x.detach(), "view of view": lambda x: x.t()[0].view(2, 1),
    "unbind": lambda x: x.unbind()[0],
    "split": lambda x: x.split(1)[1], "chunk": lambda x: x.chunk(2)[1], "diagonal": lambda x: x.diagonal(),
}


@pytest.mark.parametrize("write", WRITES)
def test_write_counts(write):
    x = plain([[1.0, 2.0], [3.0, 4.0]])
    before = version(x)
    WRITES[write](x)
    assert version(x) > before


@pytest.mark.parametrize("read", READS)
def test_read_does_not_count(read):
    x = plain([[1.0, 2.0], [3.0, 4.0]])
    before = version(x)
    READS[read](x)
    assert version(x) == before


@pytest.mark.parametrize("view", VIEWS)
def test_views_and_detach_share_the_counter(view):
    x = plain([[1.0, 2.0], [3.0, 4.0]])
    v = VIEWS[view](x)
    before = version(v)
    x.mul_(2.0)
    assert version(v) == version(x) > before
    if view != "expand":
        before = version(x)
        v.add_(1.0)
        assert version(v) == version(x) > before


@pytest.mark.parametrize("copy", [lambda x: x.clone(), lambda x: x + 0, lambda x: tg.tensor(x), lambda x: x[[0, 1]],
                                  lambda x: x.t().contiguous(), lambda x: tg.cat([x])],
                         ids=["clone", "add", "tensor", "index", "contiguous", "cat"])
def test_copies_have_their_own(copy):
    x = plain([[1.0, 2.0], [3.0, 4.0]])
    y = copy(x)
    before = version(y)
    x.mul_(2.0)
    assert version(y) == before
    assert not np.shares_memory(x.array, y.array)


def test_write_from_outside_counts_with_bump():
    x = leaf([1.0, 2.0])
    h = x * 1
    y = (h * h).sum()
    h.array[...] = 5.0
    h._bump()
    with pytest.raises(RuntimeError, match="in-place"):
        y.backward()


# --- saved values -----------------------------------------------------------------------------------------------------

SAVES_INPUT = {
    "mul": lambda h: h * h, "pow": lambda h: h**3, "log": lambda h: h.log(), "sin": lambda h: h.sin(),
    "matmul": lambda h: h @ h, "gelu": F.gelu, "layer_norm": lambda h: F.layer_norm(h, (2,)), "silu": F.silu,
}
SAVES_OUTPUT = {"exp": lambda h: h.exp(), "sqrt": lambda h: h.sqrt(), "tanh": lambda h: h.tanh(),
                "sigmoid": lambda h: h.sigmoid(), "softmax": lambda h: h.softmax(-1), "rsqrt": lambda h: h.rsqrt()}
SAVES_SHAPE = {"add": lambda h: h + 1, "sum": lambda h: h.sum(0), "mul by number": lambda h: h * 3,
               "permute": lambda h: h.t() * 1, "cat": lambda h: tg.cat([h, h]), "mean": lambda h: h.mean()}


def half_way():
    return leaf([[1.0, 2.0], [3.0, 4.0]]) * 1


@pytest.mark.parametrize("op", SAVES_INPUT)
def test_changed_input_is_refused(op):
    h = half_way()
    y = SAVES_INPUT[op](h)
    with tg.no_grad():
        h.mul_(2.0)
    with pytest.raises(RuntimeError, match="in-place"):
        y.sum().backward()


@pytest.mark.parametrize("op", SAVES_OUTPUT)
def test_changed_output_is_refused(op):
    y = SAVES_OUTPUT[op](half_way())
    z = (y * 1).sum()
    y.detach().mul_(2.0)
    with pytest.raises(RuntimeError, match="in-place"):
        z.backward()


@pytest.mark.parametrize("op", SAVES_SHAPE)
def test_needs_no_value(op):
    h = half_way()
    y = SAVES_SHAPE[op](h)
    with tg.no_grad():
        h.mul_(2.0)
    y.sum().backward()


def test_message_names_operation_shape_and_versions():
    h = half_way()
    y = (h * h).sum()
    h.detach().add_(1.0).add_(1.0)
    with pytest.raises(RuntimeError, match=r"mul.*\(2, 2\).*version 0.*version 2"):
        y.backward()


def test_write_through_any_view_is_seen():
    for name, view in VIEWS.items():
        if name != "expand":
            h = half_way()
            y = (h * h).sum()
            with tg.no_grad():
                view(h).add_(1.0)
            with pytest.raises(RuntimeError, match="in-place"):
                y.backward()


def test_only_what_is_needed_is_saved():
    """x * w with a gradient for x alone keeps w, not x."""
    x, w = leaf([1.0, 2.0]), plain([3.0, 4.0])
    h = x * 1
    y = (h * w).sum()
    with tg.no_grad():
        h.mul_(9.0)
    y.backward()
    equal(x.grad, [3.0, 4.0])


def test_changed_operand_without_gradient_is_refused():
    x, w = leaf([1.0, 2.0]), plain([3.0, 4.0])
    y = (x * w).sum()
    w.mul_(2.0)
    with pytest.raises(RuntimeError, match="in-place"):
        y.backward()


def test_change_after_backward_is_fine():
    x, w = leaf([1.0, 2.0]), plain([3.0, 4.0])
    (x * w).sum().backward()
    w.mul_(2.0)
    equal(x.grad, [3.0, 4.0])


def test_change_between_two_backwards_is_refused():
    x, w = leaf([1.0, 2.0]), plain([3.0, 4.0])
    y = (x * w).sum()
    y.backward(retain_graph=True)
    w.mul_(2.0)
    with pytest.raises(RuntimeError, match="in-place"):
        y.backward()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimizer_step_counts(name):
    """A step between forward and backward changes the saved weights: refused, not silently wrong."""
    w = tg.nn.Parameter(tg.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optimizer = getattr(tg.optim, name)([w], lr=0.1)
    (w * w).sum().backward()
    before = version(w)
    x = tg.ones(2, 2, requires_grad=True)
    late = (x @ w).sum()
    optimizer.step()
    assert version(w) > before
    with pytest.raises(RuntimeError, match="in-place"):
        late.backward()


# --- what is refused at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [lambda x: x.add_(1.0), lambda x: x.__setitem__(0, 1.0), lambda x: x[0].mul_(2.0),
                                   lambda x: x.view(-1).zero_()], ids=["leaf", "setitem", "view", "reshaped"])
def test_leaf_that_requires_a_gradient(write):
    x = leaf([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(RuntimeError, match="leaf"):
        write(x)
    equal(x, [[1.0, 2.0], [3.0, 4.0]])
    with tg.no_grad():
        write(x)
    assert x.is_leaf and x.requires_grad


@pytest.mark.parametrize("write", [
    lambda: tg.ones(2).add_(tg.ones(3, 2)), lambda: tg.ones(2).copy_(tg.ones(3)), lambda: tg.arange(3).add_(0.5),
    lambda: tg.ones(1).expand(3).add_(1.0), lambda: tg.ones(2).__setitem__(slice(None), tg.ones(3)),
    lambda: tg.arange(3).mul_(tg.ones(3)), lambda: tg.tensor([True]).add_(1),
], ids=["grows", "shape", "int by float", "expanded", "setitem", "int by tensor", "bool by int"])
def test_what_does_not_fit(write):
    with pytest.raises(RuntimeError):
        write()


def test_inference_tensor_is_not_saved():
    with tg.inference_mode():
        w = plain([3.0, 4.0]) * 2
    with pytest.raises(RuntimeError, match="inference_mode"):
        leaf([1.0, 2.0]) * w


# --- gradients through writes -----------------------------------------------------------------------------------------


def test_written_tensor_has_the_gradient_of_the_new_value():
    x, v = leaf([1.0, 2.0, 3.0]), leaf([10.0, 20.0])
    h = x * 2
    h[1:] = v * 3
    h *= 5
    h.backward(plain([1.0, 2.0, 3.0]))
    equal(h, [10.0, 150.0, 300.0])
    equal(x.grad, [10.0, 0.0, 0.0])
    equal(v.grad, [30.0, 45.0])


def test_write_into_a_buffer_records_it():
    v, buffer = leaf([1.0, 2.0]), plain([0.0, 0.0, 0.0])
    buffer[:2] = v * v
    assert buffer.requires_grad
    (buffer * plain([1.0, 10.0, 100.0])).sum().backward()
    equal(v.grad, [2.0, 40.0])


def test_write_through_a_view_reaches_the_base():
    x = leaf([[1.0, 2.0], [3.0, 4.0]])
    h = x * 1
    h[0].mul_(3.0)
    h.t()[1].add_(1.0)
    equal(h, [[3.0, 7.0], [3.0, 5.0]])
    h.backward(plain([[1.0, 10.0], [100.0, 1000.0]]))
    equal(x.grad, [[3.0, 30.0], [100.0, 1000.0]])


def test_view_made_before_the_write_sees_it():
    x = leaf([1.0, 2.0, 3.0])
    h = x * 1
    tail, head = h[1:], h[:2]
    head.mul_(10.0)
    equal(tail, [20.0, 3.0])
    tail.backward(plain([1.0, 1.0]))
    equal(x.grad, [0.0, 10.0, 1.0])


def test_write_keeps_earlier_results_right():
    """y = h^2 was made before h changed: adding keeps no value, so both gradients come out."""
    x = leaf([1.0, 2.0])
    h = x * 1
    y = h + 5
    h.mul_(3.0)
    (y.sum() + h.sum()).backward()
    equal(x.grad, [4.0, 4.0])


def test_in_place_that_saves_its_own_input():
    """h.mul_(h), h.exp_(), h.sigmoid_(): what their backward needs is not lost by the write."""
    x = leaf([1.0, 2.0])
    for write, derivative in ((lambda h: h.mul_(h), lambda v: 2 * v), (lambda h: h.exp_(), np.exp),
                              (lambda h: h.pow_(3), lambda v: 3 * v**2), (lambda h: h.log_(), lambda v: 1 / v),
                              (lambda h: h.clamp_(max=1.5), lambda v: v < 1.5)):
        h = x * 1
        assert write(h) is h
        (g,) = tg.autograd.grad(h.sum(), x)
        np.testing.assert_allclose(g.numpy(), derivative(np.array([1.0, 2.0])), rtol=1e-14)


def test_in_place_gradients_against_differences():
    def fn(x, v):
        h = x * x
        row = h[1]
        row.mul_(v)
        h[:, 0] += v.sum()
        h.t()[1, :1] = v[0] * row[0].clone()
        return h.exp() * row

    x = tg.tensor(np.linspace(0.2, 0.9, 6).reshape(2, 3), requires_grad=True)
    v = leaf([0.3, 0.5, 0.7])
    assert tg.autograd.gradcheck(fn, (x, v))
    assert tg.autograd.gradgradcheck(fn, (x, v))
