"""Fused routines on raw arrays, at several levels with the same names and arguments:

    reference           whole-array NumPy or CuPy, the readable one; every device has it
    threaded            NumPy on a CPU, in cache-sized blocks over the pool
    cuda.routines       kernels and cuBLAS on a GPU
    compiled            Numba on a CPU (extra `fast`), one pass each; compiled_attention beside it

TENSORGRAD_LEVEL chooses: composed (no fused routine at all: ops/composed.py), reference, numpy (threaded), numba
(compiled), or fast, the best that is installed (default). Each level takes what it does not do from the one before.
"""

import os
import warnings

from . import reference
from .half import HalfRoutines, is_half

LEVELS = ("composed", "reference", "numpy", "numba", "fast")
LEVEL = os.environ.get("TENSORGRAD_LEVEL", "fast")
if LEVEL not in LEVELS:
    raise ValueError(f"TENSORGRAD_LEVEL must be one of {', '.join(LEVELS)}, not {LEVEL!r}")

_routines = None
_half = {}  # by the module that they are made of


def routines(device, dtype=None):
    """The module of routines for arrays on `device`; loaded when the first one is asked for. `dtype` (needed where it
    may be a 16-bit one): that of the arrays which the routine is about."""
    if LEVEL in ("composed", "reference"):
        best = reference
    elif device.type == "cpu":
        best = _routines or _load()
    else:
        from .cuda import routines as best

        return best  # for 16 bits too
    if dtype is None or dtype.itemsize != 2 or not is_half(dtype):
        return best
    if best not in _half:
        _half[best] = HalfRoutines(best)
    return _half[best]


def _load():
    global _routines
    from . import threaded as best

    if LEVEL != "numpy":
        try:
            from . import compiled_all as best
        except ImportError as error:
            if LEVEL == "numba":
                raise ImportError(f"TENSORGRAD_LEVEL=numba needs the extra fast: pip install numba ({error})") from None
        except RuntimeError as error:  # Numba finds no place to keep what it compiles
            warnings.warn(f"compiled kernels are not used: {error}; set NUMBA_CACHE_DIR", stacklevel=2)
    _routines = best
    return best
