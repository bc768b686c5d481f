"""The training step on a GPU in bfloat16, beside PyTorch eager and torch.compile in the same run, decoding with CUDA
graphs and without, and our kernels and products against what the same GPU reaches at best.

Timing by events of the GPU; steps queue without the host waiting in between, as in training. `--device cpu` runs the
same programs on a small scale for their tests."""
import time
from contextlib import nullcontext
from statistics import median

import numpy as np

from . import cuda_generate
from .runner import BenchError, Contender, print_table, take_turns
from .sizes import Size

SIZES = {
    "124M": Size(32, 1024, 12, 12, 768, 50304, 0.0, 20, 5),   # GPT-2, vocabulary padded as in nanoGPT
    "C": Size(64, 256, 6, 6, 384, 65, 0.2, 50, 10),           # nanoGPT's shakespeare_char
    "tiny": Size(2, 32, 2, 2, 32, 65, 0.0, 2, 1),             # for tests
}
PEERS = {"eager": "torch eager", "compile": "torch.compile"}
PHASES = ("forward", "backward", "norm", "update")
LIMIT = 240  # seconds that a process may take: it runs unattended, and one that hangs is not to cost the others


def report(options):
    """Measure all contenders, decoding, our kernels; tables; (rows, skipped). `options.keep(rows, skipped)` is told
    after each part. Where one of ours fails the others are measured all the same; then BenchError says so."""
    parts = [("train", _train, size) for size in options.size]
    if not options.no_kernels:
        parts += [("generate", cuda_generate.report, size) for size in options.size]
        parts += [("kernels", _kernels, options.size[0])]
    rows, skipped, failed = [], {}, []
    for name, part, size in parts:
        without = {}
        rows += part(options, without, size=size, device=options.device)
        skipped |= {f"{contender}, {name} {size}": reason for contender, reason in without.items()}
        failed += [f"{name} {size}: {reason}" for contender, reason in without.items() if contender.startswith("ours")]
        options.keep(rows, skipped)
    if failed:
        raise BenchError("; ".join(failed))
    return rows, skipped


def _train(options, skipped, **spec):
    chosen = [Contender("ours")] + [Contender(PEERS[peer], mode=peer) for peer in options.peers if peer != "none"]
    results = take_turns(chosen, "cuda", options, skipped, steps=options.steps, batch=options.batch, **spec)
    found = [_row(spec["size"], results, contender) for contender in results]
    _print(spec["size"], found)
    return found


def _kernels(options, skipped, **spec):
    results = take_turns([Contender("ours")], "cuda_kernels", options, skipped, steps=options.steps,
                         batch=options.batch, **spec)
    rows = [row for measured in results.values() for row in measured[0]["rows"]]
    skipped |= {contender.name: found[0]["failed"] for contender, found in results.items() if found[0]["failed"]}
    print_table(["kernels and products", "us", "GB/s", "TFLOP/s", "of the best"],
                [[r["name"], r["us"], r["gb_per_s"], r["tflops"], r["share"]] for r in rows])
    return rows


def _row(size, results, contender):
    own = results[contender]
    row = {"size": size, "contender": contender.name, "ms": median(r["ms"] for r in own), "gpu": own[0]["gpu"],
           "tokens_per_s": median(r["tokens_per_s"] for r in own), "tflops": median(r["tflops"] for r in own),
           "peak_mb": median(r["peak_mb"] for r in own), "waits_per_step": own[0]["waits_per_step"],
           "phases_ms": {p: median(r["phases_ms"][p] for r in own) for p in PHASES},
           "versions": own[0]["versions"], "loss": own[-1]["loss"], "rounds": own}
    for mode in PEERS:
        peer = next((rows for other, rows in results.items() if other.mode == mode), None)
        row[f"speed_vs_{mode}"] = peer and median(
            a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(own, peer, strict=True))
        row[f"memory_vs_{mode}"] = peer and median(b["peak_mb"] / a["peak_mb"] for a, b in zip(own, peer, strict=True))
    return row


def _print(size, rows):
    head = [f"train {size}, bf16", "ms", "tokens/s", "TFLOP/s", *(f"{p} ms" for p in PHASES), "peak MB", "waits",
            "/eager", "/compile"]
    print_table(head, [[r["contender"], r["ms"], r["tokens_per_s"], r["tflops"],
                        *(r["phases_ms"][p] for p in PHASES), r["peak_mb"], r["waits_per_step"],
                        r["speed_vs_eager"], r["speed_vs_compile"]] for r in rows])


