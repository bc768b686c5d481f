"""tg.cuda.graphed_step on the stand-in: replayed steps are the eager ones, and what cannot be recorded is refused."""

from __future__ import annotations

import numpy as np
import pytest
import standin
from standin_device import kernels  # noqa: F401
from standin_graphs import Machine

import tensorgrad as tg
from gpt import GPT, GPTConfig
from tensorgrad import optim
from tensorgrad.nn.utils import clip_grad_norm_


def machine_for(monkeypatch, opt):
    """A Machine that leaves the optimizer's memory alone and repeats the numbers of its steps."""
    def buffers():
        return [b for flat in opt._flat for b in flat.buffers]

    def arrays():
        for b in buffers():
            yield from (b.data, b.grad, *b.state.values(), b._left_out[1])
            if b._shadow is not None:
                yield b._shadow

    def keep():
        kept = [(b, list(b.steps)) for b in buffers()]

        def put_back():
            for b, steps in kept:
                b.steps = list(steps)

        return put_back

    return Machine(monkeypatch, arrays, keep)


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
            machine = machine_for(monkeypatch, opt)
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
    machine_for(monkeypatch, opt)
    step = tg.cuda.graphed_step(gradients, opt, *batch(0))
    step(*batch(0))
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="parameters were changed"):
        step(*batch(0))


def test_what_cannot_be_recorded(kernels, monkeypatch):  # noqa: F811
    model, opt, gradients = make(None, dropout=0.1)
    machine_for(monkeypatch, opt)
    with pytest.raises(RuntimeError, match="random numbers are drawn"):
        tg.cuda.graphed_step(gradients, opt, *batch(0))
    assert opt.state_dict()["state"] == {}, "no step was made"
    with pytest.raises(RuntimeError, match="must be AdamW, not SGD"):
        tg.cuda.graphed_step(gradients, optim.SGD(model.parameters()), *batch(0))
    with pytest.raises(RuntimeError, match="must be on a GPU"):
        tg.cuda.graphed_step(gradients, opt, tg.ones(2), tg.ones(2))
