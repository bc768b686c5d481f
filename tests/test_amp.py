"""autocast and GradScaler against PyTorch's on the CPU, and on the stand-in for CuPy."""

from __future__ import annotations

import numpy as np
import pytest
import standin
from standin_device import gpu  # noqa: F401

import tensorgrad as tg
from gpt import GPT, GPTConfig
from tensorgrad import amp, nn, optim
from tensorgrad.ops import nn as ops

torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")

FUSED = pytest.mark.skipif(ops.LEVEL == "composed", reason="the composed level has no fused operations")

# name -> function of (library, functional, x (2, 3, 4) float32, w (5, 4), b (5), h (2, 3, 5) of 16 bits, ids (6) zeros)
CALLS = {
    "linear": lambda t, F, x, w, b, h, i: F.linear(x, w, b),
    "linear of 16 bits": lambda t, F, x, w, b, h, i: F.linear(h, w.t()),
    "matmul": lambda t, F, x, w, b, h, i: x @ w.t(),
    "matmul mixed": lambda t, F, x, w, b, h, i: h @ w,
    "matmul vector": lambda t, F, x, w, b, h, i: t.matmul(w, x[0, 0]),
    "mm": lambda t, F, x, w, b, h, i: w.mm(w.t()),
    "bmm": lambda t, F, x, w, b, h, i: x.bmm(x.mT),
    "mv": lambda t, F, x, w, b, h, i: w.mv(x[0, 0]),
    "dot": lambda t, F, x, w, b, h, i: b.dot(b),
    "addmm": lambda t, F, x, w, b, h, i: t.addmm(b, w, w.t()),
    "baddbmm": lambda t, F, x, w, b, h, i: t.baddbmm(x[:, :, :3], x, x.mT),
    "einsum": lambda t, F, x, w, b, h, i: t.einsum("btc,oc->bto", x, w),
    "float64": lambda t, F, x, w, b, h, i: F.linear(x.double(), w.double()),
    "integers": lambda t, F, x, w, b, h, i: i.reshape(2, 3) @ i.reshape(3, 2),
    "attention": lambda t, F, x, w, b, h, i: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "gelu": lambda t, F, x, w, b, h, i: F.gelu(h),
    "silu": lambda t, F, x, w, b, h, i: F.silu(h),
    "relu": lambda t, F, x, w, b, h, i: F.relu(h),
    "softmax": lambda t, F, x, w, b, h, i: F.softmax(h, -1),
    "log_softmax": lambda t, F, x, w, b, h, i: F.log_softmax(h, -1),
    "layer_norm of 16": lambda t, F, x, w, b, h, i: F.layer_norm(h, (5,), b, b),
    "layer_norm of 32": lambda t, F, x, w, b, h, i: F.layer_norm(x, (4,), w[0], w[1]),
    "rms_norm of 16": lambda t, F, x, w, b, h, i: F.rms_norm(h, (5,), b),
    "cross_entropy": lambda t, F, x, w, b, h, i: F.cross_entropy(h.reshape(6, 5), i),
    "cross_entropy smooth": lambda t, F, x, w, b, h, i: F.cross_entropy(h.reshape(6, 5), i, label_smoothing=0.1),
    "nll_loss": lambda t, F, x, w, b, h, i: F.nll_loss(h.reshape(6, 5), i),
    "mse_loss": lambda t, F, x, w, b, h, i: F.mse_loss(h, h),
    "l1_loss": lambda t, F, x, w, b, h, i: F.l1_loss(h, h * 2.0),
    "smooth_l1_loss": lambda t, F, x, w, b, h, i: F.smooth_l1_loss(h, h * 2.0),
    "bce": lambda t, F, x, w, b, h, i: F.binary_cross_entropy_with_logits(h, h),
    "embedding": lambda t, F, x, w, b, h, i: F.embedding(i, w),
    "add": lambda t, F, x, w, b, h, i: h + b,
    "mul": lambda t, F, x, w, b, h, i: h * 2.0,
    "sum": lambda t, F, x, w, b, h, i: h.sum(),
    "mean": lambda t, F, x, w, b, h, i: h.mean(-1),
    "exp": lambda t, F, x, w, b, h, i: h.exp(),
    "cat": lambda t, F, x, w, b, h, i: t.cat([h, x], -1),
    "prod": lambda t, F, x, w, b, h, i: h.prod(),
}


