"""Where arrays live. Each Tensor carries its Device; operations read the array module from it (`ctx.xp`).

A Device gathers the few functions in which NumPy and CuPy differ, so that no operation asks which device it is on.
GPUs are in cuda_device.py, which is loaded when a CUDA device is first asked for, and CuPy with it.
"""

import numpy as np

from .errors import OpIndexError


class DeviceError(RuntimeError):
    """A device was asked for that is not there; the message says what is missing and how to get it."""


class Device:
    """`Device.type` is "cpu" or "cuda", `Device.index` None or the GPU's number, `Device.xp` NumPy or CuPy.
    Instances are interned: compare with `is`."""

    type = "cpu"
    index = None
    xp = np
    ndarray = np.ndarray
    switch = False  # must `use()` come before work on this device, because there are several?

    def __repr__(self):
        return (
            f"device(type='{self.type}')" if self.index is None else f"device(type='{self.type}', index={self.index})"
        )

    def __str__(self):
        return self.type if self.index is None else f"{self.type}:{self.index}"

    def __reduce__(self):
        return device, (str(self),)

    def use(self):
        """Make this the device on which CUDA work of this thread runs."""

    def scalar(self, value, dtype=None):
        """A number (or NumPy array) as an array of this device."""
        return np.asarray(value, dtype)

    def asarray(self, array):
        """`array` (NumPy) as an array of this device; no copy where it already is one."""
        return np.asarray(array)

    def to_numpy(self, array):
        """An array of this device as a NumPy array; waits for the device."""
        return array

    def item(self, array):
        """The only element of an array of this device as a Python number; waits for the device."""
        return array.item()

    def copy_from(self, source, array):
        """A copy on this device of an array of the device `source`."""
        return source.to_numpy(array)

    def from_dlpack(self, array):
        return np.from_dlpack(array)

    def owns(self, array):
        """Is the memory of an array its own, and not that of another array or library?"""
        from .kernels.memory import owns

        return isinstance(array, np.ndarray) and owns(array)

    def scatter_add(self, flat, index, values):
        """flat[index] += values with repeated indices added up; `flat` and `values` are 1-D."""
        np.add.at(flat, index, values)

    def check_range(self, what, index, n, where, ignore=None):
        """Raise IndexError, "`what` 7 is out of range for `where`", where an integer array leaves 0 ... n - 1 at
        elements other than `ignore`. A GPU notes it and raises at the next result that is read (`raise_noted`)."""
        if not index.size or (0 <= int(index.min()) and int(index.max()) < n):
            return
        wrong = index[(index < 0) | (index >= n)]
        wrong = wrong if ignore is None else wrong[wrong != ignore]
        if wrong.size:
            raise OpIndexError(f"{what} {int(wrong.reshape(-1)[0])} is out of range for {where}")

    def check_index(self, shape, index):
        """check_range for the arrays in an index into an array of this shape. NumPy checks by itself."""

    def raise_noted(self):
        """Raise what `check_range` noted on a GPU; nothing on a CPU, which raises at once."""

    def synchronize(self):
        """Wait until all work queued on the device is done."""



def address(array):
    """Where the memory of an array, NumPy's or CuPy's, begins."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


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
        from .cuda_device import open_device

        _cuda_devices[index] = open_device(spec, index)
    return _cuda_devices[index]
