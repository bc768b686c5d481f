"""Where arrays live. Each Tensor carries its Device; operations read the array module from it (`ctx.xp`).

A Device gathers the few functions in which NumPy and CuPy differ, so that no operation asks which device it is on.
CuPy is imported when a CUDA device is first asked for, never before.
"""

import numpy as np


class DeviceError(RuntimeError):
    """A device was asked for that is not there; the message says what is missing and how to get it."""


class Device:
    """`Device.type` is "cpu" or "cuda", `Device.index` None or the GPU's number, `Device.xp` NumPy or CuPy.
    Instances are interned: compare with `is`."""

    type = "cpu"
    index = None
    xp = np
    ndarray = np.ndarray

    def __repr__(self):
        return (
            f"device(type='{self.type}')" if self.index is None else f"device(type='{self.type}', index={self.index})"
        )

    def __str__(self):
        return self.type if self.index is None else f"{self.type}:{self.index}"

    def __reduce__(self):
        return device, (str(self),)

    def asarray(self, array):
        """`array` (NumPy) as an array of this device; no copy where it already is one."""
        return np.asarray(array)

    def to_numpy(self, array):
        """An array of this device as a NumPy array; waits for the device."""
        return array

    def from_dlpack(self, array):
        return np.from_dlpack(array)

    def scatter_add(self, flat, index, values):
        """flat[index] += values with repeated indices added up; `flat` and `values` are 1-D."""
        np.add.at(flat, index, values)

    def synchronize(self):
        """Wait until all work queued on the device is done."""


class CudaDevice(Device):
    """One NVIDIA GPU through CuPy."""

    type = "cuda"

    def __init__(self, cupy, index):
        self.xp, self.index, self.ndarray = cupy, index, cupy.ndarray

    def asarray(self, array):
        with self.xp.cuda.Device(self.index):
            return self.xp.asarray(array)

    def to_numpy(self, array):
        return self.xp.asnumpy(array)

    def from_dlpack(self, array):
        return self.xp.from_dlpack(array)

    def scatter_add(self, flat, index, values):
        import cupyx

        cupyx.scatter_add(flat, index, values)

    def synchronize(self):
        self.xp.cuda.Device(self.index).synchronize()


cpu = Device()
_cuda_devices = {}


def device(spec):
    """The Device named by "cpu", "cuda", "cuda:1" or a Device. Raises DeviceError where there is none."""
    if isinstance(spec, Device):
        return spec
    kind, _, number = str(spec).partition(":")
    if kind == "cpu" and number in ("", "0"):
        return cpu
    if kind != "cuda" or (number and not number.isdigit()):
        raise DeviceError(f"unknown device {spec!r}; devices are 'cpu', 'cuda' and 'cuda:N'")
    index = int(number or 0)
    if index not in _cuda_devices:
        cupy, count = _load_cupy(spec)
        if index >= count:
            raise DeviceError(
                f"device {spec!r} is not there: this machine has {count} CUDA device(s), cuda:0 to cuda:{count - 1}"
            )
        _cuda_devices[index] = CudaDevice(cupy, index)
    return _cuda_devices[index]


def _load_cupy(spec):
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            f"device {spec!r} needs CuPy, which cannot be imported ({error}); "
            'install it with pip install -e ".[cuda13]" (CUDA 13 driver) or ".[cuda12]"'
        ) from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CUDARuntimeError; its class needs a working CUDA to import
        raise DeviceError(
            f"device {spec!r} needs an NVIDIA driver and GPU, which CuPy does not find: {error}"
        ) from None
    if count == 0:
        raise DeviceError(f"device {spec!r} is not there: CuPy finds no GPU")
    return cupy, count


def cuda_is_available():
    """True where CuPy is installed and sees at least one GPU; never raises."""
    try:
        return _load_cupy("cuda")[1] > 0
    except DeviceError:
        return False


def cuda_device_count():
    """The number of GPUs that CuPy sees; 0 without CuPy or driver."""
    try:
        return _load_cupy("cuda")[1]
    except DeviceError:
        return 0