# ---- in the measuring process ----------------------------------------------------------------------------------------


class Clock:
    """Marks in the GPU's queue (or, on a CPU, in time) and the milliseconds between them."""

    def __init__(self, library, device):
        self.library, self.on_gpu = library, device != "cpu"
        if self.on_gpu and library.__name__ == "torch":
            self.make = lambda: library.cuda.Event(enable_timing=True)
        elif self.on_gpu:
            self.make = library.device(device).xp.cuda.Event

    def mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = self.make()
        event.record()
        return event

    def between(self, first, last):
        """Milliseconds; waits for the later mark."""
        if not self.on_gpu:
            return 1e3 * (last - first)
        last.synchronize()
        if self.library.__name__ == "torch":
            return first.elapsed_time(last)
        return self.library.device("cuda").xp.cuda.get_elapsed_time(first, last)


def measure(spec):
    """Step time, phases, memory and waits of one library in this process."""
    size = _size(spec)
    ours, device = spec["mode"] == "ours", spec["device"]
    library, model, optimizer, autocast = (_ours if ours else _torch)(size, spec)
    parameters = [p for p in model.parameters()]
    rng = np.random.default_rng(0)
    text = [rng.integers(0, size.vocab, (size.batch, size.block + 1)) for _ in range(8)]
    batches = [tuple(library.as_tensor(np.ascontiguousarray(part), device=device) for part in (ids[:, :-1], ids[:, 1:]))
               for ids in text]  # on the device already, for both libraries
    clock, waits = Clock(library, device), []

    def step(number, marks=None):
        x, y = batches[number % len(batches)]
        mark = (lambda: marks.append(clock.mark())) if marks is not None else (lambda: None)
        mark()
        with autocast():
            loss = model(x, y)[1]
        mark()
        loss.backward()
        mark()
        if ours:
            norm = library.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            mark()
            optimizer.step(grad_scale=(1.0 / (norm + 1e-6)).clamp(max=1.0))
        else:
            library.nn.utils.clip_grad_norm_(parameters, 1.0)
            mark()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark()
        return loss.detach()

    for i in range(size.warm_up):
        step(i)
    _synchronize(library, device)
    steps = spec["steps"] or size.steps
    with _counting(library, ours and device != "cpu", waits):
        started = time.perf_counter()
        for i in range(steps):
            loss = step(i)
    _synchronize(library, device)
    seconds = (time.perf_counter() - started) / steps
    phases = []
    for i in range(steps):
        step(i, marks := [])
        phases.append([clock.between(a, b) for a, b in zip(marks, marks[1:], strict=False)])
    if device != "cpu":
        library.cuda.reset_peak_memory_stats()  # not earlier: ours then counts every allocation, which takes time
        for i in range(2):
            step(i)
    flops = 6 * sum(p.numel() for p in parameters) + 12 * size.layers * size.width * size.block
    return {"ms": 1e3 * seconds, "tokens_per_s": size.tokens / seconds, "tflops": flops * size.tokens / seconds / 1e12,
            "phases_ms": dict(zip(PHASES, (median(p) for p in zip(*phases, strict=True)), strict=True)),
            "peak_mb": _peak(library, device), "waits_per_step": len(waits) / steps if ours else None,
            "loss": float(loss), "gpu": _gpu(library, device), "versions": _versions(library)}


def generate(spec):
    """Decoding, see cuda_generate.py."""
    return cuda_generate.measure(spec, SIZES[spec["size"]])


def _size(spec):
    size = SIZES[spec["size"]]
    return size._replace(batch=spec["batch"]) if spec.get("batch") else size


def _ours(size, spec):
    import tensorgrad as tg
    from gpt import GPT, GPTConfig

    tg.manual_seed(0)
    model = GPT(GPTConfig(block_size=size.block, vocab_size=size.vocab, n_layer=size.layers, n_head=size.heads,
                          n_embd=size.width, dropout=size.dropout, bias=False)).to(spec["device"])
    return tg, model, model.configure_optimizers(0.1, 6e-4, (0.9, 0.95)), _autocast(tg, spec["device"])


