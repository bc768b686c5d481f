"""Programs that a user of PyTorch writes without thinking, run in PyTorch and here: the same values, dtypes, shapes and
flags, and an error where PyTorch has one. Each was wrong here once."""

import copy
import pickle

import numpy as np
import pytest

import tensorgrad as tg
import tensorgrad.autograd
import tensorgrad.nn
import tensorgrad.optim
from tensorgrad.utils.checkpoint import checkpoint

torch = pytest.importorskip("torch")

PROGRAMS = []


def program(function):
    PROGRAMS.append(pytest.param(function, id=function.__name__))
    return function


def plain(value):
    """A result as what can be compared: (dtype, array), or the value itself."""
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype).removeprefix("torch."), value.detach().numpy()
    if isinstance(value, tg.Tensor):
        return str(value.dtype), value.detach().numpy()
    return value


def outcome(function, t):
    try:
        return plain(function(t))
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error).__name__.replace("Op", "")


def check(ours, theirs):
    if isinstance(theirs, tuple):
        assert ours[0] == theirs[0] and ours[1].shape == theirs[1].shape
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5 if theirs[1].itemsize > 2 else 1e-3, atol=1e-6)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            check(a, b)
    else:
        assert ours == theirs


# --- leaves and views -------------------------------------------------------------------------------------------------


@program
def a_view_made_a_leaf_stays_one_when_its_base_is_written(t):
    base = t.zeros(4)
    x = base.view(2, 2).requires_grad_()
    base.add_(1)
    (x * x).sum().backward()
    return x.grad, x.is_leaf


@program
def a_leaf_that_is_a_view_refuses_to_be_written(t):
    x = t.arange(6.0).reshape(2, 3).requires_grad_()
    x.add_(1)


@program
def a_view_follows_its_base_into_the_graph(t):
    w = t.full((2,), 2.0, requires_grad=True)
    base = t.ones(2)
    view = base[0]
    base.mul_(w)
    flags = view.is_leaf, view.requires_grad
    view.backward()
    return *flags, w.grad


@program
def a_view_of_what_requires_a_gradient_gives_no_array(t):
    base = t.ones(2)
    view = base[0]
    base.mul_(t.full((2,), 2.0, requires_grad=True))
    return view.numpy()


@program
def the_gradient_of_a_view_of_a_written_base(t):
    base = t.ones(2)
    view = base[0]
    base.mul_(t.full((2,), 2.0, requires_grad=True))
    return t.autograd.grad(view * 3, view)


@program
def frozen_between_forward_and_backward(t):
    x, y = t.ones(2, requires_grad=True), t.ones(2, requires_grad=True)
    z = (x * y).sum()
    x.requires_grad_(False)
    z.backward()
    return x.grad, y.grad


@program
def frozen_and_thawed_between_forward_and_backward(t):
    x = t.ones(2, requires_grad=True)
    z = (x * 2).sum()
    x.requires_grad_(False)
    x.requires_grad_(True)
    z.backward()
    return x.grad


def second_order(t, x, y):
    (first,) = t.autograd.grad((x * y).sum(), x, create_graph=True)
    return t.autograd.grad(first.sum(), (x, y), allow_unused=True)


@program
def second_order_where_data_is_shared(t):
    y = t.tensor([2.0, 3.0], requires_grad=True)
    p = t.nn.Parameter(t.zeros(2))
    p.data = y
    return second_order(t, p, y)


@program
def second_order_of_a_parameter_made_of_a_tensor(t):
    y = t.tensor([2.0, 3.0], requires_grad=True)
    return second_order(t, t.nn.Parameter(y), y)


@program
def second_order_of_two_tensors_around_one_array(t):
    array = np.array([2.0, 3.0])
    return second_order(t, t.from_numpy(array).requires_grad_(), t.from_numpy(array).requires_grad_())


@program
def second_order_of_two_tensors_as_one_array(t):
    array = np.array([2.0, 3.0])
    return second_order(t, t.as_tensor(array).requires_grad_(), t.as_tensor(array).requires_grad_())


@program
def bits_of_another_dtype(t):
    x = t.tensor([1.0, -2.0])
    bits = x.view(t.int32)
    bits[0] = 0
    return x, bits


@program
def overwritten_values_have_a_gradient_of_zero(t):
    x, y = t.ones(2, requires_grad=True), t.ones(2, requires_grad=True)
    a, b = x * 2, x * 3
    a.zero_()
    b.copy_(y)
    (a + b * b).sum().backward()
    return a.requires_grad, x.grad, y.grad


