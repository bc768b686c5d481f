"""Flat storage: parameters, gradients and state are views, and everything done to them from outside still works."""
import copy
import gc
import tracemalloc

import numpy as np
import pytest

import tensorgrad as tg
from tensorgrad import nn, optim
from tensorgrad.nn.utils import merged

torch = pytest.importorskip("torch")
from optim_pairs import OPTIMIZERS, assert_equal, give_gradients, model_pair, train_pair, twins  # noqa: E402


def shares(a, b):
    return np.shares_memory(a, b)


def test_parameters_gradients_and_state_live_in_flat_buffers():
    ours, _ = model_pair("float32")
    opt = optim.AdamW(ours.parameters(), lr=0.01)
    buffer, = opt._flat[0].buffers
    for i, p in enumerate(ours.parameters()):
        assert shares(p.array, buffer.data) and p.array.flags.c_contiguous
        assert (p.array.ctypes.data - buffer.data.ctypes.data) % 64 == 0
        assert buffer.spans[i][1] - buffer.spans[i][0] == p.numel()
    ours(tg.ones(2, 6)).sum().backward()
    assert all(shares(p.grad.array, buffer.grad) for p in ours.parameters())
    assert buffer.gather() == [(0, 6, 1)]  # one run: everything is updated together
    opt.step()
    first = next(ours.parameters())
    assert opt.state[first]["step"] == 2 and shares(opt.state[first]["exp_avg"].array, buffer.state["exp_avg"])
    arrays = [p.array for p in ours.parameters()]
    ours.load_state_dict({k: v + 1 for k, v in ours.state_dict().items()})
    opt.step()
    assert all(p.array is a for p, a in zip(ours.parameters(), arrays, strict=True))


@pytest.mark.parametrize("drop, step", [("optimizer", False), ("optimizer", True), ("module", False), ("module", True),
                                        ("by hand", True)])
def test_a_gradient_that_somebody_holds_is_not_overwritten(drop, step):
    holder = nn.Module()
    holder.p = p = nn.Parameter(tg.ones(3))
    opt = optim.SGD([p], lr=0.0)
    flat = opt._flat[0].buffers[0]
    (p * 2).sum().backward()
    assert shares(p.grad.array, flat.grad)
    held, part = p.grad.detach(), p.grad[1:]
    if step:
        opt.step()
    if drop == "optimizer":
        opt.zero_grad()
    elif drop == "module":
        holder.zero_grad()
    else:
        p.grad = None
    (p * 5).sum().backward()
    assert (held.numpy() == 2).all() and (part.numpy() == 2).all() and (p.grad.numpy() == 5).all()
    opt.step()
    assert (flat.grad[:3] == 5).all() and (held.numpy() == 2).all()
    del held, part
    opt.zero_grad()
    (p * 7).sum().backward()
    assert shares(p.grad.array, flat.grad)  # nobody holds it any more


def test_replaced_data_and_gradients_are_taken_in():
    ours, theirs = twins([(3,), (2, 2)], "float64")
    opt, reference = optim.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    rng = np.random.default_rng(0)
    for _ in range(3):
        give_gradients(ours, theirs, rng)
        new = rng.normal(size=3)
        ours[0].data, theirs[0].data = tg.tensor(new), torch.tensor(new)
        opt.step()
        reference.step()
    assert_equal(ours, theirs, "float64")
    assert shares(ours[0].array, opt._flat[0].buffers[0].data)


def test_step_bumps_versions():
    p = nn.Parameter(tg.ones(3))
    opt = optim.SGD([p])
    loss = (p * p).sum()
    p.grad = tg.ones(3)
    opt.step()
    with pytest.raises(RuntimeError, match="in-place"):
        loss.backward()


def test_two_optimizers_may_share_parameters():
    ours, theirs = twins([(3,), (2, 2)], "float64")
    pairs = [(optim.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)),
             (optim.SGD(ours[:1], lr=0.1, momentum=0.9), torch.optim.SGD(theirs[:1], lr=0.1, momentum=0.9))]
    rng = np.random.default_rng(0)
    for step in range(6):
        give_gradients(ours, theirs, rng)
        for o in pairs[step % 2]:
            o.step()
    assert_equal(ours, theirs, "float64")


