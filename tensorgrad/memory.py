"""How much memory arrays and the process take.

    with tg.track_memory():
        loss = model(idx, targets)[1]
        loss.backward()
        print(tg.memory_stats())

NumPy lets a program bring its own allocator (NEP 49). While tracking, arrays of the tracking thread come from one that
counts and hands on to NumPy's own; otherwise nothing is counted, at no cost.
"""

import atexit
import ctypes
import os
import sys
from pathlib import Path

import numpy as np


class _Allocator(ctypes.Structure):
    """PyDataMemAllocator of NumPy's C API: addresses of functions."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("ctx", "malloc", "calloc", "realloc", "free")]


_PLACE, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_SIGNATURES = {  # result and arguments, of which the first is ctx
    "malloc": (_PLACE, _PLACE, _SIZE),
    "calloc": (_PLACE, _PLACE, _SIZE, _SIZE),
    "realloc": (_PLACE, _PLACE, _PLACE, _SIZE),
    "free": (None, _PLACE, _PLACE, _SIZE),
}


class _Handler(ctypes.Structure):
    """PyDataMem_Handler of NumPy's C API."""

    _fields_ = [("name", ctypes.c_char * 127), ("version", ctypes.c_uint8), ("allocator", _Allocator)]


_CAPSULE = b"mem_handler"
_SET_HANDLER, _GET_HANDLER = 304, 305  # places in the table of NumPy's C API, the same in all versions
_kept = []  # handlers that were in use, and their functions: an array points to its handler as long as it lives
_tracking = None


def _c_api(place, *arguments):
    """The function at this place of NumPy's C API, which returns an object."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = ctypes.cast(get(np._core._multiarray_umath._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    return ctypes.PYFUNCTYPE(ctypes.py_object, *arguments)(table[place])


class track_memory:  # noqa: N801, a context manager spelled like the other modes
    """While this context lasts, count the arrays that the thread makes: `memory_stats()` has their number and bytes.
    Arrays from before do not count, nor do the small ones that other threads of the pool and compiled routines make for
    themselves. An allocation costs a microsecond or two more. Not nested: RuntimeError."""

    def __enter__(self):
        global _tracking
        if _tracking is not None:
            raise RuntimeError("track_memory: memory is being tracked already")
        self.bytes, self.peak, self.allocations = 0, 0, 0
        get = ctypes.pythonapi.PyCapsule_GetPointer
        current = _c_api(_GET_HANDLER)()
        own = ctypes.cast(get(current, _CAPSULE), ctypes.POINTER(_Handler)).contents
        self._own = own.allocator
        self._handler = _Handler(b"tensorgrad", own.version, self._counting(own.allocator))
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        _kept.append(self._handler)
        self._before = _c_api(_SET_HANDLER, ctypes.py_object)(new(ctypes.addressof(self._handler), _CAPSULE, None))
        _tracking = self
        atexit.register(self._hand_over)
        return self

    def __exit__(self, *error):
        global _tracking
        _c_api(_SET_HANDLER, ctypes.py_object)(self._before)
        self._hand_over()
        atexit.unregister(self._hand_over)
        _tracking = None

    def reset_peak(self):
        """Let the peak start again from what is there now."""
        self.peak = self.bytes

    def _counting(self, own):
        # NumPy's own functions are called with the GIL, which they expect to be held
        own = {name: ctypes.PYFUNCTYPE(*types)(getattr(own, name)) for name, types in _SIGNATURES.items()}

        def add(size):
            self.bytes += size
            self.allocations += size > 0
            self.peak = max(self.peak, self.bytes)

        def malloc(ctx, size):
            add(size)
            return own["malloc"](ctx, size)

        def calloc(ctx, count, size):
            add(count * size)
            return own["calloc"](ctx, count, size)

        def realloc(ctx, place, size):  # NumPy does not say how large it was: growing arrays are not counted
            return own["realloc"](ctx, place, size)

        def free(ctx, place, size):
            add(-size)
            own["free"](ctx, place, size)

        functions = [ctypes.CFUNCTYPE(*_SIGNATURES[f.__name__])(f) for f in (malloc, calloc, realloc, free)]
        _kept.append(functions)
        addresses = [ctypes.cast(f, ctypes.c_void_p) for f in functions]
        return _Allocator(self._own.ctx, *addresses)

    def _hand_over(self):
        """Arrays that live on are freed by NumPy's own allocator, without counting (and without Python, at its end)."""
        self._handler.allocator = self._own


def memory_stats():
    """A dict of numbers, bytes where not said otherwise:

    process, process_peak     resident memory of the process now, and the most so far
    page_faults               how often the process touched memory that was new to it (a count): in a steady training
                              loop next to never, because freed memory is used again
    arrays, arrays_peak       arrays made by this thread since `track_memory` began, and the most so far;
    allocations               and how many were made (a count). None where memory is not tracked."""
    now, peak, faults = _process()
    counts = (None,) * 3 if _tracking is None else (_tracking.bytes, _tracking.peak, _tracking.allocations)
    names = "process", "process_peak", "page_faults", "arrays", "arrays_peak", "allocations"
    return dict(zip(names, (now, peak, faults, *counts), strict=True))


def _process():
    """(resident now, most so far, minor page faults); None for what the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None, None, None
    usage = resource.getrusage(resource.RUSAGE_SELF)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    now = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None
    return now, peak, usage.ru_minflt