@program
def expanded_without_repeating_may_be_written(t):
    x = t.arange(3.0)
    x.expand(1, 3).mul_(2)
    return x


@program
def a_linear_layer_without_inputs(t):
    layer = t.nn.Linear(0, 2)
    return layer(t.ones(3, 0)).shape[1], t.nn.Linear(2, 3)(t.ones(0, 2)).shape[1]


@program
def a_slice_of_a_sequential_keeps_its_names(t):
    layers = t.nn.Sequential(t.nn.Linear(1, 2), t.nn.ReLU(), t.nn.Linear(2, 1))
    some = t.nn.ModuleList([t.nn.ReLU(), t.nn.Tanh()])[1:]
    return list(layers[1:].state_dict()), type(layers[-1]).__name__, type(some).__name__, len(some)


@program
def adversarial_steps_with_a_frozen_critic(t):
    made, critic = t.nn.Linear(2, 2), t.nn.Sequential(t.nn.Linear(2, 3), t.nn.LeakyReLU(0.2), t.nn.Linear(3, 1))
    with t.no_grad():
        for p in [*made.parameters(), *critic.parameters()]:
            p.copy_(t.arange(float(p.numel())).reshape(p.shape) / 5 - 0.4)
    score = critic(made(t.tensor([[1.0, -2.0], [0.5, 3.0]])))
    critic.requires_grad_(False)
    loss = t.nn.BCEWithLogitsLoss(pos_weight=t.tensor([2.0]))(score, t.ones(2, 1))
    loss.backward()
    return loss, *(p.grad for p in made.parameters()), *(p.grad for p in critic.parameters()), repr(critic)


# --- hooks ------------------------------------------------------------------------------------------------------------


@program
def retained_gradients_are_what_hooks_make_of_them(t):
    x = t.ones(2, requires_grad=True)
    y = x * 3
    y.retain_grad()
    y.register_hook(lambda g: g * 2)
    y.sum().backward()
    return y.grad, x.grad


@program
def retained_gradients_are_those_of_the_values_after_a_write(t):
    x = t.ones(2, requires_grad=True)
    y, z = x * 3, x * 4
    y.retain_grad()
    z.retain_grad()
    y.mul_(2)
    z[0] = 7.0
    (y * 5 + z * z).sum().backward()
    return y.grad, z.grad, x.grad


@program
def a_hook_may_not_change_the_shape(t):
    x = t.ones(2, requires_grad=True)
    x.register_hook(lambda g: g[:1])
    (x * 2).sum().backward()


@program
def a_hook_may_not_change_the_dtype(t):
    x = t.ones(2, requires_grad=True)
    x.register_hook(lambda g: g.double())
    (x * 2).sum().backward()


@program
def a_hook_for_a_while(t):
    x = t.ones(2, requires_grad=True)
    with x.register_hook(lambda g: g * 2):
        x.sum().backward()
    x.sum().backward()
    return x.grad


# --- modes ------------------------------------------------------------------------------------------------------------


@program
def a_generator_without_gradient(t):
    w = t.ones(1, requires_grad=True)

    @t.no_grad()
    def numbers():
        try:
            got = yield (w * 2).requires_grad
            while True:
                got = yield got, (w * 2).requires_grad
        except KeyError:
            yield "thrown", (w * 2).requires_grad
        return "end"

    def whole():
        return "returned", (yield from numbers())

    run = whole()
    seen = [next(run), t.is_grad_enabled(), run.send(5), run.throw(KeyError()), t.is_grad_enabled()]
    try:
        next(run)
    except StopIteration as end:
        seen.append(end.value)
    return seen


@program
def decorators_without_parentheses(t):
    w = t.ones(1, requires_grad=True)

    @t.no_grad
    def off():
        return (w * 2).requires_grad, on()

    @t.enable_grad
    def on():
        return (w * 2).requires_grad

    return off(), off.__name__


@program
def inference_mode_switched_off(t):
    w = t.ones(1, requires_grad=True)
    with t.inference_mode(), t.inference_mode(False):
        return (w * 2).requires_grad, t.is_inference_mode_enabled()


# --- Function ---------------------------------------------------------------------------------------------------------


