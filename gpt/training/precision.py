"""The arithmetic of a run: its `dtype`."""
from contextlib import contextmanager

import tensorgrad as tg


def weights_dtype(dtype):
    """The type of the weights of a run with this `dtype`: master weights are float32 for 16-bit arithmetic."""
    return tg.float64 if dtype == "float64" else tg.float32


@contextmanager
def arithmetic(dtype):
    """Within this context products of matrices are computed as `dtype` says; afterwards as before."""
    before = tg.get_float32_matmul_precision()
    if dtype == "bfloat16":
        tg.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        tg.set_float32_matmul_precision(before)
