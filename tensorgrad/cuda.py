"""torch.cuda's few names that programs ask for; CuPy is imported only when one is called."""

from .device import cuda_device_count as device_count
from .device import cuda_is_available as is_available
from .device import device


def synchronize(place="cuda"):
    """Wait until all work queued on the GPU is done."""
    device(place).synchronize()


__all__ = ["device_count", "is_available", "synchronize"]
