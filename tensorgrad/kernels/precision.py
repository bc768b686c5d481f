"""How products of float32 matrices are computed, and whether sums have one order: switches of the process."""

import warnings

_precision = "highest"


def set_float32_matmul_precision(precision):
    """How products of float32 matrices (linear layers, matmul of two matrices) are computed, as in PyTorch.

    "highest": in float32 (default). "high": on CUDA in TF32, 10 bits of mantissa; on a CPU as "highest". "medium": on
    a CPU in bfloat16, 8 bits, where processor and library (extra `bfloat16`) offer it; on CUDA as "high". Sums are kept
    in float32 always. Where "medium" is not to be had on the CPU, one warning says why and float32 is used."""
    global _precision
    if precision not in ("highest", "high", "medium"):
        raise ValueError(f"the precision of float32 products is highest, high or medium, not {precision!r}")
    if precision == "medium" and _precision != "medium":
        from .bfloat16 import unavailable

        if missing := unavailable():
            warnings.warn(f"products on the CPU stay in float32: {missing}", stacklevel=2)
    _precision = precision


def get_float32_matmul_precision():
    """The present one of "highest", "high" and "medium"; see `set_float32_matmul_precision`."""
    return _precision


_deterministic = False


def use_deterministic_algorithms(mode):
    """With True, the gradient of an embedding is added up in a fixed order on a GPU too (from sorted ids), and a run
    repeats its bits; by default the GPU adds in any order, which is faster. The CPU is deterministic always."""
    global _deterministic
    _deterministic = bool(mode)


def are_deterministic_algorithms_enabled():
    """See `use_deterministic_algorithms`."""
    return _deterministic
