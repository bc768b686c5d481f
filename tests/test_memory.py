"""Memory of a training step: what is counted, freed, used again and overwritten, and that nobody sees it."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

import tensorgrad as tg
from gpt import GPT, GPTConfig
from tensorgrad.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]

# --- memory_stats -----------------------------------------------------------------------------------------------------


def test_arrays_are_counted():
    assert tg.memory_stats()["arrays"] is None
    with tg.track_memory() as memory:
        kept = tg.empty(1000)
        view, other = kept[::2], tg.empty(500, dtype=tg.float64)
        assert (memory.bytes, memory.allocations) == (8000, 2)
        del other
        stats = tg.memory_stats()
        assert (stats["arrays"], stats["arrays_peak"], stats["allocations"]) == (4000, 8000, 2)
        memory.reset_peak()
        assert tg.memory_stats()["arrays_peak"] == 4000
        with pytest.raises(RuntimeError, match="already"), tg.track_memory():
            pass
        del kept
        assert memory.bytes == 4000  # the view holds it
        del view
        assert memory.bytes == 0
        kept = tg.ones(10)
    assert tg.memory_stats()["arrays"] is None
    with tg.track_memory() as again:
        del kept  # of the time before
        assert again.bytes == 0
        kept = tg.ones(10)
    assert kept.sum().item() == 10  # and lives on


def test_the_process_is_measured():
    """In a process of its own, where no freed memory lies ready."""
    code = """
import json
import numpy as np
import tensorgrad as tg
before, held = tg.memory_stats(), np.ones(8_000_000)
print(json.dumps([before, tg.memory_stats()]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    before, after = json.loads(done.stdout)
    assert 60e6 < after["process"] - before["process"] < 80e6
    assert after["process_peak"] > 0.9 * after["process"] and after["page_faults"] > before["page_faults"]


def test_arrays_outlive_the_program_unharmed():
    """The interpreter's end frees what was made while memory was tracked, in whatever order."""
    code = "import tensorgrad as tg\nkept = tg.track_memory().__enter__(), tg.ones(10**6)\nimport sys\nsys.kept = kept"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


# --- a training step --------------------------------------------------------------------------------------------------

LAYERS = 8


@pytest.fixture
def trained():
    """(model, optimizer, step): a GPT whose gradients have their places, as after a first step."""
    model = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=LAYERS, n_head=4, n_embd=64))
    optimizer = tg.optim.AdamW(model.parameters(), lr=1e-3)
    idx, targets = (tg.randint(0, 65, (8, 64)) for _ in range(2))

    def step():
        loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        tg.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step()
    return model, optimizer, step, idx, targets


def falling(model, idx, targets, **options):
    """Bytes of arrays after forward, then as backward leaves each block (the last block first), and the peak."""
    levels, remove = [], []
    with tg.track_memory() as memory:
        def keep_level(module, inputs, output):
            remove.append(output.register_hook(lambda g: levels.append(memory.bytes)))

        handles = [block.register_forward_hook(keep_level) for block in model.transformer.h]
        loss = model(idx, targets)[1]
        levels.append(memory.bytes)
        memory.reset_peak()
        loss.backward(**options)
        for handle in handles:
            handle.remove()
        return levels, memory.peak


def test_activations_are_freed_as_backward_proceeds(trained):
    model, optimizer, _, idx, targets = trained
    optimizer.zero_grad()
    levels, peak = falling(model, idx, targets)
    forward, per_block = levels[0], levels[0] / LAYERS
    assert len(levels) == 1 + LAYERS
    for before, after in zip(levels[2:], levels[3:], strict=False):
        assert after < before - 0.9 * per_block
    assert levels[-1] < 0.3 * forward
    assert peak < forward + per_block  # the gradients of one block at a time
    optimizer.zero_grad()
    levels, peak = falling(model, idx, targets, retain_graph=True)
    assert min(levels) >= 0.95 * forward  # and this is how it looks where nothing is freed


def test_steps_make_the_same_arrays_again(trained):
    step = trained[2]
    counts = []
    with tg.track_memory() as memory:
        for _ in range(4):
            before = memory.allocations
            memory.reset_peak()
            step()
            counts.append((memory.allocations - before, memory.bytes, memory.peak))
    assert counts[1:] == counts[1:2] * 3


def test_inference_makes_no_nodes_and_keeps_nothing(trained):
    """Nothing is recorded, and each array goes as soon as the next operation has read it."""
    model, _, _, idx, targets = trained
    seen = []

    class Watch(tg.autograd.OpHook):
        def after_forward(self, op, arrays, outputs):
            seen.append((op.recording, [t.node for t in outputs], len(op.parents), weakref.ref(op)))

    for mode in (tg.no_grad, tg.inference_mode):
        with mode(), tg.track_memory() as memory:
            with tg.autograd.op_hook(Watch()):
                logits, loss = model(idx, targets)
            small, peak = memory.bytes, memory.peak
        assert len(seen) > 10 * LAYERS
        for recording, nodes, parents, op in seen:
            assert not recording and nodes == [None] * len(nodes) and not parents and op() is None
        assert small < logits.numel() * 4 + 1000
        seen.clear()
    with tg.track_memory() as memory:
        loss = model(idx, targets)[1]
        recorded = memory.peak
        assert loss.node is not None
    assert peak < recorded / 4, (peak, recorded)


FAULTS = """
import json
import tensorgrad as tg
from gpt import GPT, GPTConfig
model = GPT(GPTConfig(block_size=128, vocab_size=65, n_layer=4, n_head=4, n_embd=256))
optimizer = tg.optim.AdamW(model.parameters(), lr=1e-3)
idx, targets = (tg.randint(0, 65, (8, 128)) for _ in range(2))
faults = []
for _ in range(8):
    before = tg.memory_stats()["page_faults"]
    loss = model(idx, targets)[1]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    faults.append(tg.memory_stats()["page_faults"] - before)
print(json.dumps(faults))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_freed_memory_is_used_again():
    """Later steps touch next to no new memory; without the settings of kernels/memory.py each does so again."""
    def later(**settings):
        done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT), **settings}, timeout=120)
        return sorted(json.loads(done.stdout)[3:])[2]

    assert later() < 0.05 * later(TENSORGRAD_MALLOPT="0")


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


def test_large_logits_lie_in_kept_blocks_and_are_overwritten_too():
    x, weight, target = tg.randn(180, 4), tg.randn(50304, 4).requires_grad_(), tg.randint(0, 50304, (180,))
    logits = F.linear(x, weight).view(-1, 50304)                                                       # 36 MB
    first, gradient = gradient_place(F.cross_entropy(logits, target))
    assert first != gradient
    held = weight.grad.numpy().copy()
    weight.grad = logits = None
    first, gradient = gradient_place(F.cross_entropy(F.linear(x, weight).view(-1, 50304), target))
    assert first == gradient
    np.testing.assert_allclose(weight.grad.numpy(), held, atol=1e-6)


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