def test_frozen_parameters_are_left_alone_until_they_train():
    ours, theirs = model_pair()
    for model in (ours, theirs):
        model[0].requires_grad_(False)
    array = ours[0].weight.array
    opt = optim.AdamW(ours.parameters(), lr=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    assert ours[0].weight.array is array and len(opt._flat[0].slots) == 4
    train_pair(ours, theirs, opt, reference)
    assert ours[0].weight.array is array
    for model in (ours, theirs):
        model[0].requires_grad_(True)
        model[3].requires_grad_(False)
    train_pair(ours, theirs, opt, reference)
    assert_equal(ours.parameters(), theirs.parameters(), "float64")
    assert len(opt._flat[0].slots) == 6


def test_state_moves_with_the_dtype():
    ours, theirs = model_pair("float32")
    opt, reference = optim.AdamW(ours.parameters(), lr=0.1), torch.optim.AdamW(theirs.parameters(), lr=0.1)
    train_pair(ours, theirs, opt, reference)
    ours.double()
    opt.zero_grad()
    ours(tg.ones(2, 6, dtype=tg.float64)).sum().backward()
    assert all(p.grad.dtype == tg.float64 for p in ours.parameters())
    train_pair(ours, model_pair()[1], opt, torch.optim.AdamW(theirs.parameters()), steps=1)
    buffer, = opt._flat[0].buffers
    assert buffer.dtype == tg.float64 and set(buffer.steps) == {4}
    assert all(p.dtype == tg.float64 and shares(p.array, buffer.data) for p in ours.parameters())


def test_mixed_dtypes_and_noncontiguous_parameters():
    a, b = np.arange(6.0).reshape(2, 3), np.arange(4.0, dtype="float32")
    ours = [nn.Parameter(tg.from_numpy(a).t()), nn.Parameter(tg.from_numpy(b))]
    theirs = [torch.nn.Parameter(torch.from_numpy(a.copy()).T), torch.nn.Parameter(torch.from_numpy(b.copy()))]
    opt, reference = optim.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    assert len(opt._flat[0].buffers) == 2
    rng = np.random.default_rng(0)
    for _ in range(3):
        give_gradients(ours, theirs, rng)
        opt.step()
        reference.step()
    assert_equal(ours, theirs, "float32")


@pytest.mark.parametrize("name", ["sgd_nesterov", "adamw", "adam_options"])
def test_step_allocates_nothing(name):
    kind, options = OPTIMIZERS[name]
    p = nn.Parameter(tg.ones(1000, 1000))
    opt = getattr(optim, kind)([p], **options)
    p.grad = tg.ones(1000, 1000)
    opt.step()
    gc.collect()
    tracemalloc.start()
    opt.step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000  # bytes; the parameter has 4,000,000


def test_products_write_weight_gradients_where_they_belong():
    """In a plain backward, with nobody listening, linear and embedding put their gradients straight into flat storage:
    the first in place of what is there, later ones added. Everything else must see the same values."""
    def model():
        tg.manual_seed(0)
        net = nn.Module()
        net.wte, net.a, net.head = nn.Embedding(300, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 300, bias=False)
        net.head.weight = net.wte.weight  # tied: a product and a scattered sum for one weight
        return net

    def loss(net, ids):
        x = net.wte(ids)
        return (net.head(net.a(net.a(x).tanh())) ** 2).mean()  # the weight of `a` is used twice

    ids = tg.tensor([[1, 2, 2], [299, 0, 1]])
    plain, flat, watched = model(), model(), model()
    opts = [optim.AdamW(net.parameters(), lr=0.1) for net in (flat, watched)]
    written = []
    for _ in range(2):
        for _ in range(2):  # accumulation over two batches
            for net in (plain, flat):
                loss(net, ids).backward()
            handles = [p.register_hook(lambda g: None) for p in watched.parameters()]  # a hook sees whole gradients
            loss(watched, ids).backward()
            for handle in handles:
                handle.remove()
        buffer, = opts[0]._flat[0].buffers
        for p, q, w in zip(plain.parameters(), flat.parameters(), watched.parameters(), strict=True):
            assert shares(q.grad.array, buffer.grad) and np.isfinite(q.grad.array).all()
            np.testing.assert_allclose(q.grad.array, p.grad.array, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(w.grad.array, p.grad.array, rtol=1e-5, atol=1e-7)
        before = [q.grad.array.copy() for q in flat.parameters()]
        grads = tg.autograd.grad(loss(flat, ids), list(flat.parameters()))  # grad() leaves .grad alone
        assert all((q.grad.array == b).all() for q, b in zip(flat.parameters(), before, strict=True))
        assert not any(shares(g.array, buffer.grad) for g in grads)
        written.append(before)
        for opt in opts:
            opt.zero_grad()
        buffer.grad.fill(np.nan)  # nothing of the last round may be left over
        plain.zero_grad()
    np.testing.assert_array_equal(written[0][0], written[1][0])


def test_version_of_a_gradient_counts_direct_writes():
    weight = nn.Parameter(tg.ones(2, 3))
    optim.SGD([weight], lr=0.1)
    x = tg.ones(4, 3)
    nn.functional.linear(x, weight).sum().backward()
    y = (weight.grad * weight.grad.clone().requires_grad_()).sum()  # saves weight.grad
    nn.functional.linear(x, weight).sum().backward()
    with pytest.raises(RuntimeError, match="in-place operation"):
        y.backward()


def test_gradients_of_alternating_groups_are_clipped_as_two_arrays():
    """Weights and biases come by turns and lie in a buffer each: two runs, and the norm and the result are those of
    single gradients. A parameter in between that is left out is not touched."""
    tg.manual_seed(0)
    flat = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))
    single, params = copy.deepcopy(flat), list(flat.parameters())
    optimizer = optim.AdamW([{"params": params[::2]}, {"params": params[1::2]}])
    for model in (flat, single):
        model(tg.ones(3, 5)).square().sum().backward()
    assert len(optimizer.param_groups) == 2
    assert len(merged([p.grad.array for p in params])) == 2
    chosen = [0, 1, 3, 4, 5, 6, 7]
    left = params[2].grad.numpy().copy()
    norms = [nn.utils.clip_grad_norm_([list(model.parameters())[i] for i in chosen], 0.1).item()
             for model in (flat, single)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    np.testing.assert_array_equal(params[2].grad.numpy(), left)
    for i, (a, b) in enumerate(zip(flat.parameters(), single.parameters(), strict=True)):
        if i != 2:
            np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-5)
    assert len(merged([params[i].grad.array for i in chosen])) == 3
