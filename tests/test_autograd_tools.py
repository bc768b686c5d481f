"""Modes, hooks, anomaly detection, profiler, graph drawing, Function, grad's options."""
import threading

import numpy as np
import pytest

import tensorgrad as tg
from tensorgrad import nn


def leaf(values):
    return tg.tensor(values, dtype=tg.float64, requires_grad=True)


# ---- modes


def test_modes_nest_and_survive_exceptions():
    assert tg.is_grad_enabled()
    with tg.no_grad():
        assert not tg.is_grad_enabled()
        with tg.enable_grad():
            assert tg.is_grad_enabled()
            with pytest.raises(KeyError), tg.no_grad():
                raise KeyError
            assert tg.is_grad_enabled()
        assert not tg.is_grad_enabled()
    assert tg.is_grad_enabled()
    with tg.inference_mode():
        assert tg.is_inference_mode_enabled() and not tg.is_grad_enabled()
    assert not tg.is_inference_mode_enabled()
    with tg.set_grad_enabled(False):
        assert not tg.is_grad_enabled()
    tg.set_grad_enabled(False)
    assert not tg.is_grad_enabled()
    tg.set_grad_enabled(True)


def test_modes_as_decorators_also_recursive():
    @tg.no_grad()
    def f(depth):
        assert not tg.is_grad_enabled()
        return f(depth - 1) if depth else tg.ones(1, requires_grad=True) * 2

    assert not f(3).requires_grad and tg.is_grad_enabled()

    @tg.set_grad_enabled(False)
    def g():
        return tg.is_grad_enabled()

    assert tg.is_grad_enabled() and not g() and tg.is_grad_enabled()


def test_modes_are_per_thread():
    seen, inside, go = [], threading.Event(), threading.Event()

    def other():
        inside.wait()
        seen.append(tg.is_grad_enabled())
        go.set()

    thread = threading.Thread(target=other)
    thread.start()
    with tg.no_grad():
        inside.set()
        assert go.wait(10)
    thread.join()
    assert seen == [True]


def test_inference_tensor_may_not_be_saved():
    with tg.inference_mode():
        frozen = tg.ones(2) * 2
    with pytest.raises(RuntimeError, match="inference_mode"):
        leaf([1.0, 2.0]).float() * frozen


# ---- hooks


def test_tensor_hook_replaces_and_is_removed():
    x = leaf([1.0, 2.0])
    handle = x.register_hook(lambda g: g * 10)
    (x * 3).sum().backward()
    assert x.grad.tolist() == [30.0, 30.0]
    handle.remove()
    x.grad = None
    (x * 3).sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


def test_hook_of_an_intermediate_sees_the_whole_gradient_once():
    x, seen = leaf([1.0]), []
    y = x * 2
    y.register_hook(lambda g: seen.append(g.tolist()))
    (y * 3 + y * 4).sum().backward()
    assert seen == [[7.0]] and x.grad.tolist() == [14.0]


def test_op_hook_sees_forward_and_backward():
    class Log(tg.autograd.OpHook):
        def __init__(self):
            self.names = []

        def after_forward(self, op, arrays, outputs):
            self.names.append(("forward", op.name, outputs[0].shape))

        def after_backward(self, op, gradients, input_gradients):
            self.names.append(("backward", op.name, gradients[0].shape))

    x = leaf([1.0, 2.0])
    with tg.autograd.op_hook(Log()) as log:
        (x * 2).exp().backward(tg.ones(2, dtype=tg.float64))
    x.exp()  # not seen any more
    assert log.names[:2] == [("forward", "mul", (2,)), ("forward", "exp", (2,))]
    assert [entry[:2] for entry in log.names if entry[0] == "backward"] == [("backward", "exp"), ("backward", "mul")]
    assert len(log.names) > 4  # what backward computes with is seen as well


# ---- detect_anomaly


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), Root()

    def forward(self, x):
        return self.second(self.first(x))


class Root(nn.Module):
    def forward(self, x):
        return (x * 0 - 1).sqrt()  # the NaN is born here