def inputs(lib, dtype, device=None, grad=True):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 4), (5, 4), (5,), (2, 3, 5))]
    x, w, b, h = (lib.tensor(a, device=device, requires_grad=grad) for a in arrays)
    return x, w, b, h.to(getattr(lib, dtype)), lib.tensor(np.zeros(6, np.int64), device=device)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def number(t):
    return np.asarray(t.detach().cpu().double().numpy())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", CALLS)
def test_dtypes_and_values_are_those_of_torch(name, device, gpu):  # noqa: F811
    call, outs, grads = CALLS[name], [], []
    for lib, place in ((torch, "cpu"), (tg, device)):
        given = inputs(lib, "bfloat16", place)
        with lib.autocast("cpu" if lib is torch else device, dtype=lib.bfloat16):
            out = call(lib, lib.nn.functional, *given)
        outs.append(out)
        leaves = [t for t in given[:3]]
        if out.requires_grad:
            found = lib.autograd.grad(out.sum(), leaves, allow_unused=True)
            grads.append([None if g is None else g for g in found])
    assert name_of(outs[0].dtype) == name_of(outs[1].dtype) and tuple(outs[0].shape) == outs[1].shape
    scale = np.abs(number(outs[0])).max() + 1e-3
    np.testing.assert_allclose(number(outs[1]), number(outs[0]), rtol=0.02, atol=0.02 * scale)
    for a, b in zip(*grads, strict=True) if grads else ():
        assert (a is None) == (b is None)
        if a is not None:
            assert name_of(a.dtype) == name_of(b.dtype)
            scale = np.abs(number(a)).max() + 1e-3
            np.testing.assert_allclose(number(b), number(a), rtol=0.05, atol=0.03 * scale)


def test_contexts_nest_switch_off_and_decorate():
    x, w = tg.ones(2, 3), tg.ones(3, 3)
    assert not tg.is_autocast_enabled() and (x @ w).dtype == tg.float32
    with tg.autocast("bfloat16"):
        assert tg.is_autocast_enabled("cpu") and tg.get_autocast_dtype("cpu") == tg.bfloat16
        assert (x @ w).dtype == tg.bfloat16
        with tg.autocast("cpu", enabled=False):
            assert (x @ w).dtype == tg.float32 and not tg.is_autocast_enabled("cpu")
        with tg.autocast(dtype=tg.float16):
            assert (x @ w).dtype == tg.float16
        with tg.autocast("cuda", dtype=tg.float16):
            assert (x @ w).dtype == tg.bfloat16
        assert (x @ w).dtype == tg.bfloat16

    @tg.autocast("cpu")
    def run():
        return (x @ w).dtype

    assert run() == tg.bfloat16 and (x @ w).dtype == tg.float32
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        tg.autocast("cpu", dtype=tg.float32)
    assert amp.autocast is tg.autocast


@FUSED
def test_weights_are_cast_once_until_they_change():
    layer, x = nn.Linear(4, 4), tg.ones(2, 4)
    opt = optim.SGD(layer.parameters(), lr=1.0)
    with tg.autocast("bfloat16"):
        layer(x)
        kept = layer.weight._half[2]
        layer(x).sum().backward()
        assert layer.weight._half[2] is kept
        opt.step()
        y = layer(x)
        assert layer.weight._half[2] is not kept
    with tg.no_grad():
        want = (x @ layer.weight.t() + layer.bias).numpy()
    np.testing.assert_allclose(y.detach().float().numpy(), want, rtol=0.02, atol=0.02)
    assert layer.weight.dtype == layer.weight.grad.dtype == tg.float32


