"""NVIDIA GPUs through CuPy: one CudaDevice per GPU, and one clear line for each thing that may be missing."""

import warnings

import numpy as np

from .device import Device, DeviceError
from .errors import OpIndexError
from .kernels.cuda.launch import has_kernels, launch

INSTALL = 'install it with pip install -e ".[cuda13]" (driver of 2025 or later) or ".[cuda12]"'
SLOTS = 64  # kinds of out-of-range checks that a device keeps apart
NONE = np.iinfo(np.int64).min


class OutOfMemoryError(MemoryError, RuntimeError):
    """The GPU's memory is used up."""


class CudaDevice(Device):
    """One NVIDIA GPU. `count`: how many there are; with several, each operation first makes its own the current one,
    which then stays so for the thread, as with torch.cuda.set_device."""

    type = "cuda"

    def __init__(self, cupy, index, count=1):
        self.xp, self.index, self.ndarray, self.switch = cupy, index, cupy.ndarray, count > 1
        self._noted = None  # per kind of check the largest element found out of range, on the device
        self._checks, self._unread = {}, False

    def use(self):
        self.xp.cuda.Device(self.index).use()

    def scalar(self, value, dtype=None):
        if self.switch:
            self.use()
        if hasattr(value, "__cuda_array_interface__"):
            return self.xp.asarray(value, dtype)
        array = np.asarray(value, dtype)
        if array.ndim:
            return self.xp.asarray(array)
        return self.xp.full((), value, array.dtype)  # the number travels with the kernel: no copy from the host

    def asarray(self, array):
        if self.switch:
            self.use()
        return self.xp.asarray(array)

    def to_numpy(self, array):
        out = self.xp.asnumpy(array)
        if self._unread:
            self.raise_noted()
        return out

    def item(self, array):
        value = array.item()
        if self._unread:
            self.raise_noted()
        return value

    def copy_from(self, source, array):
        if self.switch:
            self.use()
        return self.xp.asarray(array) if source.type == "cpu" else array.copy()  # a copy goes to the current device

    def from_dlpack(self, array):
        return self.xp.from_dlpack(array)

    def owns(self, array):
        own = isinstance(array, self.ndarray) and array.base is None
        return own and type(getattr(array.data, "mem", None)).__name__ != "UnownedMemory"  # which DLPack gives

    def scatter_add(self, flat, index, values):
        """CUDA adds atomically for some dtypes only: whole numbers go as unsigned ones of their size, which add alike,
        or through int32, bfloat16 through float32. The order of additions, and so the last bits of sums of floats,
        may differ between runs."""
        dtype = flat.dtype
        through = {"int64": np.uint64, "int8": np.int32, "int16": np.int32, "uint8": np.int32, "bool": np.int32,
                   "bfloat16": np.float32}.get(dtype.name)
        if through is None:
            self.xp.add.at(flat, index, values)
        elif dtype.itemsize == np.dtype(through).itemsize:
            self.xp.add.at(flat.view(through), index, self.xp.ascontiguousarray(values).view(through))
        else:
            sums = flat.astype(through)
            self.xp.add.at(sums, index, values.astype(through))
            flat[...] = sums.astype(dtype)

    # ---- out-of-range indices: CuPy wraps them around silently, and looking at them would stall the queue ----

    def check_range(self, what, index, n, where, ignore=None):
        self._note(what, index, 0, n, where, ignore)

    def check_index(self, shape, index):
        dim = 0
        for item in index:
            if isinstance(item, self.ndarray) and item.dtype.kind in "iu":
                n = shape[dim]
                self._note("getitem: index", item, -n, n, f"dimension {dim} of size {n}")
            dim += item.ndim if isinstance(item, self.ndarray) and item.dtype == bool else item is not None

    def _note(self, what, index, low, high, where, ignore=None):
        if not index.size:
            return
        xp, index = self.xp, index.astype(np.int64, copy=False)
        if self._noted is None:
            self._noted = xp.full((SLOTS,), NONE, np.int64)
        slot = self._checks.setdefault((what, where), len(self._checks) % SLOTS)
        noted, self._unread = self._noted[slot : slot + 1], True
        if has_kernels(xp):
            index, ignore = xp.ascontiguousarray(index), NONE if ignore is None else ignore
            launch(xp, "note_outside", (), index, noted, index.size, low, high, ignore)
            return
        wrong = (index < low) | (index >= high)
        if ignore is not None:
            wrong &= index != ignore
        xp.maximum(noted, xp.where(wrong, index, NONE).max(), out=noted)

    def raise_noted(self):
        if not self._unread:
            return
        self._unread = False
        noted = self.xp.asnumpy(self._noted)
        for (what, where), slot in self._checks.items():
            if noted[slot] != NONE:
                self._noted.fill(NONE)
                raise OpIndexError(f"{what} {noted[slot]} is out of range for {where} (noted on {self}, reported when "
                                   "a result was read)")

    def synchronize(self):
        self.xp.cuda.Device(self.index).synchronize()
        if self._unread:
            self.raise_noted()


