"""On a GPU: pytest -m cuda. Operations, kernels and products against the CPU and NumPy with poisoned memory; gradients,
loss curves, generation; that a step never waits, memory stays flat, and what is missing is said.

Everything here runs unattended in a few minutes; without a GPU it is skipped, with the reason."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from op_cases import CASES
from standin_device import OnDevice
from test_standin import _same, run

import tensorgrad as tg
from gpt import GPT, GPTConfig
from tensorgrad.nn import functional as F
from tensorgrad.nn.utils import clip_grad_norm_, get_total_norm

pytestmark = pytest.mark.cuda
SMALL = dict(block_size=32, vocab_size=301, n_layer=2, n_head=2, n_embd=64, bias=True)
VARIANTS = {
    "gpt2": {},
    "llama": dict(position="rotary", norm="rmsnorm", activation="swiglu", n_kv_head=1, tie_weights=False, bias=False),
    "others": dict(position="sinusoidal", activation="relu2", norm_position="post", qk_norm=True),
}


@pytest.fixture
def poisoned():
    """Fresh GPU memory is full of NaN: what is not written shows."""
    import cupy

    pool = cupy.get_default_memory_pool()

    def malloc(size):
        memory = pool.malloc(size)
        if size:
            memory.memset_async(0xFF, size)
        return memory

    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(malloc)
    yield
    cupy.cuda.set_allocator(before)


@contextlib.contextmanager
def counted_waits():
    """The list of calls that made the host wait for the GPU."""
    import cupy

    waits, patch = [], pytest.MonkeyPatch()

    def watch(owner, name):
        function = getattr(owner, name)

        def watched(*args, **options):
            waits.append(name)
            return function(*args, **options)

        patch.setattr(owner, name, watched)

    watch(cupy, "asnumpy")
    device = type(tg.device("cuda"))
    for name in ("to_numpy", "item", "synchronize", "raise_noted"):
        watch(device, name)
    try:
        yield waits
    finally:
        patch.undo()


def make(device, **fields):
    tg.manual_seed(0)
    return GPT(GPTConfig(**SMALL | fields)).to(device)


def batch(device, rows=4, length=32, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 301, (rows, length + 1))
    return tg.tensor(ids[:, :-1].copy(), device=device), tg.tensor(ids[:, 1:].copy(), device=device)


def numpy(t):
    return t.detach().cpu().double().numpy()


# ---- operations, kernels, products ---


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operation(case, poisoned):
    failures = []
    for number, sample in enumerate(case.samples):
        try:
            _same(run(tg, case, sample), run(OnDevice("cuda"), case, sample), case.name in ("cpu", "to"))
        except Exception as error:
            failures.append(f"sample {number}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


class OnGpu:
    """Launches kernels on copies of NumPy arrays' whole memory, which views share, and copies it back."""

    def launch(self, name, types, *values):
        import cupy

        from tensorgrad.kernels.cuda import launch

        assert launch.has_kernels(cupy)
        memory, given = {}, []
        for value in values:
            if isinstance(value, np.ndarray):
                root = value
                while isinstance(root.base, np.ndarray):
                    root = root.base
                flat = root.reshape(-1).view(np.uint8)
                copy = memory.setdefault(id(root), (flat, cupy.asarray(flat)))[1]
                start = value.ctypes.data - root.ctypes.data
                stop = start + (copy.size - start) // value.itemsize * value.itemsize
                value = copy[start:stop].view(value.dtype)
            given.append(value)
        launch.launch(cupy, name, types, *given)
        for flat, copy in memory.values():
            flat[...] = copy.get()


def kernel_cases():
    try:
        from cuda_cases import CASES as cases

        from tensorgrad.kernels.cuda.signatures import KERNELS
    except ImportError:
        return []
    return [(name, types) for name in cases for types in KERNELS[name].types]


