"""What all tests share: a fixed seed, one thread for the oracle, and the marker for tests that need a GPU."""

from __future__ import annotations

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
