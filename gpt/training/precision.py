"""The arithmetic of a run: its `dtype`."""
from contextlib import contextmanager, nullcontext

import tensorgrad as tg


def weights_dtype(dtype):
    """The type of the weights of a run with this `dtype`: master weights are float32 for 16-bit arithmetic."""
    return tg.float64 if dtype == "float64" else tg.float32


def arithmetic(dtype, device="cpu"):
    """Within this context products of matrices are computed as `dtype` says; afterwards as before. On a GPU 16 bits
    mean autocast, on a CPU bfloat16 means float32 arrays multiplied in bfloat16."""
    if dtype in ("float32", "float64"):
        return nullcontext()
    return _products() if dtype == "bfloat16" and tg.device(device).type == "cpu" else tg.autocast(dtype)


@contextmanager
def _products():
    before = tg.get_float32_matmul_precision()
    tg.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        tg.set_float32_matmul_precision(before)
