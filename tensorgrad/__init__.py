"""tensorgrad: a small, complete autograd framework on NumPy and CuPy, spelled like PyTorch.

import tensorgrad as tg
x = tg.randn(3, requires_grad=True)
(x ** 2).sum().backward()
x.grad
"""

from . import cuda, dtypes, functions
from .creation import (
    arange,
    as_tensor,
    empty,
    empty_like,
    eye,
    from_dlpack,
    from_numpy,
    full,
    full_like,
    linspace,
    ones,
    ones_like,
    rand,
    rand_like,
    randint,
    randn,
    randn_like,
    randperm,
    tensor,
    zeros,
    zeros_like,
)
from .device import Device, DeviceError, device
from .dtypes import bool as bool
from .dtypes import (
    float16,
    float32,
    float64,
    get_default_dtype,
    int8,
    int16,
    int32,
    int64,
    promote_types,
    set_default_dtype,
    uint8,
)
from .errors import OpError
from .functions import *  # noqa: F403
from .io import load, save
from .kernels.precision import (
    are_deterministic_algorithms_enabled,
    get_float32_matmul_precision,
    set_float32_matmul_precision,
    use_deterministic_algorithms,
)
from .modes import (
    enable_grad,
    inference_mode,
    is_grad_enabled,
    is_inference_mode_enabled,
    no_grad,
    set_grad_enabled,
)
from .random import Generator, get_rng_state, manual_seed, set_rng_state
from .tensor import Tensor

float = float32
double = float64
half = float16
long = int64
int = int32
short = int16
__version__ = "0.1.0"

# imported when first used, so that `import tensorgrad` stays quick
_LAZY = {"amp", "autograd", "distributed", "nn", "optim", "utils"}


def __getattr__(name):
    if name in _LAZY:
        import importlib

        return importlib.import_module(f".{name}", __name__)
    if name in ("memory_stats", "track_memory"):
        from . import memory

        return getattr(memory, name)
    if name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
        from . import amp

        return getattr(amp, name)
    if name == "bfloat16":
        return dtypes.bfloat16
    raise AttributeError(f"module 'tensorgrad' has no attribute {name!r}")


__all__ = [
    "Device",
    "DeviceError",
    "Generator",
    "OpError",
    "Tensor",
    "arange",
    "are_deterministic_algorithms_enabled",
    "as_tensor",
    "autograd",  # noqa: F405
    "bool",
    "cuda",
    "device",
    "distributed",  # noqa: F405
    "double",
    "dtypes",
    "empty",
    "empty_like",
    "enable_grad",
    "eye",
    "float",
    "float16",
    "float32",
    "float64",
    "from_dlpack",
    "from_numpy",
    "full",
    "full_like",
    "get_default_dtype",
    "get_float32_matmul_precision",
    "get_rng_state",
    "half",
    "inference_mode",
    "int",
    "int16",
    "int32",
    "int64",
    "int8",
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "linspace",
    "load",
    "long",
    "manual_seed",
    "memory_stats",  # noqa: F405
    "no_grad",
    "ones",
    "ones_like",
    "promote_types",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "save",
    "set_default_dtype",
    "set_float32_matmul_precision",
    "set_grad_enabled",
    "set_rng_state",
    "short",
    "tensor",
    "track_memory",  # noqa: F405
    "uint8",
    "use_deterministic_algorithms",
    "zeros",
    "zeros_like",
    *functions.__all__,
]
