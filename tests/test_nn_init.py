"""tensorgrad.nn.init and the clipping of tensorgrad.nn.utils against torch.nn."""
import math

import numpy as np
import pytest

import tensorgrad as tg
from tensorgrad import nn
from tensorgrad.nn import init, utils

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def seeded_torch():
    torch.manual_seed(0)


# ---- init ----

@pytest.mark.parametrize("call, low, high", [
    (lambda t: init.uniform_(t, -2, 3), -2, 3),
    (lambda t: init.xavier_uniform_(t, gain=2), -2 * math.sqrt(6 / 500), 2 * math.sqrt(6 / 500)),
    (lambda t: init.kaiming_uniform_(t, a=math.sqrt(5)), -1 / math.sqrt(300), 1 / math.sqrt(300)),
    (lambda t: init.kaiming_uniform_(t, mode="fan_out", nonlinearity="relu"), -math.sqrt(6 / 200), math.sqrt(6 / 200)),
])
def test_uniform_inits(call, low, high):
    t = tg.empty(200, 300)
    assert call(t) is t
    a = t.numpy()
    assert low <= a.min() < low + 1e-3 * (high - low) and high - 1e-3 * (high - low) < a.max() <= high
    assert abs(a.mean() - (low + high) / 2) < 5e-3 * (high - low)


@pytest.mark.parametrize("call, mean, std", [
    (lambda t: init.normal_(t, 1.5, 0.2), 1.5, 0.2),
    (lambda t: init.xavier_normal_(t), 0, math.sqrt(2 / 500)),
    (lambda t: init.kaiming_normal_(t, nonlinearity="relu"), 0, math.sqrt(2 / 300)),
    (lambda t: init.kaiming_normal_(t, a=1, mode="fan_out"), 0, math.sqrt(1 / 200)),
])
def test_normal_inits(call, mean, std):
    t = tg.empty(200, 300, dtype=tg.float64)
    a = call(t).numpy()
    assert abs(a.mean() - mean) < 0.02 * std and abs(a.std() / std - 1) < 0.02
    assert abs(((a - mean) / std > 1).mean() - 0.1587) < 0.01


def test_trunc_normal():
    a = init.trunc_normal_(tg.empty(200, 300), mean=1, std=2, a=0, b=2).numpy()
    theirs = torch.nn.init.trunc_normal_(torch.empty(200, 300), mean=1, std=2, a=0, b=2).numpy()
    assert a.min() >= 0 and a.max() <= 2 and abs(a.mean() - 1) < 0.01 and abs(a.std() - theirs.std()) < 0.01
    with pytest.raises(ValueError, match="lies in"):
        init.trunc_normal_(tg.empty(2), a=8, b=9)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (4, 2, 3)])
def test_orthogonal(shape):
    matrix = init.orthogonal_(tg.empty(*shape, dtype=tg.float64), gain=2.0).numpy().reshape(shape[0], -1)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-12)


def test_gains_and_constants():
    for name in ("linear", "sigmoid", "tanh", "relu", "selu", "leaky_relu"):
        assert init.calculate_gain(name) == pytest.approx(torch.nn.init.calculate_gain(name))
    assert init.calculate_gain("leaky_relu", 0.3) == pytest.approx(torch.nn.init.calculate_gain("leaky_relu", 0.3))
    assert (init.constant_(tg.empty(3), 2.5).numpy() == 2.5).all()
    assert (init.ones_(tg.empty(3)).numpy() == 1).all() and not init.zeros_(tg.empty(3)).numpy().any()
    with pytest.raises(ValueError, match="at least two dimensions"):
        init.xavier_normal_(tg.empty(3))
    with pytest.raises(ValueError, match="nonlinearity 'swish'"):
        init.calculate_gain("swish")


def test_init_repeats_with_the_seed_and_marks_the_change():
    p = nn.Parameter(tg.zeros(4, 4))
    y = (p * p).sum()
    tg.manual_seed(5)
    first = init.normal_(p).detach().numpy().copy()
    tg.manual_seed(5)
    assert np.array_equal(init.normal_(p).detach().numpy(), first) and p.is_leaf and p.requires_grad
    with pytest.raises(RuntimeError, match="in-place"):  # p was saved for backward
        y.backward()


def test_default_initial_values_have_torch_bounds():
    ours, theirs = nn.Linear(50, 400), torch.nn.Linear(50, 400)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        bound = 1 / math.sqrt(50)
        assert abs(p.detach().numpy()).max() <= bound and abs(q.detach().numpy()).max() <= bound
        assert abs(p.detach().numpy().std() - bound / math.sqrt(3)) < 0.1 * bound
    assert abs(nn.Embedding(100, 100).weight.detach().numpy().std() - 1) < 0.02


# ---- clipping ----

def grads_for_clipping(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = [(300, 400), (7,), (), (0, 3), (5, 1, 2)]  # the first spans several blocks
    grads = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    ours = [nn.Parameter(tg.zeros(*g.shape, dtype=g.dtype)) for g in grads] + [nn.Parameter(tg.zeros(2))]
    theirs = [torch.nn.Parameter(torch.from_numpy(np.zeros_like(g))) for g in grads]
    theirs.append(torch.nn.Parameter(torch.zeros(2)))
    for g, p, q in zip(grads, ours, theirs, strict=False):
        p.grad, q.grad = tg.tensor(g), torch.from_numpy(g.copy())
    return ours, theirs


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("norm_type", [1, 2, 2.5, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_grad_norm(dtype, tolerance, norm_type, max_norm):
    ours, theirs = grads_for_clipping(dtype)
    for q in theirs[:-1]:
        q.data, q.grad = q.data.double(), q.grad.double()  # in float32, PyTorch's own 1-norm is off by 6e-6
    expected = torch.nn.utils.clip_grad_norm_([q for q in theirs if q.numel()], max_norm, norm_type)
    total = utils.clip_grad_norm_(ours, max_norm, norm_type)
    assert isinstance(total, tg.Tensor) and total.shape == () and total.dtype == np.dtype(dtype)
    np.testing.assert_allclose(total.item(), expected.item(), rtol=tolerance)
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            np.testing.assert_allclose(p.grad.numpy(), q.grad.numpy(), rtol=2 * tolerance)


def test_clip_grad_norm_edges():
    p = nn.Parameter(tg.zeros(3))
    assert utils.clip_grad_norm_([p], 1.0).item() == 0 and utils.clip_grad_norm_(iter([p]), 1.0).item() == 0
    p.grad = tg.tensor([3.0, math.nan, 4.0])
    with pytest.raises(RuntimeError, match="total norm"):
        utils.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    assert np.array_equal(p.grad.numpy()[[0, 2]], [3, 4])
    assert math.isnan(utils.clip_grad_norm_(p, 1.0, math.inf).item())
    assert np.isnan(p.grad.numpy()).all()  # as in PyTorch
    p.grad = tg.tensor([3.0, 0.0, 4.0])[::1]
    assert utils.clip_grad_norm_(p, math.inf).item() == 5
    wide = nn.Parameter(tg.zeros(3, 5))
    wide.grad = tg.ones(5, 3).t()  # not contiguous
    assert utils.clip_grad_norm_(wide, 1.0).item() == pytest.approx(math.sqrt(15))
    np.testing.assert_allclose(wide.grad.numpy(), 1 / math.sqrt(15), rtol=1e-5)


def test_clip_grad_value():
    ours, theirs = grads_for_clipping()
    utils.clip_grad_value_(ours, 0.3)
    torch.nn.utils.clip_grad_value_(theirs, 0.3)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        assert np.array_equal(p.grad.numpy(), q.grad.numpy())