def open_device(spec, index):
    """The CudaDevice number `index`; raises DeviceError with what is missing for it."""
    cupy, count = load_cupy(spec)
    if index >= count:
        raise DeviceError(
            f"device {spec!r} is not there: this machine has {count} CUDA device(s), cuda:0 to cuda:{count - 1}"
        )
    return CudaDevice(cupy, index, count)


_loaded = None  # (cupy, number of GPUs) once found


def load_cupy(spec="cuda"):
    """(cupy, number of GPUs), after making sure that CuPy and the CUDA libraries it needs are there."""
    global _loaded
    if _loaded is None:
        try:
            import cupy
        except ImportError as error:
            reason = f"needs CuPy, which cannot be imported ({_line(error)}); {INSTALL}"
            raise DeviceError(f"device {spec!r} {reason}") from None
        count = _count(cupy, spec)
        _require_libraries(cupy, spec)
        _name_memory_errors(cupy)
        _loaded = cupy, count
    return _loaded


def load_nccl(spec):
    """CuPy's module for NCCL, NVIDIA's collectives between GPUs; raises DeviceError where the library is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's own words, of six lines
        from cupy.cuda import nccl
    if not nccl.available:
        raise DeviceError(f"several processes on GPUs ({spec}) need NVIDIA's NCCL, which CuPy cannot load: pip install "
                          '-e ".[nccl]", or for CUDA 12 pip install "nvidia-nccl-cu12<3"')
    return nccl


def _count(cupy, spec):
    """The number of GPUs; DeviceError where there is no driver, one that is too old, or no GPU."""
    runtime = cupy.cuda.runtime
    try:
        driver = runtime.driverGetVersion()
    except Exception:  # CUDARuntimeError, whose class needs a working CUDA to import
        driver = 0
    if not driver:
        raise DeviceError(f"device {spec!r} needs an NVIDIA driver, and this machine has none; install the driver, or "
                          "use --device cpu")
    try:
        count = runtime.getDeviceCount()
    except Exception as error:
        built = getattr(runtime, "CUDART_VERSION", None) or _version_of(runtime.runtimeGetVersion)
        if "InsufficientDriver" in str(error) or (built and driver // 1000 < built // 1000):
            raise DeviceError(
                f"device {spec!r}: the NVIDIA driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, the "
                f"installed CuPy needs CUDA {(built or 13000) // 1000}; install the other extra, pip install -e "
                f'".[cuda{driver // 1000}]" after pip uninstall of the present cupy package, or a newer driver'
            ) from None
        raise DeviceError(f"device {spec!r} is not there: CuPy finds no GPU ({_line(error)}); is CUDA_VISIBLE_DEVICES "
                          "set?") from None
    if not count:
        raise DeviceError(f"device {spec!r} is not there: CuPy finds no GPU; is CUDA_VISIBLE_DEVICES set?")
    return count


def _version_of(function):
    try:
        return function()
    except Exception:
        return None


def _require_libraries(cupy, spec):
    """cuBLAS for products and NVRTC for kernels: CuPy finds out late that they are missing, and in many words."""
    for name, use in (("cublas", lambda: cupy.cuda.cublas.gemmEx), ("nvrtc", lambda: cupy.cuda.nvrtc.getVersion())):
        try:
            use()
        except Exception as error:  # ImportError, DynamicLibNotFoundError or a loader's OSError
            raise DeviceError(f"device {spec!r} needs the CUDA library {name}, which CuPy cannot load "
                              f"({_line(error)}); {INSTALL}") from None


def _line(error):
    """The first line of a message, not too long."""
    text = str(error).strip().split("\n")[0]
    return text if len(text) < 160 else text[:157] + "..."


def _name_memory_errors(cupy):
    """Let every allocation that fails say what was asked for, what is free, and what helps."""
    pool, failure = cupy.get_default_memory_pool(), cupy.cuda.memory.OutOfMemoryError

    def malloc(size):
        try:
            return pool.malloc(size)
        except failure:
            free, total = cupy.cuda.Device().mem_info
            raise OutOfMemoryError(out_of_memory(cupy.cuda.Device().id, size, free, total, pool.used_bytes())) from None

    cupy.cuda.set_allocator(malloc)


def out_of_memory(index, size, free, total, used):
    """The one line for memory that is used up; sizes in bytes."""
    asked, free, total, used = (f"{n / 2**30:.2f} GiB" for n in (size, free, total, used))
    return (f"out of memory on cuda:{index}: {asked} asked for, {free} free of {total}, {used} in tensors; use a "
            "smaller batch_size (with more gradient_accumulation_steps), a smaller block_size, or dtype bfloat16")


def cuda_device_count():
    """The number of GPUs that CuPy sees; 0 without CuPy or driver."""
    try:
        return load_cupy()[1]
    except DeviceError:
        return 0
