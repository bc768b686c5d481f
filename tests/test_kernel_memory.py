"""Memory that is kept between steps."""
import gc
import resource
import subprocess
import sys

import numpy as np
import pytest

import tensorgrad as tg
from tensorgrad.kernels import memory

N = memory.LARGE // 4  # float32s of the smallest large array


@pytest.fixture
def blocks(monkeypatch):
    fresh = memory._Blocks()
    monkeypatch.setattr(memory, "blocks", fresh)
    return fresh


def address(array):
    return array.ctypes.data


def test_small_arrays_are_numpys_own(blocks):
    assert memory.empty((N - 1,), np.float32).flags.owndata and blocks.in_use == 0


def test_a_dropped_array_leaves_its_memory_to_the_next_of_its_size(blocks):
    a = memory.empty((2, N), np.float32)
    assert a.shape == (2, N) and a.dtype == np.float32 and a.flags.c_contiguous and a.flags.writeable
    assert memory.owns(a) and not memory.owns(a[1:])
    first = address(a)
    del a
    assert (blocks.in_use, blocks.kept_bytes) == (0, 8 * N)
    b = memory.empty((N, 2), np.int32)
    assert address(b) == first and blocks.kept_bytes == 0


def test_memory_is_not_given_away_while_any_view_lives(blocks):
    a = memory.empty((4, N), np.float32)
    a[...] = 7
    views = [a.T[:, :2].T, np.asarray(a)[3:], a.view(np.int32)[:1].view(np.float32), memoryview(a)]
    del a
    gc.collect()
    while views:
        others = [memory.empty((4, N), np.float32) for _ in range(2)]
        for other in others:
            other[...] = 1
        untouched = bool((np.asarray(views[-1]) == 7).all())  # within `assert` pytest would keep the array alive
        assert untouched
        del other, others
        views.pop()
    assert blocks.in_use == 0


def test_use_and_reserve_together_never_exceed_the_largest_use(blocks):
    sizes = [1, 3, 2, 5, 1, 4]
    most = 0
    for size in sizes * 3:
        a, b = memory.empty((size, N), np.float32), memory.empty((size + 1, N), np.float32)
        most = max(most, blocks.in_use)
        assert blocks.peak == most and blocks.in_use + blocks.kept_bytes <= most
        assert sum(len(block) for kept in blocks.kept.values() for block in kept) == blocks.kept_bytes
        del a, b


def test_nothing_is_kept_where_that_is_not_wanted(blocks, monkeypatch):
    monkeypatch.setattr(memory, "KEEP", False)
    assert memory.empty((N,), np.float32).flags.owndata and not blocks.in_use


def test_gradients_of_large_tensors_and_their_norm():
    x = tg.ones(2, N, requires_grad=True)
    y = tg.nn.functional.gelu(x)
    y.sum().backward()
    want = 2 * N * float(x.grad.array[0, 0]) ** 2
    norm = tg.nn.utils.clip_grad_norm_([x], 1.0).item()
    assert norm == pytest.approx(want**0.5, rel=1e-5) and x.grad.norm().item() == pytest.approx(1, rel=1e-4)


STEP = """
import resource, tensorgrad as tg
from tensorgrad import nn
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
net = nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 64))
x, seen = tg.randn(8192, 64), []
for _ in range(6):
    before = faults()
    net(x).square().mean().backward()
    net.zero_grad()
    seen.append(faults() - before)
print(*seen)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted on Linux")
def test_later_steps_take_no_new_pages():
    out = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True).stdout
    first, *_, last = map(int, out.split())
    assert resource.getpagesize() and last < first / 10, out
