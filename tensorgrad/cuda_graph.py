"""CUDA graphs: a function's work on the GPU recorded once and launched as a whole, where launching costs the time."""

import gc
from contextlib import suppress

from .engine import TensorBase, wrap
from .errors import OpError
from .kernels.cuda.cublaslt import capturing
from .modes import no_grad
from .optim import AdamW
from .random import get_rng_state


def graphed(function, *inputs):
    """`function(*inputs)` as a CUDA graph: returns a function that takes tensors of the same shapes, dtypes and device,
    launches the recorded work, and returns the outputs (the same tensors each time, overwritten by the next call).

    Pays for small batches, where Python launches slower than the GPU computes. The function is run three times here. It
    must do the same work each time and read no value on the host (item, masks as indices), draw no random numbers,
    record no gradients (it runs under no_grad), and make no tensor of data of the host; ids out of range are reported
    as ever. Products go through cuBLASLt, since CuPy's cuBLAS refuses capture. Raises OpError for inputs on the CPU."""

    def quiet(*fixed):
        with no_grad():
            return function(*fixed)

    launch, outputs, kept = _record("graphed", quiet, inputs)

    def run(*given):
        launch(given)
        for out in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(out, TensorBase):
                out._bump()
        return outputs

    run.kept = kept
    return run


def graphed_step(function, optimizer, *inputs):
    """A whole training step as a CUDA graph: `function(*inputs)` computes loss and gradients (and may clip them), and
    is recorded with `optimizer.step()` and `zero_grad()` behind it, for AdamW. Returns a function like `graphed`'s;
    each call makes one step with the learning rates that the optimizer's groups have then.

        def gradients(x, y):
            loss = model(x, y)[1]
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            return loss.detach()

        step = tg.cuda.graphed_step(gradients, optimizer, x, y)

    Recording changes no weight. What `graphed` asks for holds here too; raises OpError where random numbers are drawn
    (dropout), and in a call after the optimizer was used otherwise or has loaded a state: then record again."""
    if not isinstance(optimizer, AdamW):
        raise OpError(f"graphed_step: the optimizer must be AdamW, not {type(optimizer).__name__}")
    optimizer.zero_grad()
    device = inputs[0].device
    groups = optimizer.param_groups
    rates = [device.scalar(float(group["lr"])) for group in groups]
    leave_out = wrap(device.scalar(1.0), device)  # until the graph is recorded

    def step(*fixed):
        result = function(*fixed)
        known = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            optimizer.step(found_inf=leave_out)
        finally:
            for group, rate in zip(groups, known, strict=True):
                group["lr"] = rate
        optimizer.zero_grad()
        for buffer in _buffers(optimizer):  # a graph repeats the number of its step: count downwards
            count = buffer._left_out[1]
            count -= 1 - leave_out.array
        return result

    before = get_rng_state(device)
    launch, outputs, kept = _record("graphed_step", step, inputs)
    leave_out.array.fill(0.0)
    parameters = [p for group in groups for p in group["params"]]
    versions, counts = [p.version()[0] for p in parameters], []
    for buffer in _buffers(optimizer):
        given, count = buffer._left_out
        buffer.steps = [n - g for n, g in zip(buffer.steps, given, strict=True)]  # recorded, not made
        counts.append((buffer, count))
    if get_rng_state(device) != before:
        raise OpError("graphed_step: random numbers are drawn (dropout?), which a graph would repeat")

    def run(*given):
        for buffer, count in counts:
            if buffer._left_out is None or buffer._left_out[1] is not count:
                raise OpError("graphed_step: the optimizer was used otherwise since; record again")
        if versions != [p.version()[0] for p in parameters]:  # of which the graph may hold 16-bit copies
            raise OpError("graphed_step: parameters were changed since; record again")
        for group, rate in zip(groups, rates, strict=True):
            rate.fill(group["lr"])
        launch(given)
        for p in parameters:
            p._bump()
        versions[:] = [p.version()[0] for p in parameters]
        return outputs

    run.kept = kept, rates, leave_out
    return run


def _buffers(optimizer):
    return [buffer for flat in optimizer._flat for buffer in flat.buffers]


def _record(name, function, inputs):
    """(a function that copies its arguments in and launches the graph of function(*inputs), its outputs, what must
    stay)."""
    device = inputs[0].device
    if device.type != "cuda":
        raise OpError(f"{name}: the inputs must be on a GPU, not on {device}")
    device.use()
    xp = device.xp
    pool, stream = xp.cuda.MemoryPool(), xp.cuda.Stream(non_blocking=True)  # the graph's own memory lives as long as it
    fixed = [t.detach().clone() for t in inputs]
    xp.cuda.get_current_stream().synchronize()
    capturing(1)
    try:
        with stream, xp.cuda.using_allocator(pool.malloc):
            for _ in range(2):  # compiles kernels, finds algorithms, fills caches
                function(*fixed)
            stream.synchronize()
            collects = gc.isenabled()
            gc.disable()  # memory must not be given back in the middle
            stream.begin_capture()
            try:
                outputs = function(*fixed)
                graph = stream.end_capture()
            except BaseException:
                with suppress(Exception):  # what came of it is no graph, which the reason is not to be hidden by
                    stream.end_capture()
                raise
            finally:
                if collects:
                    gc.enable()
    finally:
        capturing(-1)

    def launch(given):
        for mine, theirs in zip(fixed, given, strict=True):
            if (theirs.shape, theirs.dtype, theirs.device) != (mine.shape, mine.dtype, mine.device):
                raise OpError(
                    f"{name}: recorded for {tuple(mine.shape)} {mine.dtype} on {mine.device}, not for "
                    f"{tuple(theirs.shape)} {theirs.dtype} on {theirs.device}"
                )
            mine.array[...] = theirs.array
        graph.launch()
        device._unread = device._noted is not None

    return launch, outputs, (pool, stream, graph)