def _torch(size, spec):
    import torch

    if spec["device"] != "cpu" and not torch.cuda.is_available():
        raise SystemExit("torch is installed without CUDA, or sees no GPU")
    from .peers import TorchGPT

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = TorchGPT(size, size.dropout).to(spec["device"])
    groups = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95)).param_groups
    optimizer = torch.optim.AdamW([{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups],
                                  lr=6e-4, betas=(0.9, 0.95), fused=spec["device"] != "cpu")
    if spec["mode"] == "compile":
        model = torch.compile(model)
    return torch, model, optimizer, _autocast(torch, spec["device"])


def _autocast(library, device):
    kind = device.partition(":")[0]
    return lambda: library.autocast(kind, dtype=library.bfloat16) if kind != "cpu" else nullcontext()


def _synchronize(library, device):
    if device != "cpu":
        library.cuda.synchronize()


def _peak(library, device):
    if device != "cpu":
        return library.cuda.max_memory_allocated() / 1e6
    from .train import resident_mb

    return resident_mb("VmHWM")


def _gpu(library, device):
    return library.cuda.get_device_name() if device != "cpu" else "none"


def _versions(library):
    found = {"numpy": np.__version__, library.__name__: library.__version__}
    if library.__name__ == "torch":
        return found | {"cuda": library.version.cuda}
    try:
        xp = library.device("cuda").xp
    except library.DeviceError:  # tried out on a CPU
        return found
    return found | {"cupy": xp.__version__, "cuda": xp.cuda.runtime.runtimeGetVersion()}


class _counting:
    """Counts what makes the host wait: every value that leaves the GPU, and every synchronisation of CuPy's."""

    NAMES = ("to_numpy", "item", "synchronize")

    def __init__(self, library, active, waits):
        self.owner = type(library.device("cuda")) if active else None
        self.waits = waits

    def __enter__(self):
        self.before = {}
        for name in self.NAMES if self.owner else ():
            function = self.before[name] = getattr(self.owner, name)

            def watched(*args, function=function, name=name, **options):
                self.waits.append(name)
                return function(*args, **options)

            setattr(self.owner, name, watched)

    def __exit__(self, *error):
        for name, function in self.before.items():
            setattr(self.owner, name, function)


# ---- kernels and products against the best this GPU does -------------------------------------------------------------


def kernels(spec):
    """Time of our routines at the size's shapes: GB/s and TFLOP/s, and their share of a plain copy or a large product
    measured in the same process. "failed": None, or after what the rest could not be measured, and why."""
    rows, failed = [], None
    try:
        _measure_kernels(spec, rows)
    except Exception as error:
        if not rows:
            raise
        failed = f"behind {rows[-1]['name']}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return {"rows": rows, "failed": failed}


def _measure_kernels(spec, rows):
    """Append to `rows`."""
    import tensorgrad as tg
    from tensorgrad.kernels import routines

    size, place = _size(spec), tg.device(spec["device"])
    clock, xp = Clock(tg, spec["device"]), place.xp
    dtype = tg.bfloat16 if spec["device"] != "cpu" else tg.float32
    best = routines(place, dtype)
    rng = np.random.default_rng(0)
    repeat = spec["steps"] or 20

    def array(*shape, dtype=dtype):
        return place.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)

    def timed(function, before=lambda: None):
        for _ in range(3):
            function()
        times = []
        for _ in range(5):
            before()
            first = clock.mark()
            for _ in range(repeat):
                function()
            times.append(clock.between(first, clock.mark()) / repeat)
        return median(times)

    n, c = size.tokens, size.width
    source = array(n, 4 * c)
    target = xp.empty_like(source)

    def copy():
        target[...] = source

    copy_rate = 2 * source.nbytes / timed(copy) / 1e6                       # GB/s
    side = 8192 if spec["device"] != "cpu" else 256
    a, b = array(side, side), array(side, side)
    product_rate = 2 * side**3 / timed(lambda: best.matmul(xp, a, b)) / 1e9  # TFLOP/s
    rows.append({"name": "copy (the best)", "us": None, "gb_per_s": copy_rate, "tflops": None, "share": 1.0})
    rows.append({"name": f"product of {side} (the best)", "us": None, "gb_per_s": None, "tflops": product_rate,
                 "share": 1.0})

    def keep_busy():
        """Milliseconds of work, meanwhile the host queues what is timed: its own time is not to be measured."""
        for _ in range(4 if clock.on_gpu else 0):
            best.matmul(xp, a, b)

    def add(name, function, moved=None, flops=None):
        ms = timed(function, keep_busy)
        speed = (moved / ms / 1e6) if moved else None
        tflops = (flops / ms / 1e9) if flops else None
        rows.append({"name": name, "us": 1e3 * ms, "gb_per_s": speed, "tflops": tflops,
                     "share": tflops / product_rate if tflops else speed / copy_rate})

    x, wide, g = array(n, c), array(n, 4 * c), array(n, c)
    weight = array(c, dtype=tg.float32)
    _, mean, rstd = best.layer_norm(xp, x, weight, None, 1e-5)
    add("layer_norm", lambda: best.layer_norm(xp, x, weight, None, 1e-5), moved=2 * x.nbytes)
    add("layer_norm backward", lambda: best.layer_norm_backward(xp, x, weight, mean, rstd, g, True), moved=3 * x.nbytes)
    add("add_layer_norm", lambda: best.add_layer_norm(xp, x, g, weight, None, 1e-5), moved=4 * x.nbytes)
    add("add_layer_norm backward", lambda: best.add_layer_norm_backward(xp, x, weight, mean, rstd, g, x, True),
        moved=4 * x.nbytes)
    h = best.gelu(xp, wide, "none")
    add("gelu", lambda: best.gelu(xp, wide, "none"), moved=2 * wide.nbytes)
    add("gelu backward", lambda: best.gelu_backward(xp, wide, h, wide, "none"), moved=3 * wide.nbytes)
    add("softmax", lambda: best.softmax(xp, wide, 1), moved=2 * wide.nbytes)
    add("softmax backward", lambda: best.softmax_backward(xp, h, wide, 1), moved=3 * wide.nbytes)
    few = max(n // 8, 1)  # the logits of all tokens are large
    logits, ids = array(few, size.vocab), place.asarray(rng.integers(0, size.vocab, few))
    loss, lse, counted = best.cross_entropy(xp, logits, ids, -100)
    add("cross_entropy", lambda: best.cross_entropy(xp, logits, ids, -100), moved=logits.nbytes)
    add("cross_entropy backward", lambda: best.cross_entropy_backward(xp, logits, ids, lse, counted, loss),
        moved=2 * logits.nbytes)
    shape = (max(size.batch // 4, 1), size.heads, size.block, c // size.heads)
    q, k, v, dy = (array(*shape) for _ in range(4))
    cos, sin = (array(*shape[2:], dtype=tg.float32) for _ in range(2))
    add("rotary", lambda: best.rotary(xp, q, cos, sin, False), moved=2 * q.nbytes)
    parameters = 12 * c * c * size.layers
    state = [array(parameters, dtype=tg.float32) for _ in range(3)] + [xp.ones(parameters, np.float32)]
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    add("adamw", lambda: best.adamw(xp, *state, **options), moved=28 * parameters)
    add("norm", lambda: best.sum_of_squares(xp, state[1]), moved=4 * parameters)
    shapes = {"qkv": (c, 3 * c), "projection": (c, c), "up": (c, 4 * c), "down": (4 * c, c)}
    for name, (inputs, outputs) in shapes.items():
        left, right = array(n, inputs), array(outputs, inputs)
        grad = array(n, outputs)
        total = xp.zeros((outputs, inputs), np.float32)
        add(f"linear {name}", lambda a=left, w=right: best.linear(xp, a, w, None), flops=2 * n * inputs * outputs)
        add(f"linear {name} backward",
            lambda a=left, w=right, d=grad, t=total: best.linear_backward(xp, a, w, d, (True, True), (t, True)),
            flops=4 * n * inputs * outputs)
    out, kept = best.attention(place, q, k, v, None, True, 0.125, 0.0, None)
    flops = 4 * q.size * size.block / 2  # causal: half of the square
    add("attention", lambda: best.attention(place, q, k, v, None, True, 0.125, 0.0, None), flops=flops)
    add("attention backward", lambda: best.attention_backward(place, q, k, v, kept, True, 0.125, 0.0, None, dy),
        flops=2.5 * flops)
