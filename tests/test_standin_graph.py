"""tg.cuda.graphed_step on the stand-in, whose graphs compute the recorded function again from the numbers that the host
had when it was recorded, as a GPU would; recording itself leaves no trace in memory."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import standin
from standin_device import gpu, kernels  # noqa: F401

import tensorgrad as tg
from gpt import GPT, GPTConfig
from tensorgrad import cuda_graph, optim
from tensorgrad.nn.utils import clip_grad_norm_


class Machine:
    """What a capture must leave alone, and what replays it."""

    def __init__(self, monkeypatch, opt):
        self.opt, self.host_copies = opt, []
        machine, record, self.replaying = self, cuda_graph._record, False

        class Stream(standin._Stream):
            def begin_capture(self):
                machine.steps = [list(b.steps) for b in machine.buffers()]
                machine.memory = [(a, a.copy()) for a in machine.arrays()]
                machine.capturing = True

            def end_capture(self):
                machine.capturing = False
                for array, before in machine.memory:
                    array[...] = before
                return machine

        def asarray(a, *rest, original=standin.asarray, **options):
            if machine.capturing and not isinstance(a, standin.ndarray):
                machine.host_copies.append(a)
            return original(a, *rest, **options)

        def recorded(name, function, inputs):
            def remembered(*fixed):
                machine.again = lambda: function(*fixed)
                return function(*fixed)

            launch, machine.outputs, kept = record(name, remembered, inputs)
            return launch, machine.outputs, kept

        self.capturing = False
        monkeypatch.setattr(standin, "asarray", asarray)
        monkeypatch.setattr(cuda_graph, "_record", recorded)
        for name, value in dict(Stream=Stream, MemoryPool=lambda: type("Pool", (), {"malloc": None}),
                                using_allocator=lambda malloc: contextlib.nullcontext()).items():
            monkeypatch.setattr(standin.cuda, name, value, raising=False)
        monkeypatch.setenv("TENSORGRAD_CUBLASLT", "0")
        monkeypatch.setattr(cuda_graph, "capturing", lambda change: None)

    def buffers(self):
        return [b for flat in self.opt._flat for b in flat.buffers]

    def arrays(self):
        for b in self.buffers():
            yield from (b.data, b.grad, *b.state.values(), b._left_out[1])
            if b._shadow is not None:
                yield b._shadow

    def launch(self):
        host = [b.steps for b in self.buffers()]
        for b, steps in zip(self.buffers(), self.steps, strict=True):
            b.steps = list(steps)
        self.outputs.array[...] = self.again().array
        for b, steps in zip(self.buffers(), host, strict=True):
            b.steps = steps


def make(dtype, **fields):
    tg.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16, **fields)).to("cuda")
    opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95))

    def gradients(x, y):
        with tg.autocast(dtype=dtype, enabled=dtype is not None):
            loss = model(x, y)[1]
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        return loss.detach()

    return model, opt, gradients


def batch(seed):
    rng = np.random.default_rng(seed)
    return [tg.tensor(rng.integers(0, 64, (2, 8)), device="cuda") for _ in range(2)]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_replay_equals_eager(dtype, kernels, monkeypatch):  # noqa: F811
    if dtype:
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    found = []
    for graph in (False, True):
        model, opt, gradients = make(dtype)
        for x, y in (batch(100), batch(101)):  # some steps before
            gradients(x, y)
            opt.step()
            opt.zero_grad()
        before = [p.detach().cpu().numpy().copy() for p in model.parameters()]
        if graph:
            machine = Machine(monkeypatch, opt)
            step = tg.cuda.graphed_step(gradients, opt, *batch(0))
            assert machine.host_copies == [], "copies from the host cannot be repeated"
            for p, kept in zip(model.parameters(), before, strict=True):
                np.testing.assert_array_equal(p.detach().cpu().numpy(), kept)
            assert {int(e["step"]) for e in opt.state_dict()["state"].values()} == {2}
        losses = []
        for i in range(5):
            for group in opt.param_groups:
                group["lr"] = 1e-3 * (i + 1)
            if graph:
                with standin.counting() as waits:
                    loss = step(*batch(i))
                assert waits == []
                losses.append(loss.item())
                assert opt.state_dict()["state"][0]["step"].item() == i + 3, "saving in between changes nothing"
            else:
                losses.append(gradients(*batch(i)).item())
                opt.step()
                opt.zero_grad()
        state = opt.state_dict()["state"]
        found.append([np.array(losses), *(p.detach().cpu().numpy() for p in model.parameters()),
                      *(t.cpu().numpy() for e in state.values() for t in e.values())])
    for got, want in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match=r"graphed_step: recorded for \(2, 8\)"):
        step(tg.ones(3, device="cuda"), batch(0)[1])
    gradients(*batch(0))
    opt.step()
    with pytest.raises(RuntimeError, match="the optimizer was used otherwise"):
        step(*batch(0))


def test_weights_changed_outside_are_noticed(kernels, monkeypatch):  # noqa: F811
    model, opt, gradients = make(None)
    Machine(monkeypatch, opt)
    step = tg.cuda.graphed_step(gradients, opt, *batch(0))
    step(*batch(0))
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="parameters were changed"):
        step(*batch(0))


def test_what_cannot_be_recorded(gpu, monkeypatch):  # noqa: F811
    model, opt, gradients = make(None, dropout=0.1)
    Machine(monkeypatch, opt)
    with pytest.raises(RuntimeError, match="random numbers are drawn"):
        tg.cuda.graphed_step(gradients, opt, *batch(0))
    assert opt.state_dict()["state"] == {}, "no step was made"
    with pytest.raises(RuntimeError, match="must be AdamW, not SGD"):
        tg.cuda.graphed_step(gradients, optim.SGD(model.parameters()), *batch(0))
    with pytest.raises(RuntimeError, match="must be on a GPU"):
        tg.cuda.graphed_step(gradients, opt, tg.ones(2), tg.ones(2))
