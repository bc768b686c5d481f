"""CUDA graphs: a function's work on the GPU recorded once and launched as a whole, where launching costs the time."""

import gc

from .engine import TensorBase
from .errors import OpError
from .kernels.cuda.cublaslt import capturing
from .modes import no_grad


def graphed(function, *inputs):
    """`function(*inputs)` as a CUDA graph: returns a function that takes tensors of the same shapes, dtypes and device,
    launches the recorded work, and returns the outputs (the same tensors each time, overwritten by the next call).

    Pays for small batches, where Python launches slower than the GPU computes. The function is run three times here. It
    must do the same work each time and read no value on the host (item, masks as indices), draw no random numbers,
    record no gradients (it runs under no_grad), and make no tensor of data of the host; ids out of range are reported
    as ever. Products go through cuBLASLt, since CuPy's cuBLAS refuses capture. Raises OpError for inputs on the CPU."""
    device = inputs[0].device
    if device.type != "cuda":
        raise OpError(f"graphed: the inputs must be on a GPU, not on {device}")
    device.use()
    xp = device.xp
    pool, stream = xp.cuda.MemoryPool(), xp.cuda.Stream(non_blocking=True)  # the graph's own memory lives as long as it
    fixed = [t.detach().clone() for t in inputs]
    xp.cuda.get_current_stream().synchronize()
    capturing(1)
    try:
        with stream, xp.cuda.using_allocator(pool.malloc), no_grad():
            for _ in range(2):  # compiles kernels, finds algorithms, fills caches
                function(*fixed)
            stream.synchronize()
            collects = gc.isenabled()
            gc.disable()  # memory must not be given back in the middle
            stream.begin_capture()
            try:
                outputs = function(*fixed)
            finally:
                graph = stream.end_capture()
                if collects:
                    gc.enable()
    finally:
        capturing(-1)

    def run(*given):
        for mine, theirs in zip(fixed, given, strict=True):
            if (theirs.shape, theirs.dtype, theirs.device) != (mine.shape, mine.dtype, mine.device):
                raise OpError(
                    f"graphed: recorded for {tuple(mine.shape)} {mine.dtype} on {mine.device}, not for "
                    f"{tuple(theirs.shape)} {theirs.dtype} on {theirs.device}"
                )
            mine.array[...] = theirs.array
        graph.launch()
        for out in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(out, TensorBase):
                out._bump()
        return outputs

    run.kept = pool, stream, graph
    return run
