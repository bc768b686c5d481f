"""torch.cuda's names that programs ask for. CuPy is imported only when one is called.

`place` is "cuda", "cuda:1", a number or a Device; without it the device that was used last (0 at first)."""

from .device import device as _device


def is_available():
    """True where CuPy is installed and sees at least one GPU; never raises."""
    return device_count() > 0


def device_count():
    """The number of GPUs that CuPy sees; 0 without CuPy or driver."""
    from .cuda_device import cuda_device_count

    return cuda_device_count()


def _place(place):
    if place is None:
        place = current_device()
    return _device(f"cuda:{place}" if isinstance(place, int) else place)


def current_device():
    """The number of the GPU on which this thread's work runs now."""
    return _device("cuda").xp.cuda.Device().id


def set_device(place):
    """Make a GPU the current one. Operations on tensors run where the tensors are, whatever is current."""
    _place(place).use()


def get_device_name(place=None):
    """The GPU's name, e.g. "NVIDIA H200"."""
    place = _place(place)
    name = place.xp.cuda.runtime.getDeviceProperties(place.index)["name"]
    return name.decode() if isinstance(name, bytes) else name


def get_device_capability(place=None):
    """(major, minor) of the GPU's compute capability, (9, 0) for Hopper."""
    number = _place(place).xp.cuda.Device(_place(place).index).compute_capability
    return int(number[:-1]), int(number[-1])


def is_bf16_supported(place=None):
    """Does the GPU multiply bfloat16 in hardware (capability 8.0 and above)?"""
    return get_device_capability(place) >= (8, 0)


def synchronize(place=None):
    """Wait until all work queued on the GPU is done; reports indices that were out of range."""
    _place(place).synchronize()


def graphed(function, *inputs):
    """`function(*inputs)` as a CUDA graph, a function that launches all its work at once: see cuda_graph.graphed."""
    from .cuda_graph import graphed as record

    return record(function, *inputs)


def graphed_step(function, optimizer, *inputs):
    """A whole training step as a CUDA graph: see cuda_graph.graphed_step."""
    from .cuda_graph import graphed_step as record

    return record(function, optimizer, *inputs)


# ---- memory, in bytes ------------------------------------------------------------------------------------------------


def memory_allocated(place=None):
    """Bytes of the GPU that arrays hold now."""
    with _current(place) as xp:
        return xp.get_default_memory_pool().used_bytes()


def memory_reserved(place=None):
    """Bytes that the pool has taken from the driver: what arrays hold and what is kept for the next ones."""
    with _current(place) as xp:
        return xp.get_default_memory_pool().total_bytes()


def max_memory_allocated(place=None):
    """The most bytes that arrays held at once since `reset_peak_memory_stats()`. Without a reset nothing was counted,
    and it is the most that the pool has reserved (`memory_reserved`), somewhat more."""
    place = _place(place)
    counter = _peaks.get(place)
    return memory_reserved(place) if counter is None else counter.peak


def reset_peak_memory_stats(place=None):
    """Count the peak anew from what is allocated now. From the first call on every allocation is counted, which costs
    the host about a microsecond each."""
    place = _place(place)
    if place not in _peaks:
        _peaks[place] = _peak_counter(place)
    counter = _peaks[place]
    counter.now = counter.peak = memory_allocated(place)


def empty_cache():
    """Give the memory that no array holds back to the driver."""
    _place(None).xp.get_default_memory_pool().free_all_blocks()


def mem_get_info(place=None):
    """(free, total) bytes of the GPU, whoever uses the rest."""
    place = _place(place)
    return tuple(place.xp.cuda.Device(place.index).mem_info)


def _current(place):
    from contextlib import contextmanager

    @contextmanager
    def current():
        device = _place(place)
        with device.xp.cuda.Device(device.index):
            yield device.xp

    return current()


_peaks = {}


def _peak_counter(place):
    """A MemoryHook of CuPy, entered for good, that follows the pool's bytes on one GPU."""

    class Peak(place.xp.cuda.MemoryHook):
        name = f"tensorgrad peak {place}"  # CuPy keeps hooks by name
        now = peak = 0

        def malloc_postprocess(self, **event):
            if event["device_id"] == place.index:
                self.now += event["mem_size"]
                self.peak = max(self.peak, self.now)

        def free_postprocess(self, **event):
            if event["device_id"] == place.index:
                self.now -= event["mem_size"]

    counter = Peak()
    counter.__enter__()
    return counter


def __getattr__(name):
    if name == "OutOfMemoryError":
        from .cuda_device import OutOfMemoryError

        return OutOfMemoryError
    if name == "Prefetcher":
        from .cuda_copy import Prefetcher

        return Prefetcher
    raise AttributeError(f"module 'tensorgrad.cuda' has no attribute {name!r}")


__all__ = [
    "Prefetcher",  # noqa: F822
    "current_device",
    "device_count",
    "empty_cache",
    "get_device_capability",
    "get_device_name",
    "graphed",
    "graphed_step",
    "is_available",
    "is_bf16_supported",
    "max_memory_allocated",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "reset_peak_memory_stats",
    "set_device",
    "synchronize",
]
