"""Memory of a training step: what is overwritten, and that nobody sees it."""

import numpy as np
import pytest

import tensorgrad as tg
from tensorgrad.nn import functional as F

# --- the gradient of cross-entropy takes the place of the logits ------------------------------------------------------

ROWS, CLASSES = 300, 40


@pytest.fixture
def made():
    """(x, weight, target): the logits are x @ weight.T."""
    rng = np.random.default_rng(3)
    x, weight = (tg.tensor(rng.standard_normal(shape), dtype=tg.float32) for shape in ((ROWS, 8), (CLASSES, 8)))
    return x, weight.requires_grad_(), tg.tensor(rng.integers(0, CLASSES, ROWS))


def logits_of(x, weight):
    return F.linear(x.reshape(3, -1, 8), weight).view(-1, CLASSES)


def gradient_place(loss):
    """Run backward; where in memory the logits' gradient was, and where the logits had been."""
    node = loss.node
    while node.name != "cross_entropy":
        node = next(parent for parent in node.parents if parent is not None)
    places = [node._saved[0][0].ctypes.data]
    node.parents[0].hooks = {0: lambda g: places.append(g.array.ctypes.data)}
    loss.backward()
    return places


def expected(x, weight, target):
    x, weight = x.double(), weight.detach().double().requires_grad_()
    (x @ weight.t()).log_softmax(1).gather(1, target.unsqueeze(1)).mean().neg().backward()
    return weight.grad.numpy()


def test_logits_that_nobody_holds_are_overwritten(made):
    x, weight, target = made
    logits, gradient = gradient_place(F.cross_entropy(logits_of(x, weight), target))
    assert logits == gradient
    np.testing.assert_allclose(weight.grad.numpy(), expected(*made), atol=1e-6)


HOLD = {
    "the tensor": lambda logits: logits,
    "a view": lambda logits: logits[3:5, 1:],
    "a view of other shape": lambda logits: logits.view(3, -1),
    "the array": lambda logits: logits.detach().numpy(),
    "a view of the array": lambda logits: logits.detach().numpy()[::2].T,
    "a memoryview": lambda logits: memoryview(logits.detach().numpy()),
    "detached": lambda logits: logits.detach(),
    "DLPack": lambda logits: np.from_dlpack(logits.detach()),
}


@pytest.mark.parametrize("how", HOLD)
def test_logits_that_somebody_holds_stay(made, how):
    x, weight, target = made
    logits = logits_of(x, weight)
    before, held = logits.detach().numpy().copy(), HOLD[how](logits)
    value = np.array(held.detach() if isinstance(held, tg.Tensor) else held)
    loss = F.cross_entropy(logits, target)
    del logits
    first, gradient = gradient_place(loss)
    assert first != gradient
    np.testing.assert_array_equal(np.asarray(held.detach() if isinstance(held, tg.Tensor) else held), value)
    np.testing.assert_array_equal(logits_of(x, weight).detach().numpy(), before)
    np.testing.assert_allclose(weight.grad.numpy(), expected(*made), atol=1e-6)


def test_logits_that_the_graph_needs_stay(made):
    """A second loss of the same logits, a second backward, a gradient of the gradient."""
    x, weight, target = made
    want = expected(*made)

    def both():
        logits = logits_of(x, weight)
        return F.cross_entropy(logits, target) + (logits.exp().sum() + logits.square().sum()) * 0

    both().backward()
    np.testing.assert_allclose(weight.grad.numpy(), want, atol=1e-6)
    weight.grad = None
    loss = F.cross_entropy(logits_of(x, weight), target)
    loss.backward(retain_graph=True)
    loss.backward()
    np.testing.assert_allclose(weight.grad.numpy(), 2 * want, atol=1e-6)
    with pytest.raises(RuntimeError, match="second time|freed|retain_graph"):
        loss.backward()
    loss = F.cross_entropy(logits_of(x, weight), target)
    (g,) = tg.autograd.grad(loss, weight, create_graph=True)
    np.testing.assert_allclose(g.detach().numpy(), want, atol=1e-6)
    assert tg.autograd.grad(g.square().sum(), weight)[0].square().sum().item() > 0


def test_memory_of_others_stays(made):
    """Logits that are a leaf, and logits around an array of the user's."""
    x, weight, target = made
    array = logits_of(x, weight).detach().numpy().copy()
    before = array.copy()
    for logits in (tg.from_numpy(array).requires_grad_(), tg.from_numpy(np.asarray(bytearray(array))
                   .view(np.float32).reshape(array.shape)).requires_grad_()):
        F.cross_entropy(logits, target).backward()
        assert not np.shares_memory(logits.grad.numpy(), logits.detach().numpy())
        np.testing.assert_array_equal(logits.detach().numpy(), before)


def test_an_interrupted_backward_cannot_be_repeated(made, monkeypatch):
    x, weight, target = made
    loss = F.cross_entropy(logits_of(x, weight), target)

    def interrupted(xp, logits, *others):
        logits[:5] = 0
        raise KeyboardInterrupt

    from tensorgrad.kernels import routines
    monkeypatch.setattr(routines(tg.device("cpu")), "cross_entropy_backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="second time|freed|retain_graph"):
        loss.backward()
