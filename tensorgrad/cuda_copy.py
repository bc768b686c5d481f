"""Copies to a GPU on a stream of their own, beside what it computes."""

import numpy as np

from .device import device as as_device
from .engine import wrap


class Prefetcher:
    """Copies arrays to a GPU ahead of their use, from pinned memory (CuPy's) on a stream of its own: neither the host
    waits for the copy nor the copy for the work that is queued.

        prefetch = tg.cuda.Prefetcher("cuda")
        x, y = prefetch(ids, targets)         # NumPy arrays; while the GPU computes the step before

    Work that is queued later waits for the copy. What a call returned must have been used up, by work queued, when the
    next call after it is made: the call after that may use its memory again."""

    def __init__(self, device="cuda"):
        self.device = as_device(device)
        self.device.use()
        self._stream = self.device.xp.cuda.Stream(non_blocking=True)
        self._before = None  # the event behind all work that was queued when the last call was made
        self._held = []  # what the last call returned: its memory is not free yet

    def __call__(self, *arrays):
        """The arrays as tensors on the device, in a list."""
        self.device.use()
        cuda = self.device.xp.cuda
        main = cuda.get_current_stream()
        if self._before is not None:
            self._stream.wait_event(self._before)  # what used the memory that is free now
        self._before = main.record(cuda.Event(disable_timing=True))
        with self._stream:
            copies = [wrap(self.device.asarray(np.asarray(a)), self.device) for a in arrays]
        main.wait_event(self._stream.record(cuda.Event(disable_timing=True)))
        self._held = copies
        return list(copies)
