"""What all tests share: a fixed seed, one thread for the oracle, and the marker for tests that need a GPU."""

from __future__ import annotations

import os

import pytest

import tensorgrad as tg


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device; skipped where there is none")
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if any(item.get_closest_marker("cuda") for item in items) and not tg.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device: tg.cuda.is_available() is False")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded():
    tg.manual_seed(0)


@pytest.fixture(autouse=True)
def end_with_the_gpu(request):
    """After an illegal access in a kernel a process can use the GPU no more, and all tests behind would fail too: end
    it. What it queued is waited for, so that the right test is named; pytest-xdist goes on with a new process."""
    yield
    if not request.node.get_closest_marker("cuda") or not tg.cuda.is_available():
        return
    try:
        tg.device("cuda").xp.cuda.Device(0).synchronize()
    except RuntimeError as error:
        reason = f"the GPU was lost in {request.node.nodeid}: {error}"
        if hasattr(request.config, "workerinput"):
            os.write(2, f"{reason}\n".encode())
            os._exit(1)
        pytest.exit(f"{reason}; with -n 1 (pytest-xdist) the tests behind it would run", returncode=1)