@pytest.mark.parametrize("rows, width", [(3, 5), (33, 768), (257, 130), (64, 1024)])
@pytest.mark.parametrize("name, types", kernel_cases())
def test_kernel(name, types, rows, width):
    from cuda_cases import CASES as cases
    from cuda_cases import Runner

    cases[name](Runner(OnGpu(), name, types), rows, width)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_products_of_every_layout(dtype, lead, poisoned):
    import cupy

    from tensorgrad.kernels.cuda.gemm import gemm

    rng = np.random.default_rng(0)
    kind = tg.dtypes.as_dtype(dtype)
    tolerance = {"float32": 1e-5, "float64": 1e-12}.get(dtype, 0.02)

    def laid(shape, layout):
        *outer, n, m = shape
        whole = cupy.empty((*outer, n, m) if layout == "rows" else (*outer, m, n), kind)
        view = whole if layout == "rows" else whole.swapaxes(-1, -2)
        view[...] = cupy.asarray(rng.standard_normal(shape)).astype(kind)
        return view

    for n, k, m in ((64, 48, 32), (5, 4, 3), (1, 7, 9), (33, 1, 8), (128, 768, 301)):
        for left in ("rows", "columns"):
            for right in ("rows", "columns"):
                a, b = laid((*lead, n, k), left), laid((*lead, k, m), right)
                want = a.get().astype(np.float64) @ b.get().astype(np.float64)
                got = gemm(cupy, a, b).get().astype(np.float64)
                np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())
                if dtype in ("float16", "bfloat16"):
                    total = cupy.ones((*lead, n, m), np.float32)
                    gemm(cupy, a, b, total, beta=1.0)
                    np.testing.assert_allclose(total.get(), want + 1, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("looks", ["at all", "back", "by mask"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("heads, groups, rows", [(4, 4, 64), (4, 2, 33), (2, 1, 257), (12, 12, 128)])
def test_attention_against_float64(heads, groups, rows, dtype, looks, poisoned):
    rng = np.random.default_rng(0)
    mask = rng.random((2, 1, rows, rows)) < 0.7 if looks == "by mask" else None
    shapes = [(2, heads, rows, 64), (2, groups, rows, 64), (2, groups, rows, 64)]
    arrays, g = [rng.standard_normal(s) for s in shapes], rng.standard_normal(shapes[0])
    kind, results = tg.dtypes.as_dtype(dtype), []
    for device, as_type in (("cpu", tg.float64), ("cuda", kind)):
        inputs = [tg.tensor(a, device=device).to(kind).to(as_type).detach().requires_grad_() for a in arrays]
        y = F.scaled_dot_product_attention(*inputs, None if mask is None else tg.tensor(mask, device=device),
                                           is_causal=looks == "back", enable_gqa=True)
        y.backward(tg.tensor(g, device=device).to(as_type))
        results.append([numpy(t) for t in (y, *(x.grad for x in inputs))])
    tolerance = 1e-4 if dtype == "float32" else 0.03
    for got, want in zip(results[1], results[0], strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm", "rotary"])
def test_block_routines_against_float64(name, dtype, poisoned):
    rng = np.random.default_rng(0)
    arrays, angles = [rng.standard_normal((4, 33, 64)) for _ in range(4)], rng.uniform(0, 6, (33, 64))
    kind, results = tg.dtypes.as_dtype(dtype), []
    for device, as_type in (("cpu", tg.float64), ("cuda", kind)):
        x, r, *g = (tg.tensor(a, device=device).to(kind).to(as_type).detach() for a in arrays)
        inputs = [t.requires_grad_() for t in (x, r)]
        if name == "rotary":
            table = tg.tensor(angles, device=device).to(tg.float64 if device == "cpu" else tg.float32)
            outputs = F.rotary(*inputs, table.cos(), table.sin())
        else:
            outputs = getattr(F, name)(*inputs, (64,), eps=1e-5)
        gradients = tg.autograd.grad(outputs, inputs, g)
        results.append([numpy(t) for t in (*outputs, *gradients)])
    tolerance = 1e-4 if dtype == "float32" else 0.03
    for got, want in zip(results[1], results[0], strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


# ---- the model ---


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_equal_the_cpu(name, poisoned):
    found = []
    for device in ("cpu", "cuda"):
        model = make(device, **VARIANTS[name])
        loss = model(*batch(device))[1]
        loss.backward()
        found.append((numpy(loss), [numpy(p.grad) for p in model.parameters()]))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    for got, want in zip(found[1][1], found[0][1], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def train(device, steps=20, dtype=None, optimizer="adamw", waits=None, **fields):
    model = make(device, **fields)
    opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), optimizer=optimizer)
    losses = []
    for i in range(steps):
        with counted_waits() if waits is not None else contextlib.nullcontext([]) as seen:
            x, y = batch(device, seed=i)
            with tg.autocast(dtype=dtype, enabled=dtype is not None):
                loss = model(x, y)[1]
            loss.backward()
            norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            opt.step(grad_scale=(1.0 / (norm + 1e-6)).clamp(max=1.0))
            opt.zero_grad()
        if waits is not None and i > 1:
            waits += seen
        losses.append(loss.detach())
    return np.array([t.item() for t in losses])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", VARIANTS)
def test_twenty_steps_follow_the_cpu(name, optimizer):
    cpu, cuda = (train(device, optimizer=optimizer, **VARIANTS[name]) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(cuda, cpu, rtol=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_twenty_steps_in_16_bits_follow_float32(dtype):
    np.testing.assert_allclose(train("cuda", dtype=dtype), train("cuda"), rtol=0.02)


def test_a_step_never_waits():
    waits = []
    train("cuda", steps=6, dtype="bfloat16", waits=waits)
    assert waits == []


def test_float16_leaves_steps_out_without_waiting():
    """As when the host looks; the embedding's gradient is added up in any order."""
    found = []
    for wait in (False, True):
        model = make("cuda")
        opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
        scaler = tg.amp.GradScaler(init_scale=2.0**24)
        for i in range(8):
            x, y = batch("cuda", seed=i)
            with counted_waits() as waits, tg.autocast("float16"):
                scaler.scale(model(x, y)[1]).backward()
                scaler.step(opt, wait=wait)
                scaler.update()
                opt.zero_grad()
            assert wait or i < 2 or not waits
        steps = {int(e["step"]) for e in opt.state_dict()["state"].values()}
        found.append([scaler.get_scale(), steps, *(numpy(p) for p in model.parameters())])
    assert found[0][0] < 2.0**24 and found[0][:2] == found[1][:2], "some steps are left out"
    for got, want in zip(found[0][2:], found[1][2:], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_tf32_is_an_option():
    a, b = (tg.randn(512, 512).cuda() for _ in range(2))
    exact = numpy(a) @ numpy(b)
    errors = {}
    try:
        for precision in ("highest", "high"):
            tg.set_float32_matmul_precision(precision)
            errors[precision] = np.abs(numpy(a @ b) - exact).max()
    finally:
        tg.set_float32_matmul_precision("highest")
    assert errors["highest"] < 1e-3 and errors["high"] < 0.2


@pytest.mark.parametrize("name", VARIANTS)
def test_generation_equals_the_cpu(name):
    texts = []
    for device in ("cpu", "cuda"):
        model = make(device, **VARIANTS[name]).eval()
        texts.append(model.generate(tg.tensor([[1, 2, 3]], device=device), 20, temperature=0).tolist())
    assert texts[0] == texts[1]


def test_dropout_masks_are_the_cpu_s():
    masks = []
    for device in ("cpu", "cuda"):
        tg.set_rng_state({"seed": 3, "calls": 0}, device)
        masks.append(numpy(F.dropout(tg.ones(10_000, device=device), 0.3)))
    np.testing.assert_array_equal(*masks)


def test_memory_is_flat_over_200_steps():
    model = make("cuda")
    opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
    sizes = []
    for i in range(200):
        x, y = batch("cuda", seed=i)
        with tg.autocast("bfloat16"):
            loss = model(x, y)[1]
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        del loss
        if i % 20 == 19:
            tg.cuda.synchronize()
            sizes.append((tg.cuda.memory_allocated(), tg.cuda.memory_reserved()))
    assert len(set(sizes[1:])) == 1, sizes


def test_prefetched_batches_are_what_was_sent():
    prefetch, sums, wanted = tg.cuda.Prefetcher("cuda"), [], []
    busy = tg.randn(2048, 2048).cuda()
    for seed in range(30):
        arrays = np.random.default_rng(seed).integers(0, 1000, (2, 64, 1024))
        wanted.append(int((arrays[0] * 3 + arrays[1]).sum()))
        x, y = prefetch(*arrays)
        arrays[...] = -1  # the host's memory is free at once
        busy = busy @ busy
        sums.append((x * 3 + y).sum())
    assert [s.item() for s in sums] == wanted


def test_memory_statistics():
    tg.cuda.reset_peak_memory_stats()
    before = tg.cuda.memory_allocated()
    x = tg.empty(1 << 20, device="cuda")
    assert tg.cuda.memory_allocated() - before >= 4 << 20
    del x
    assert tg.cuda.max_memory_allocated() - before >= 4 << 20 > tg.cuda.memory_allocated() - before
    tg.cuda.empty_cache()
    free, total = tg.cuda.mem_get_info()
    assert 0 < free <= total and "" != tg.cuda.get_device_name()


# ---- what goes wrong ---


def test_ids_out_of_range_are_reported():
    y = F.embedding(tg.tensor([0, 9], device="cuda"), tg.ones(3, 2, device="cuda"))
    with pytest.raises(IndexError, match="embedding: id 9"):
        y.sum().item()
    loss = F.cross_entropy(tg.ones(2, 4, device="cuda"), tg.tensor([0, 4], device="cuda"))
    with pytest.raises(IndexError, match="cross_entropy: target 4"):
        loss.item()


def test_out_of_memory_says_what_helps():
    with pytest.raises(tg.cuda.OutOfMemoryError, match="out of memory on cuda:0: .* asked for, .* free"):
        tg.empty(1 << 44, device="cuda")


def test_dlpack_round_trip():
    import cupy

    x = cupy.arange(6, dtype=cupy.float32)
    t = tg.from_dlpack(x)
    t += 1
    assert x.tolist() == [1, 2, 3, 4, 5, 6] and cupy.from_dlpack(t).data.ptr == x.data.ptr


def test_two_gpus():
    if tg.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x = tg.ones(3, device="cuda:1", requires_grad=True)
    y = (x * 2).to("cuda:0")
    y.sum().backward()
    assert x.grad.device is tg.device("cuda:1") and x.grad.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="cuda:0"):
        y + x