def test_anomaly_in_forward_names_op_module_and_line():
    with pytest.raises(tg.autograd.AnomalyError) as caught, tg.autograd.detect_anomaly():
        Net()(tg.ones(1, 2))
    message = str(caught.value)
    assert "sqrt" in message and "second" in message and "test_autograd_tools.py" in message
    assert "the NaN is born here" in message  # the source line, from the stack


def test_anomaly_in_backward_shows_both_stacks():
    x = leaf([0.0, 4.0])
    with tg.autograd.detect_anomaly():
        y = x.sqrt()  # made here
        loss = (y * tg.tensor([0.0, 1.0], dtype=tg.float64)).sum()
        with pytest.raises(tg.autograd.AnomalyError) as caught:
            loss.backward()
    message = str(caught.value)
    assert "backward of sqrt" in message and "made here" in message and "loss.backward()" in message
    loss = (leaf([0.0]).sqrt() * 0).sum()
    loss.backward()  # outside nobody looks


def test_anomaly_names_the_line_in_other_errors():
    with tg.autograd.detect_anomaly(check_nan=False):
        y = leaf([1.0]).exp()
        y.sum().backward()
        with pytest.raises(RuntimeError, match=r"created at .*test_autograd_tools.py:\d+.*retain_graph"):
            y.sum().backward()


# ---- profiler and graph


def test_profile_counts_calls_and_bytes():
    x = tg.randn(8, 4, requires_grad=True)
    with tg.autograd.profile() as profile:
        for _ in range(3):
            (x.exp() * 2).sum().backward()
    rows = {(r["op"], r["direction"]): r for r in profile.rows}
    assert rows["exp", "forward"]["calls"] == 3 and rows["exp", "forward"]["bytes"] == 3 * 128
    assert rows["exp", "backward"]["calls"] == 3 and all(r["seconds"] >= 0 for r in profile.rows)
    assert "exp" in profile.table() and "total" in profile.table()


def test_graph_as_text_and_dot(tmp_path):
    layer = nn.Linear(3, 2)
    loss = layer(tg.ones(4, 3)).tanh().sum()
    text = tg.autograd.graph_text(loss, layer.named_parameters())
    assert len(text.splitlines()) == 5 and "weight (2, 3)" in text and "linear ((4, 3)" in text
    assert text.splitlines()[0].split()[1] == "sum"
    dot = tg.autograd.graph_dot(loss, layer.named_parameters())
    assert dot.startswith("digraph") and dot.count("->") == 4 and dot.rstrip().endswith("}")
    tg.autograd.draw_graph(loss, tmp_path / "g.dot")
    assert (tmp_path / "g.dot").read_text().startswith("digraph")


# ---- grad and Function


def test_grad_unused_and_materialized():
    x, z = leaf([1.0]), leaf([2.0])
    y = x * 3
    with pytest.raises(RuntimeError, match="allow_unused"):
        tg.autograd.grad(y, [x, z], retain_graph=True)
    assert tg.autograd.grad(y, [x, z], retain_graph=True, allow_unused=True)[1] is None
    assert tg.autograd.grad(y, [x, z], materialize_grads=True)[1].tolist() == [0.0]
    assert x.grad is None and z.grad is None


def test_backward_into_chosen_inputs_only():
    x, z = leaf([1.0]), leaf([2.0])
    (x * z).backward(inputs=[z])
    assert x.grad is None and z.grad.tolist() == [1.0]


def test_function_with_two_outputs_and_an_option():
    class SinCos(tg.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.scale = scale
            s, c = (x * scale).sin(), (x * scale).cos()
            ctx.save_for_backward(s, c)
            assert ctx.needs_input_grad == (True, False)
            return s, c

        @staticmethod
        def backward(ctx, gs, gc):
            s, c = ctx.saved_tensors
            total = 0
            if gs is not None:
                total = gs * c
            if gc is not None:
                total = total - gc * s
            return total * ctx.scale, None

    x = leaf([0.3, 0.7])
    assert tg.autograd.gradcheck(lambda x: SinCos.apply(x, 2.0), (x,))
    s, _ = SinCos.apply(x, 2.0)
    s.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), 2 * np.cos(2 * x.detach().numpy()))


def test_function_is_differentiable_twice():
    class Cube(tg.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x * x

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * 3 * x * x

    assert tg.autograd.gradgradcheck(Cube.apply, (leaf([0.5, -1.5]),))
