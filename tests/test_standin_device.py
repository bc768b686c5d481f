"""CudaDevice and tg.cuda on the stand-in for CuPy: operands that are arrays of CuPy's, memory of several GPUs."""

from __future__ import annotations

import numpy as np
import standin
from standin_device import gpu, install  # noqa: F401

import tensorgrad as tg


def test_arrays_of_cupy_are_operands(gpu):  # noqa: F811
    x = tg.ones(3, device="cuda")
    row = standin.asarray(np.arange(3, dtype=np.float32))
    with standin.counting() as waits:
        results = [x + row, x * standin.asarray(np.float64(2))]
    assert not waits and [r.dtype for r in results] == [tg.float32] * 2
    assert [r.tolist() for r in results] == [[1, 2, 3], [2, 2, 2]]


class Hook:
    """CuPy's MemoryHook: no two of one name."""

    entered: set = set()

    def __enter__(self):
        assert self.name not in self.entered, f"memory hook {self.name} already exists"
        self.entered.add(self.name)


def test_peaks_of_two_gpus(monkeypatch):
    install(monkeypatch, count=2)
    monkeypatch.setattr(standin.cuda, "MemoryHook", Hook, raising=False)
    monkeypatch.setattr(tg.cuda, "_peaks", {})
    for place in (0, 1):
        tg.cuda.reset_peak_memory_stats(place)
    first = tg.cuda._peaks[tg.device("cuda:0")]
    for number, size in ((0, 512), (1, 1024), (0, 512)):
        first.malloc_postprocess(device_id=number, size=1, mem_size=size, mem_ptr=1, pmem_id=1)
    first.free_postprocess(device_id=0, mem_size=512, mem_ptr=1, pmem_id=1)
    assert tg.cuda.max_memory_allocated(0) == 1024 and first.now == 512