@FUSED
def test_double_backward_under_autocast():
    x = tg.randn(3, 4, requires_grad=True)
    layer = nn.Linear(4, 2)
    with tg.autocast("bfloat16"):
        y = layer(x).float().pow(2).sum()
    (g,) = tg.autograd.grad(y, x, create_graph=True)
    g.pow(2).sum().backward()
    assert x.grad is not None and layer.weight.grad.dtype == tg.float32


def gpt_losses(device, dtype, steps=12, scaler=None):
    tg.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)).to(device)
    opt = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95))
    rng, losses = np.random.default_rng(0), []
    x = tg.tensor(rng.integers(0, 64, (4, 16)), device=device)
    for _ in range(steps):
        with tg.autocast(dtype=dtype, enabled=dtype is not None):
            loss = model(x, x)[1]
        if scaler is None:
            loss.backward()
            opt.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
        opt.zero_grad()
        assert loss.dtype == tg.float32 and all(p.dtype == tg.float32 for p in model.parameters())
        losses.append(loss.item())
    return np.array(losses)


@FUSED
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gpt_trains_alike_in_16_bits(device, gpu):  # noqa: F811
    full = gpt_losses(device, None)
    assert full[-1] < full[0] - 1
    np.testing.assert_allclose(gpt_losses(device, "bfloat16"), full, rtol=0.03)
    scaler = amp.GradScaler(init_scale=1024.0)
    np.testing.assert_allclose(gpt_losses(device, "float16", scaler=scaler), full, rtol=0.03)
    assert scaler.get_scale() == 1024.0


def test_grad_scaler_in_lockstep_with_torch():
    options = dict(init_scale=8.0, growth_interval=2)
    theirs, ours = torch.amp.GradScaler("cpu", **options), amp.GradScaler(**options)
    rows = []
    for lib, scaler in ((torch, theirs), (tg, ours)):
        p = lib.nn.Parameter(lib.tensor([1.0, 2.0]))
        opt = lib.optim.SGD([p], lr=0.1)
        seen = []
        for factor in (1.0, 2.0, float("inf"), 1.0, float("nan"), 1.0, 3.0, 1.0, 1.0):
            opt.zero_grad()
            scaler.scale((p * factor).sum()).backward()
            if factor == 2.0:
                scaler.unscale_(opt)
                assert p.grad.tolist() == [2.0, 2.0]
            scaler.step(opt)
            scaler.update()
            seen.append((scaler.get_scale(), *p.detach().tolist()))
        rows.append(seen)
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-6)
    assert ours.state_dict() == theirs.state_dict()
    other = amp.GradScaler()
    other.load_state_dict(theirs.state_dict())
    assert other.state_dict() == ours.state_dict()


def test_grad_scaler_without_waiting(gpu):  # noqa: F811
    p = nn.Parameter(tg.tensor([1.0, 2.0], device="cuda"))
    opt, scaler = optim.AdamW([p], lr=0.1), amp.GradScaler()
    with standin.counting() as waits:
        for factor in (float("inf"), 1.0):
            scaler.scale((p * factor).sum()).backward()
            scaler.step(opt, wait=False)
            scaler.update()
            opt.zero_grad()
    assert waits == [] and scaler.get_scale() == 32768.0
    assert np.isfinite(p.detach().cpu().numpy()).all() and (p.detach().cpu().numpy() < [1.0, 2.0]).all()
    with pytest.raises(RuntimeError, match="no loss was scaled"):
        amp.GradScaler().unscale_(opt)
    scaler.scale(p.sum()).backward()
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="already called"):
        scaler.unscale_(opt)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_accumulate_in_float32(dtype, gpu):  # noqa: F811
    for device in ("cpu", "cuda"):
        x = tg.full((5000,), 1.0, device=device).to(getattr(tg, dtype))
        assert x.sum().item() == pytest.approx(5000, rel=4e-3)  # added up in 16 bits it would stop at 2048 or 256
        assert x.mean().item() == pytest.approx(1.0, rel=1e-2)
