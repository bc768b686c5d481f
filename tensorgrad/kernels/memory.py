"""Memory between steps: keep what is freed, instead of returning it to the system and asking for it anew.

A training step frees and asks for the same sizes again and again. The system hands out zeroed pages one fault at a
time: 0.8 ms per megabyte here, seven times what it takes to write a megabyte that is there already. Two things stop it:

* small and middling arrays come from the C library, which two settings of mallopt(3) tell to keep what is freed;
* arrays of 32 MB and more, which the C library always gives back (the largest threshold that glibc takes), are kept
  here, by size: `empty` hands out a block that a dropped array left behind. Blocks in use and kept together never
  exceed the most that was ever in use at once, so the process's peak stays what it would be without.

TENSORGRAD_MALLOPT=0 leaves the process alone: nothing is kept.
"""

import ctypes
import math
import os
import sys
import threading
from collections import OrderedDict
from weakref import ref

import numpy as np

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGE = 1 << 25  # bytes
KEEP = os.environ.get("TENSORGRAD_MALLOPT", "1") != "0"


def keep_freed_memory():
    """Apply the settings (glibc on Linux; elsewhere nothing happens)."""
    if not sys.platform.startswith("linux") or not KEEP:
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, LARGE)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 1 << 20)


class Block(np.ndarray):
    """A block of memory, as bytes. A class of its own: a view of an array holds the array, and not what the array is a
    view of, where these two differ in class; so an array lives as long as any view of it."""


class _Blocks:
    """Blocks of memory by their size in bytes, of dropped arrays."""

    def __init__(self):
        self.kept = OrderedDict()  # size -> blocks, the size freed last at the end
        self.in_use = self.peak = self.kept_bytes = 0
        self._watched = {}  # the references themselves must live to be called
        self._lock = threading.RLock()  # an array may be dropped at any moment, also in the middle of `take`

    def take(self, shape, dtype, size):
        with self._lock:
            block = self._pop(size)
            if block is None:
                room = max(self.peak, self.in_use + size)
                while self.kept and self.in_use + self.kept_bytes + size > room:
                    self._pop(next(iter(self.kept)))
                block = Block(size, np.uint8)
            array = np.ndarray(shape, dtype, block)

            def dropped(reference):
                with self._lock:
                    del self._watched[id(reference)]
                    self.in_use -= size
                    self.kept_bytes += size
                    self.kept.setdefault(size, []).append(block)
                    self.kept.move_to_end(size)

            watch = ref(array, dropped)
            self._watched[id(watch)] = watch
            self.in_use += size
            self.peak = max(self.peak, self.in_use)
            return array

    def _pop(self, size):
        blocks = self.kept.get(size)
        if not blocks:
            return None
        if len(blocks) == 1:
            del self.kept[size]
        self.kept_bytes -= size
        return blocks.pop()


blocks = _Blocks()


def owns(array):
    """Is the memory of a NumPy array its own, and not that of another array?"""
    return array.flags.owndata or type(array.base) is Block


def empty(shape, dtype):
    """np.empty, whose large arrays live in kept blocks."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    return blocks.take(shape, dtype, size) if KEEP and size >= LARGE else np.empty(shape, dtype)


def empty_like(x):
    """np.empty_like for contiguous arrays, whose large arrays live in kept blocks."""
    return np.empty_like(x) if x.nbytes < LARGE else empty(x.shape, x.dtype)