@program
def a_function_with_an_optional_input(t):
    class Scale(t.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * 2 if w is None else x * w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return (g * 2, None) if w is None else (g * w, g * x)

    x = t.tensor([1.0, 3.0], requires_grad=True)
    (Scale.apply(x, None) + Scale.apply(x, x)).sum().backward()
    return x.grad


@program
def a_function_with_outputs_without_gradient(t):
    class Top(t.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            values, index = x.max(0)
            ctx.save_for_backward(index)
            ctx.shape = x.shape
            double = values * 2
            ctx.mark_non_differentiable(double)
            return values, index, double, "top"

        @staticmethod
        def backward(ctx, g, *others):
            (index,) = ctx.saved_tensors
            out = t.zeros(ctx.shape)
            out[index] = g
            return out, None, None

    x = t.tensor([1.0, 3.0, 2.0], requires_grad=True)
    values, index, double, text = Top.apply(x)
    (values * 5).backward()
    return values.requires_grad, index.requires_grad, double.requires_grad, index, text, x.grad


@program
def a_function_with_setup_context(t):
    class Times(t.autograd.Function):
        @staticmethod
        def forward(x, k):
            return x * k

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.k = inputs[1]

        @staticmethod
        def backward(ctx, g):
            return g * ctx.k, None

    x = t.ones(2, requires_grad=True)
    Times.apply(x, 3).sum().backward()
    return x.grad


# --- reductions -------------------------------------------------------------------------------------------------------


@program
def the_gradient_of_no_deviation(t):
    x = t.tensor([[1.0, 1.0], [1.0, 2.0]], requires_grad=True)
    x.std(1).sum().backward()
    return x.grad


@program
def the_gradient_of_a_root_norm_at_zero(t):
    x = t.tensor([0.0, 1.0, 2.0], requires_grad=True)
    x.norm(0.5).backward()
    return x.grad


@program
def float16_reductions_accumulate_in_float32(t):
    x = t.full((5000,), 100.0, dtype=t.float16, requires_grad=True)
    mean = x.mean()
    mean.backward()
    loss = t.nn.functional.mse_loss(x, -x)
    big = t.tensor([300.0, 1.0, -2.0, 4.0] * 10, dtype=t.float16)
    return mean, x.grad, loss, t.ones(5000, dtype=t.float16).cumsum(0)[-1], big.norm(), big.var(), big.std()


# --- checkpoint -------------------------------------------------------------------------------------------------------


def of(t):
    return checkpoint if t is tg else __import__("torch.utils.checkpoint").utils.checkpoint.checkpoint


def weight_and_input(t):
    return t.nn.Parameter(t.full((4, 4), 0.3)), t.full((2, 4), 0.7, requires_grad=True)


@program
def checkpoint_under_autocast(t):
    w, x = weight_and_input(t)
    with t.autocast("cpu", dtype=t.float16):
        y = of(t)(lambda x: (x @ w).tanh(), x, use_reentrant=False)
    y.float().sum().backward()
    return y, x.grad, w.grad


@program
def checkpoint_uses_results_of_operations_besides(t):
    w, x = weight_and_input(t)
    h = w * w
    y = of(t)(lambda x, factor, by: (x @ h).tanh() * factor * by, x, use_reentrant=False, factor=3, by=w[0])
    (y.sum() + h.sum()).backward()
    return y, x.grad, w.grad


@program
def checkpoint_returns_integers_too(t):
    w, x = weight_and_input(t)
    y, index = of(t)(lambda x: (x @ w, (x > 0).long()), x, use_reentrant=False)
    y.sum().backward()
    return index, index.requires_grad, x.grad


# --- copies -----------------------------------------------------------------------------------------------------------


@program
def a_deep_copy_of_model_and_optimizer_goes_on_training(t):
    model = t.nn.Linear(2, 2)
    with t.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    results = []
    for kind, options in ((t.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (t.optim.AdamW, {"lr": 0.1})):
        optimizer = kind([{"params": [model.bias], "lr": 0.5}, {"params": [model.weight]}], **options)

        def train(model, optimizer):
            (model(t.ones(1, 2)) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        train(model, optimizer)
        for other in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
            train(*other)
            train(*other)
            results += list(other[0].parameters())
        results += list(model.parameters())
    return results


@pytest.mark.parametrize("function", PROGRAMS)
def test_same_program(function):
    check(outcome(function, tg), outcome(function, torch))


@pytest.mark.parametrize("name", ["cross_entropy", "kl_div", "binary_cross_entropy_with_logits"])
def test_losses_refuse_the_old_spelling_of_reduction(name):
    loss = getattr(tg.nn.functional, name)
    for option in ("size_average", "reduce"):
        with pytest.raises(tg.OpError, match=f"{name}: size_average and reduce are not offered"):
            loss(tg.ones(2, 3), tg.ones(2, 3), **{option: False})
