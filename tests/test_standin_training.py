"""What lies above CUDA's kernels, on the stand-in: training, generation, checkpoints, devices, errors, and how often
the host waits for the GPU."""

from __future__ import annotations

import contextlib
import gc
import sys
import types

import numpy as np
import pytest
import standin
from standin_device import gpu, install, kernels  # noqa: F401

import tensorgrad as tg
from gpt import GPT, GPTConfig
from tensorgrad import nn, optim
from tensorgrad.cuda_device import CudaDevice, load_cupy, out_of_memory
from tensorgrad.nn import functional as F
from tensorgrad.nn.utils import clip_grad_norm_, clip_grad_value_

VARIANTS = {
    "gpt2": dict(bias=True),
    "llama": dict(position="rotary", norm="rmsnorm", activation="swiglu", n_kv_head=1, tie_weights=False, bias=False),
    "others": dict(position="sinusoidal", activation="relu2", norm_position="post", qk_norm=True),
}


def make(device, **fields):
    tg.manual_seed(0)
    config = dict(block_size=8, vocab_size=300, n_layer=2, n_head=2, n_embd=16) | fields
    return GPT(GPTConfig(**config)).to(device)


def batches(device, count=3, vocab=300):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield tuple(tg.tensor(rng.integers(0, vocab, (2, 8)), device=device) for _ in range(2))


def train(device, optimizer="adamw", parts=1, steps=3, **fields):
    """(losses and norms, parameters) of a few steps, and what made the host wait within them."""
    model = make(device, **fields)
    if optimizer == "sgd":
        opt = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    else:
        opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), optimizer=optimizer)
    kept, waits = [], []
    for x, y in batches(device, steps):
        with standin.counting() as found:
            for _ in range(parts):
                loss = model(x, y)[1]
                (loss / parts).backward()
            norm = clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            opt.zero_grad()
        waits += found
        kept += [loss.detach(), norm]
    return [t.item() for t in kept], [p.detach().cpu().numpy() for p in model.parameters()], waits


