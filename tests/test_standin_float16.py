"""float16 on a GPU without waiting, on the stand-in: a step with a gradient that is not finite is left out by the
device itself, and everything is as in PyTorch, where the host looks."""

from __future__ import annotations

import numpy as np
import pytest
import standin
from standin_device import gpu, kernels  # noqa: F401

import tensorgrad as tg
from gpt import GPT, GPTConfig
from tensorgrad import amp, nn, optim

torch = pytest.importorskip("torch", reason="compared with PyTorch")
FACTORS = [float("inf"), 1.0, 2.0, float("nan"), float("inf"), 3.0, 0.5, 1.0]  # the losses', one for each step
OPTIMIZERS = {
    "AdamW": dict(lr=0.1, weight_decay=0.1),
    "Adam": dict(lr=0.1, weight_decay=0.1),
    "SGD": dict(lr=0.1, momentum=0.9, weight_decay=0.1, dampening=0.5),
}


def run(lib, name, device, with_unused=lambda step: True, options=None, **how):
    """(parameters after each step, the optimizer's state, waits, scale) of a few steps, some of them left out."""
    values = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    a, b = (lib.nn.Parameter(lib.tensor(v, device=device)) for v in values)
    opt = getattr(lib.optim, name)([a, b], **(options or OPTIMIZERS[name]))
    scaler = lib.amp.GradScaler(device, init_scale=8.0, growth_interval=2)
    seen, waits = [], []
    for step, factor in enumerate(FACTORS):
        with standin.counting() as found:
            loss = (a * a * factor).sum() + ((b * b).sum() if with_unused(step) else 0.0)
            scaler.scale(loss).backward()
            scaler.step(opt, **how)
            scaler.update()
            opt.zero_grad()
        waits += found
        seen += [a.detach().clone(), b.detach().clone()]
    state = {i: {k: np.asarray(v) if lib is torch else v.cpu().numpy() for k, v in entry.items() if v is not None}
             for i, entry in opt.state_dict()["state"].items()}
    return [t.cpu().numpy() for t in seen], state, waits, scaler.get_scale()


def same(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys() and ours[3] == theirs[3]
    for i, entry in theirs[1].items():
        for key, value in entry.items():
            np.testing.assert_allclose(ours[1][i][key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_lockstep_with_torch(name, gpu):  # noqa: F811
    ours = run(tg, name, "cuda", wait=False)
    same(ours, run(torch, name, "cpu"))
    assert ours[2] == []


def test_in_lockstep_with_torch_by_the_kernel(kernels):  # noqa: F811
    ours = run(tg, "AdamW", "cuda", wait=False)
    same(ours, run(torch, "AdamW", "cpu"))
    assert ours[2] == [] and kernels.names == ["unscale", "adamw"] * len(FACTORS)


def test_parameters_that_have_a_gradient_now_and_then(kernels):  # noqa: F811
    """Their numbers of updates differ, which makes the host look once at each change."""
    def sometimes(step):
        return step in (0, 1, 4, 7)

    ours = run(tg, "AdamW", "cuda", sometimes, wait=False)
    same(ours, run(torch, "AdamW", "cpu", sometimes))
    assert len(ours[2]) == 4


def test_muon_is_as_when_the_host_looks(gpu):  # noqa: F811
    options = dict(lr=0.1)
    same(run(tg, "Muon", "cuda", options=options, wait=False), run(tg, "Muon", "cuda", options=options))


def test_16_bit_copies_stay_those_of_the_weights(kernels):  # noqa: F811
    """Written by the optimizer's kernel, also in a step that is left out: the very first one is."""
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    tg.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16)).to("cuda")
    opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
    scaler = amp.GradScaler(init_scale=2.0**40)
    x = tg.tensor(np.random.default_rng(0).integers(0, 64, (2, 8)), device="cuda")
    weight, before = model.transformer.h[0].attn.c_attn.weight, []
    for _ in range(2):
        before.append(weight.detach().cpu().numpy().copy())
        with tg.autocast("float16"):
            loss = model(x, x)[1]
        scaler.scale(loss).backward()
        scaler.step(opt, wait=False)
        scaler.update()
        opt.zero_grad()
        assert weight._half[1] == weight.version()[0], "the optimizer's copy is in use"
        np.testing.assert_array_equal(weight._half[2]._a, weight.array._a.astype(np.float16))
    np.testing.assert_array_equal(*before)
    assert scaler.get_scale() == 2.0**38


def test_saved_in_between_and_gone_on_without_a_scaler(gpu):  # noqa: F811
    p = nn.Parameter(tg.tensor([1.0, 2.0], device="cuda"))
    opt = optim.AdamW([p], lr=0.1)
    for bad, steps in ((1, 0), (0, 1), (1, 1), (0, 2)):
        (p * p).sum().backward()
        opt.step(found_inf=tg.tensor(bad, device="cuda"))
        opt.zero_grad()
        assert [int(e["step"]) for e in opt.state_dict()["state"].values()] == ([steps] if steps else [])
    (p * p).sum().backward()
    opt.step()
    assert opt.state_dict()["state"][0]["step"].item() == 3
    before = p.detach().tolist()
    (p * p).sum().backward()
    opt.step(found_inf=tg.tensor(1.0))  # the CPU's flag: read
    assert p.detach().tolist() == before and opt.state_dict()["state"][0]["step"].item() == 3
