"""The stand-in as device "cuda": a CudaDevice over tests/standin.py instead of CuPy; tensorgrad with that default."""

from __future__ import annotations

import functools
import sys

import pytest
import standin

import tensorgrad as tg
from tensorgrad.cuda_device import CudaDevice
from tensorgrad.kernels.cuda import launch

devices = sys.modules["tensorgrad.device"]  # the package has a function of that name
MAKERS = """tensor as_tensor full zeros ones empty arange linspace eye rand randn randint randperm
scalar_tensor""".split()


def install(monkeypatch, count=1):
    """Let "cuda" (and "cuda:1" with count=2) be the stand-in for the rest of the test; returns the first device."""
    table = {i: CudaDevice(standin, i, count) for i in range(count)}
    monkeypatch.setattr(devices, "_cuda_devices", table)
    monkeypatch.setenv("TENSORGRAD_CUDA_GRAPH", "0")  # standin_graphs.py records
    standin.syncs.clear()
    standin.cuda.Device(0).use()
    return table[0]


@pytest.fixture
def gpu(monkeypatch):
    return install(monkeypatch)


class OnDevice:
    """tensorgrad whose makers of tensors use `device` unless told otherwise."""

    def __init__(self, device):
        self._device = device

    def __getattr__(self, name):
        thing = getattr(tg, name)
        if name not in MAKERS:
            return thing

        @functools.wraps(thing)
        def make(*args, device=None, **options):
            return thing(*args, device=device or self._device, **options)

        return make


class Emulated:
    """Launches the kernels of the stand-in's arrays on the CPU emulation of their sources; `names` keeps what ran."""

    def __init__(self):
        from cuda_emulator import Emulator

        self.emulator, self.names = Emulator(), []

    def launch(self, name, types, *values):
        self.names.append(name)
        self.emulator.launch(name, types, *(v._a if isinstance(v, standin.ndarray) else v for v in values))


@pytest.fixture
def kernels(monkeypatch):
    """As `gpu`, with the CUDA kernels; returns what launches them."""
    from cuda_emulator import has_compiler

    if not has_compiler():
        pytest.skip("the CUDA kernels are compiled for the CPU with g++, which is not installed")
    install(monkeypatch)
    launcher = Emulated()
    launch.use(standin, launcher)
    yield launcher
    launch.use(standin, None)