@pytest.mark.parametrize("name", VARIANTS)
def test_training_equals_the_cpu_and_never_waits(name, gpu):  # noqa: F811
    cpu, cuda = train("cpu", **VARIANTS[name]), train("cuda", **VARIANTS[name])
    np.testing.assert_allclose(cuda[0], cpu[0], rtol=1e-5)
    for a, b in zip(cuda[1], cpu[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert cuda[2] == [], "a training step must queue its work without waiting for the GPU"


@pytest.mark.parametrize("options", [dict(optimizer="muon"), dict(optimizer="sgd"), dict(parts=3)], ids=str)
def test_optimizers_and_accumulation(options, gpu):  # noqa: F811
    cpu, cuda = train("cpu", **options), train("cuda", **options)
    np.testing.assert_allclose(cuda[0], cpu[0], rtol=1e-5)
    for a, b in zip(cuda[1], cpu[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert cuda[2] == []


def test_dropout_draws_the_same_mask_again(gpu):  # noqa: F811
    masks = {}
    for device in ("cpu", "cuda"):
        tg.set_rng_state({"seed": 3, "calls": 0}, device)
        x = tg.ones(1000, device=device, requires_grad=True)
        y = F.dropout(x, 0.3)
        y.sum().backward()
        masks[device] = (y.detach().cpu().numpy(), x.grad.cpu().numpy())
    for a, b in zip(masks["cpu"], masks["cuda"], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", VARIANTS)
def test_generation_equals_the_cpu(name, gpu):  # noqa: F811
    texts = {}
    for device in ("cpu", "cuda"):
        model = make(device, **VARIANTS[name]).eval()
        idx = tg.tensor([[1, 2, 3], [4, 5, 6]], device=device)
        texts[device] = [model.generate(idx, 10, temperature=0).tolist(),
                         model.generate(idx, 4, temperature=0, use_cache=False).tolist()]
        tg.set_rng_state({"seed": 5, "calls": 0}, device)
        texts[device].append(model.generate(idx, 6, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01).tolist())
    assert texts["cpu"] == texts["cuda"]


def test_checkpoint_goes_from_one_device_to_the_other(tmp_path, gpu):  # noqa: F811
    model = make("cuda")
    opt = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
    for x, y in batches("cuda", 2):
        model(x, y)[1].backward()
        opt.step()
        opt.zero_grad()
    tg.save(model.state_dict(), tmp_path / "w.safetensors")
    for device in ("cpu", "cuda"):
        other = make(device)
        other.load_state_dict(tg.load(tmp_path / "w.safetensors", device=device))
        again = other.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
        again.load_state_dict(opt.state_dict())
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            np.testing.assert_array_equal(a.detach().cpu().numpy(), b.detach().cpu().numpy())
            averages = [o.state[p]["exp_avg"].cpu().numpy() for o, p in ((opt, a), (again, b))]
            np.testing.assert_array_equal(*averages)


def test_copies_between_devices_carry_the_gradient(monkeypatch):
    install(monkeypatch, count=2)
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    y = (x * 2).to("cuda")
    z = (y * y).to("cuda:1")
    assert (y.device, z.device) == (tg.device("cuda:0"), tg.device("cuda:1")) and z.is_cuda
    (z.cpu() * tg.tensor([1.0, 3.0])).sum().backward()
    assert x.grad.device is tg.device("cpu") and x.grad.tolist() == [8.0, 48.0]


def test_each_operation_runs_on_its_own_gpu(monkeypatch):
    install(monkeypatch, count=2)
    a, b = (tg.ones(2, device=f"cuda:{i}", requires_grad=True) for i in range(2))
    seen = []
    monkeypatch.setattr(standin.ndarray, "__mul__", _spy(standin.ndarray.__mul__, seen))
    left, right = a * a, b * b
    assert seen == [0, 1]
    left.sum().backward()
    right.sum().backward()
    assert seen == [0, 1, 0, 0, 1, 1] and tg.cuda.current_device() == 1


def _spy(method, seen):
    def spied(self, other):
        seen.append(standin.cuda.Device().id)
        return method(self, other)

    return spied


def test_mixed_devices_are_an_error_that_names_both(monkeypatch):
    install(monkeypatch, count=2)
    a, b, c = tg.ones(2), tg.ones(2, device="cuda"), tg.ones(2, device="cuda:1")
    for call, names in ((lambda: a + b, ("cpu", "cuda:0")), (lambda: b @ c, ("cuda:0", "cuda:1")),
                        (lambda: a < b, ("cpu", "cuda:0")), (lambda: tg.cat([a, c]), ("cpu", "cuda:1")),
                        (lambda: F.linear(a, tg.ones(3, 2, device="cuda")), ("cpu", "cuda:0")),
                        (lambda: tg.where(b > 0, a, b), ("cpu", "cuda:0"))):
        with pytest.raises(RuntimeError, match="devices") as caught:
            call()
        assert all(name in str(caught.value) for name in names), caught.value
    assert (b + tg.tensor(1.0)).device.type == "cuda"  # numbers go along


@pytest.mark.parametrize("call, text", [
    (lambda ids: F.embedding(ids, tg.ones(5, 2, device="cuda")), "embedding: id 7 is out of range for a table of 5"),
    (lambda ids: F.cross_entropy(tg.ones(2, 4, device="cuda"), ids), "cross_entropy: target 7 is out of range for 4"),
    (lambda ids: tg.ones(2, 6, device="cuda").gather(0, ids.reshape(1, 2)), "gather: index 7"),
    (lambda ids: tg.ones(6, device="cuda").index_select(0, ids), "index_select: index 7 is out of range"),
    (lambda ids: tg.ones(6, device="cuda")[ids], "getitem: index 7 is out of range for dimension 0 of size 6"),
], ids=["embedding", "cross_entropy", "gather", "index_select", "getitem"])
def test_ids_out_of_range_are_noted_and_reported(call, text, gpu):  # noqa: F811
    ids = tg.tensor([0, 7], device="cuda")
    with standin.counting() as waits:
        result = call(ids)
    assert waits == []
    with pytest.raises(IndexError, match=text):
        result.tolist()
    assert result.sum().item() is not None  # reported once
    call(tg.tensor([0, -100 if "target" in text else 1], device="cuda")).sum().item()
    call(ids)
    with pytest.raises(IndexError, match=text):
        tg.cuda.synchronize()


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "uint8", "bool", "float16", "float32", "float64"])
def test_scattered_additions_of_every_dtype(dtype, gpu):  # noqa: F811
    out = {}
    for device in ("cpu", "cuda"):
        x = tg.zeros(3, dtype=dtype, device=device)
        index = tg.tensor([0, 2, 2, 0], device=device)
        out[device] = x.scatter_add(0, index, tg.tensor([1, 2, 3, 4], device=device).to(dtype)).tolist()
    assert out["cpu"] == out["cuda"]


def test_clip_by_value_hooks_and_memory(gpu):  # noqa: F811
    p = nn.Parameter(tg.tensor([1.0, 2.0], device="cuda"))
    (p * tg.tensor([10.0, -0.1], device="cuda")).sum().backward()
    clip_grad_value_([p], 1.0)
    np.testing.assert_allclose(p.grad.cpu().numpy(), [1.0, -0.1])
    model = make("cuda")
    opt = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
    gc.collect()
    gc.disable()
    try:
        sizes = []
        for x, y in batches("cuda", 6):
            model(x, y)[1].backward()
            opt.step()
            opt.zero_grad()
            sizes.append(len(standin.alive))
        assert sizes[-1] == sizes[2], "arrays pile up over steps"
    finally:
        gc.enable()


# ---- what is missing, in one line ------------------------------------------------------------------------------------


def fake_cupy(driver=13000, count=1, fail=None, cublas=True, nvrtc=True, built=13000):
    def device_count():
        if fail:
            raise RuntimeError(fail)
        return count

    class Library:
        gemmEx = None

        @staticmethod
        def getVersion():
            return 13, 0

    class Missing:
        def __getattr__(self, name):
            raise ImportError("Failure finding the library\n  listdir(...)\n  many more lines")

    runtime = types.SimpleNamespace(driverGetVersion=lambda: driver, getDeviceCount=device_count,
                                    runtimeGetVersion=lambda: built)
    return types.SimpleNamespace(cuda=types.SimpleNamespace(
        runtime=runtime, cublas=Library if cublas else Missing(), nvrtc=Library if nvrtc else Missing()))


@pytest.mark.parametrize("options, parts", [
    (None, ["needs CuPy", "pip install -e", "cuda13"]),
    (dict(driver=0), ["needs an NVIDIA driver"]),
    (dict(driver=12040, fail="cudaErrorInsufficientDriver: driver too old"), ["supports CUDA 12.4", "cuda12"]),
    (dict(fail="cudaErrorNoDevice: no CUDA-capable device"), ["finds no GPU", "CUDA_VISIBLE_DEVICES"]),
    (dict(count=0), ["finds no GPU"]),
    (dict(cublas=False), ["library cublas", "pip install -e"]),
    (dict(nvrtc=False), ["library nvrtc", "pip install -e"]),
], ids=["no CuPy", "no driver", "old driver", "no GPU", "none visible", "no cublas", "no nvrtc"])
def test_what_is_missing_is_said_in_one_line(options, parts, monkeypatch):
    cuda_device = sys.modules["tensorgrad.cuda_device"]
    monkeypatch.setattr(cuda_device, "_loaded", None)
    monkeypatch.setitem(sys.modules, "cupy", None if options is None else fake_cupy(**options))
    with pytest.raises(tg.DeviceError) as caught:
        load_cupy("cuda")
    message = str(caught.value)
    assert "\n" not in message and "'cuda'" in message and all(part in message for part in parts), message
    assert not tg.cuda.is_available() and tg.cuda.device_count() == 0


def test_real_cupy_without_gpu_says_so():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    if tg.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(tg.DeviceError, match="needs an NVIDIA driver|finds no GPU|supports CUDA"):
        tg.ones(3, device="cuda")


def test_out_of_memory_says_what_was_asked_and_what_helps(monkeypatch):
    cuda_device = sys.modules["tensorgrad.cuda_device"]

    class Failure(MemoryError):
        pass

    def full(size):
        raise Failure

    pool = types.SimpleNamespace(malloc=full, used_bytes=lambda: 70 << 30)
    hooked = {}
    cupy = types.SimpleNamespace(get_default_memory_pool=lambda: pool, cuda=types.SimpleNamespace(
        memory=types.SimpleNamespace(OutOfMemoryError=Failure), set_allocator=lambda f: hooked.update(malloc=f),
        Device=lambda: types.SimpleNamespace(id=1, mem_info=(1 << 30, 80 << 30))))
    cuda_device._name_memory_errors(cupy)
    with pytest.raises(tg.cuda.OutOfMemoryError, match="out of memory on cuda:1: 2.00 GiB asked for, 1.00 GiB free"):
        hooked["malloc"](2 << 30)
    assert "batch_size" in out_of_memory(0, 1, 1, 1, 1)


def test_device_out_of_range(gpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys.modules["tensorgrad.cuda_device"], "_loaded", (standin, 1))
    with pytest.raises(tg.DeviceError, match=r"1 CUDA device\(s\)"):
        tg.ones(1, device="cuda:4")
    with pytest.raises(tg.DeviceError, match="unknown device"):
        tg.ones(1, device="tpu")
    assert isinstance(tg.device("cuda"), CudaDevice)


# ---- with the CUDA kernels, emulated ---------------------------------------------------------------------------------

ALWAYS = {"softmax_forward", "softmax_backward", "cross_entropy_forward", "cross_entropy_backward", "adamw",
          "sum_of_squares", "embedding_forward", "embedding_backward_atomic", "note_outside", "copy_heads"}
EXPECTED = {
    "gpt2": {"layer_norm_forward", "layer_norm_backward", "gelu_forward", "gelu_backward", "bias_add", "column_sum"},
    "llama": {"rms_norm_forward", "rms_norm_backward", "swiglu_forward", "swiglu_backward", "rotary"},
    "others": {"layer_norm_forward", "relu2_forward", "relu2_backward"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_training_with_kernels_equals_the_cpu(name, kernels):  # noqa: F811
    cpu, cuda = train("cpu", **VARIANTS[name]), train("cuda", **VARIANTS[name])
    np.testing.assert_allclose(cuda[0], cpu[0], rtol=1e-5)
    for a, b in zip(cuda[1], cpu[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert cuda[2] == [] and EXPECTED[name] | ALWAYS <= set(kernels.names)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_in_16_bits_with_kernels(dtype, kernels):  # noqa: F811
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    with tg.autocast(dtype):
        found = {device: train(device, parts=2, vocab_size=301) for device in ("cpu", "cuda")}  # odd: rows are padded
    np.testing.assert_allclose(found["cuda"][0], found["cpu"][0], rtol=0.02)
    assert found["cuda"][2] == []
    assert all(np.isfinite(p).all() and p.dtype == np.float32 for p in found["cuda"][1])


def test_dropout_in_attention_is_the_cpu_s(kernels):  # noqa: F811
    found = []
    for device in ("cpu", "cuda"):
        rng = np.random.default_rng(0)
        tg.set_rng_state({"seed": 3, "calls": 0}, device)
        q, k, v = (tg.tensor(rng.standard_normal((2, 4 // g, 9, 8)).astype(np.float32), device=device,
                             requires_grad=True) for g in (1, 2, 2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True, enable_gqa=True)
        y.sum().backward()
        found.append([t.detach().cpu().numpy() for t in (y, q.grad, k.grad, v.grad)])
    for cpu, cuda in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, cpu, rtol=1e-4, atol=1e-5)


def test_deterministic_embedding(kernels):  # noqa: F811
    ids = tg.tensor(np.random.default_rng(0).integers(0, 5, 40), device="cuda")
    grads = []
    for mode in (False, True):
        tg.use_deterministic_algorithms(mode)
        try:
            table = tg.zeros(300, 6, device="cuda", requires_grad=True)
            (F.embedding(ids, table) * tg.arange(6, device="cuda")).sum().backward()
            grads.append(table.grad.cpu().numpy())
        finally:
            tg.use_deterministic_algorithms(False)
    np.testing.assert_allclose(*grads, rtol=1e-6)
    assert {"embedding_backward_atomic", "embedding_backward_sorted"} <= set(kernels.names)
    assert not tg.are_deterministic_algorithms_enabled()


def test_16_bit_weights_come_from_the_optimizer(kernels):  # noqa: F811
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    model = make("cuda")
    opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
    for x, y in batches("cuda", 2):
        with tg.autocast("bfloat16"):
            model(x, y)[1].backward()
        opt.step()
        opt.zero_grad()
    weight = model.transformer.h[0].attn.c_attn.weight
    buffer, i = opt._flat[0].slots[weight]
    assert weight._half[2].base is buffer._shadow and weight._half[1] == weight.version()[0]
    np.testing.assert_array_equal(weight._half[2]._a, weight.array._a.astype(weight._half[2].dtype))


def test_gradient_takes_the_logits_place_but_never_leaves_their_memory(kernels):  # noqa: F811
    rng = np.random.default_rng(0)
    values, targets = rng.standard_normal((4, 12)).astype(np.float32), tg.tensor([0, 1, 2, 3])
    for columns in (slice(0, 9), slice(3, 12), slice(None)):
        grads = []
        for device in ("cpu", "cuda"):
            x = tg.tensor(values, device=device, requires_grad=True)
            F.cross_entropy((x * 2)[:, columns], targets.to(device)).backward()
            grads.append(x.grad.cpu().numpy())
        np.testing.assert_allclose(grads[1], grads[0], rtol=1e-5, atol=1e-6)


def test_graphed_copies_its_inputs_and_launches(gpu, monkeypatch):  # noqa: F811
    """The bookkeeping of tg.cuda.graphed; the stand-in's "graph" computes the function again on the fixed tensors."""
    events, calls = [], []

    class Graph:
        def launch(self):
            events.append("launch")
            with tg.no_grad():
                kept[0].array[...] = function(*calls[-1]).array

    class Stream(type(standin.cuda.get_current_stream())):
        def begin_capture(self):
            events.append("begin")

        def end_capture(self):
            events.append("end")
            return Graph()

    class Pool:
        malloc = None

    @contextlib.contextmanager
    def using_allocator(malloc):
        yield

    for name, value in dict(Stream=Stream, MemoryPool=Pool, using_allocator=using_allocator).items():
        monkeypatch.setattr(standin.cuda, name, value, raising=False)

    def function(x):
        calls.append((x,))
        assert not tg.is_grad_enabled()
        return x * 2

    run = tg.cuda.graphed(function, tg.ones(3, device="cuda"))
    assert len(calls) == 3 and events == ["begin", "end"] and gc.isenabled()
    kept = [tg.zeros(3, device="cuda")]
    run(tg.tensor([1.0, 2.0, 3.0], device="cuda"))
    assert events[-1] == "launch" and kept[0].tolist() == [2.0, 4.0, 6.0]
    with pytest.raises(RuntimeError, match=r"recorded for \(3,\) float32 on cuda:0, not for \(2,\)"):
        run(tg.ones(2, device="cuda"))
    with pytest.raises(RuntimeError, match="must be on a GPU"):
        tg.cuda.graphed(function, tg.ones(3))


def test_numbers_and_ranges_are_made_on_the_gpu(gpu, monkeypatch):  # noqa: F811
    """A copy from the host inside a CUDA graph would read memory that is long used for something else."""
    x, copies = tg.ones(3, device="cuda"), []
    monkeypatch.setattr(standin, "asarray", lambda a, *rest, f=standin.asarray: (copies.append(a), f(a, *rest))[1])
    y = (x * 2.0 + 1).masked_fill(x > 5, 0.0) + tg.arange(3, device="cuda")
    y = y.clamp(min=0.5) ** 2
    assert not [c for c in copies if not isinstance(c, standin.ndarray)] and y.tolist() == [9.0, 16.0, 25.0]
