"""How a model's matrices lie in memory: float32, or packed in 16 or 8 bits for running and adapting it on a CPU."""
from tensorgrad import nn

from ..errors import UserError

STORAGE = ("float32", "bfloat16", "float16", "int8")


def check_storage(dtype, device="cpu"):
    """Raise UserError for a `dtype` in which matrices are not stored, or not on `device`."""
    if dtype not in STORAGE:
        raise UserError(f"dtype must be one of {', '.join(STORAGE)}, not {dtype!r}")
    if dtype != "float32" and str(device) != "cpu":
        raise UserError(f"weights are stored as {dtype} on a CPU alone; leave out --dtype with --device {device}")


def store(model, dtype):
    """Store the matrices of `model` as `dtype`, in place, and return it; packed ones are frozen (see nn.quantize)."""
    return model if dtype == "float32" else nn.quantize(model, dtype)
