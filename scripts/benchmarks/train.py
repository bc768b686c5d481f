"""The training step: forward, backward, clip 1.0, AdamW."""
import resource
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

import numpy as np

from .runner import contenders, middle, print_table, take_turns, times_before, times_faster
from .sizes import SIZES


def report(options):
    """Measure all sizes and contenders and print a table per size; the results as (rows, skipped)."""
    rows, skipped_at = [], {}
    for size in options.size:
        chosen, skipped = contenders(options)
        spec = {"size": size, "steps": options.steps, "dropout": options.dropout}
        idle = take_turns(chosen, "train", options, skipped, **spec)
        loaded = {}
        if options.busy:
            with neighbour():
                loaded = take_turns(list(idle), "train", options, skipped, **spec)
        rows += (found := [_row(size, idle, contender, loaded.get(contender)) for contender in idle])
        _print(size, found, options)
        skipped_at |= {f"{name} at {size}": reason for name, reason in skipped.items()}
    return rows, skipped_at


def _row(size, results, contender, loaded):
    own = results[contender]
    row = {"size": size, "contender": contender.name, "mode": contender.mode, "level": contender.level,
           "ms": middle(own, "ms"), "min_ms": min(r["min_ms"] for r in own), "cpu_ms": middle(own, "cpu_ms"),
           "tokens_per_s": 1e3 * SIZES[size].tokens / middle(own, "ms"),
           "peak_mb": middle(own, "peak_mb"), "imported_mb": middle(own, "imported_mb"),
           "speed_vs_torch": times_faster(results, contender, "ms"),
           "speed_vs_before": times_before(results, contender, "ms"),
           "memory_vs_torch": times_faster(results, contender, "peak_mb"),
           "parameters": own[0]["parameters"], "loss": own[-1]["loss"], "rounds": own}
    if contender.mode != "ours":
        del row["level"]
    if loaded:
        row |= {"busy_ms": middle(loaded, "ms"), "busy_over_idle": middle(loaded, "ms") / row["ms"]}
    return row


def _print(size, rows, options):
    head = [f"train {size}", "ms", "min", "cpu ms", "tokens/s", "torch/ours", "peak MB", "torch/ours"]
    keys = ["contender", "ms", "min_ms", "cpu_ms", "tokens_per_s", "speed_vs_torch", "peak_mb", "memory_vs_torch"]
    if options.against:
        head.append(f"{options.against}/ours")
        keys.append("speed_vs_before")
    if options.busy:
        head += ["busy ms", "busy/idle"]
        keys += ["busy_ms", "busy_over_idle"]
    print_table(head, [[row.get(key) for key in keys] for row in rows])


@contextmanager
def neighbour():
    """One process that keeps one processor busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


# ---- in the measuring process ----------------------------------------------------------------------------------------


def measure(spec):
    """Step time (median and least), CPU time and peak memory of one library in this process."""
    size = SIZES[spec["size"]]
    dropout = size.dropout if spec["dropout"] is None else spec["dropout"]
    library, model, context = build(spec, size, dropout)
    imported = resident_mb("VmRSS")
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99))
    parameters, clip = list(model.parameters()), library.nn.utils.clip_grad_norm_
    if spec["mode"] == "compile":
        model = library.compile(model)
    rng = np.random.default_rng(0)
    idx, targets = (library.from_numpy(rng.integers(0, size.vocab, (size.batch, size.block))) for _ in range(2))

    def step():
        with context:
            loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        clip(parameters, 1.0)
        optimizer.step()
        return loss.item()

    for _ in range(size.warm_up):
        step()
    wall, cpu = [], []
    for _ in range(spec["steps"] or size.steps):
        started, used = time.perf_counter(), time.process_time()
        loss = step()
        cpu.append(time.process_time() - used)
        wall.append(time.perf_counter() - started)
    return {"ms": 1e3 * median(wall), "min_ms": 1e3 * min(wall), "cpu_ms": 1e3 * median(cpu), "loss": loss,
            "peak_mb": resident_mb("VmHWM"), "imported_mb": imported,
            "parameters": sum(p.numel() for p in parameters)}


def build(spec, size, dropout):
    """(library, model in training mode, context of the forward pass)"""
    mode, threads = spec["mode"], spec["threads"]
    if mode == "ours":
        import tensorgrad as tg
        from gpt import GPT, GPTConfig

        if spec["dtype"] == "bfloat16":
            tg.set_float32_matmul_precision("medium")
        config = GPTConfig(block_size=size.block, vocab_size=size.vocab, n_layer=size.layers, n_head=size.heads,
                           n_embd=size.width, dropout=dropout, bias=False)
        return tg, GPT(config), nullcontext()
    import torch

    from .peers import TorchGPT

    torch.set_num_threads(threads)
    context = torch.autocast("cpu", torch.bfloat16) if mode == "bf16" else nullcontext()
    return torch, TorchGPT(size, dropout), context


def resident_mb(field):
    """This process's memory in MB: VmRSS (now) or VmHWM (the most so far); where there is no /proc, the most."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with the parent's
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
