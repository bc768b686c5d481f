"""The CUDA kernels without a GPU: the same source under g++ (tests/cuda_emulation/), against NumPy in float64 and under
two sanitizers; and what those must catch, planted."""

import re
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import CASES, WITHIN, Runner
from cuda_emulator import Emulator, has_compiler, record, replay

from tensorgrad import cuda_device
from tensorgrad.kernels.cuda import signatures
from tensorgrad.kernels.cuda.signatures import FOLDER, KERNELS, source

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the emulation of CUDA needs g++")

SIZES = [(1, 8, 0), (5, 77, 0), (3, 768, 0), (33, 130, 0), (0, 64, 0), (4, 64, 1), (2, 2568, 0), (2, 2571, 0),
         (2, 6136, 0)]
INSTANCES = [(name, types) for name in CASES for types in KERNELS[name].types]


@pytest.fixture(scope="module")
def emulator():
    return Emulator()


def test_every_kernel_has_a_case():
    assert set(CASES) | set(WITHIN) == set(KERNELS) and set(WITHIN.values()) <= set(CASES)


@pytest.mark.parametrize("name", KERNELS)
def test_table_has_the_parameters_of_the_source(name):
    kernel = KERNELS[name]
    text = source(kernel.source)
    found = re.search(
        rf"(?:template <([^>]*)>\s*)?__global__ void (?:__launch_bounds__\(.*\))?\s*{name}\(([^)]*)\)", text
    )
    assert found, f"{name} is not in {kernel.source}"
    assert [t.split()[-1] for t in (found[1] or "").split(",") if t] == list(kernel.template)
    scalars = {"float32": "float", "float64": "double", "int32": "int", "uint32": "unsigned int", "int64": "long long"}
    wanted = [
        "const " * (a.pointer and not a.written) + scalars.get(a.dtype, a.dtype) + "*" * a.pointer + f" {a.name}"
        for a in kernel.arguments
    ]
    assert [" ".join(p.split()) for p in found[2].split(",")] == wanted


def test_no_kernel_is_left_out_of_the_table():
    names = {
        n
        for f in FOLDER.glob("*.cu")
        for n in re.findall(r"__global__ void (?:__launch_bounds__\(.*\))?\s*(\w+)\(", f.read_text())
    }
    assert names == set(KERNELS)


def test_every_kernel_is_launched_by_the_package():
    files = [*Path(signatures.__file__).parent.glob("*.py"), Path(cuda_device.__file__)]
    text = "".join(f.read_text() for f in files if f.name != "signatures.py")
    for name in KERNELS:
        stems = {name, name.removesuffix("_forward"), name.removesuffix("_backward")}
        assert any(f'"{stem}"' in text for stem in stems), f"nothing launches {name}"


@pytest.mark.parametrize("name, types", INSTANCES, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_kernel(emulator, name, types):
    for rows, width, offset in SIZES:
        CASES[name](Runner(emulator, name, types, offset), rows, width)


@pytest.mark.parametrize("name, types", INSTANCES, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_kernel_on_few_blocks(emulator, name, types, monkeypatch):
    """With a grid that is too small for the work each block goes round several times, as with large arrays."""
    monkeypatch.setattr(signatures, "WAVE", 1)
    for rows, width, offset in [(70, 264, 0), (70, 77, 1)]:
        CASES[name](Runner(emulator, name, types, offset), rows, width)


# ---- sanitizers ------------------------------------------------------------------------------------------------------

SANITIZERS = {"address": "-fsanitize=address", "thread": "-fsanitize=thread"}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizer_finds_nothing(sanitizer, tmp_path, monkeypatch):
    """Every kernel in every type, its blocks going round several times: clean, with the same results."""
    monkeypatch.setattr(signatures, "WAVE", 1)
    recorder = Emulator(record=True)
    for name, types in INSTANCES:
        for rows, width, offset in ((9, 37, 1), (3, 72, 0), (4, 2600, 0)):
            CASES[name](Runner(recorder, name, types, offset), rows, width)
    done, results = replay([before for before, _ in recorder.launches], SANITIZERS[sanitizer], folder=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr[:3000]
    place = 0
    for before, after in recorder.launches:
        for buffer in after:
            same = results[place : place + len(buffer)] == buffer
            assert same or b"atomic" in before[:60], f"another result: {before[8:60]}"
            place += len(buffer)
    assert place == len(results)


def norm_backward(told_rows=3, shared=2 * 70 * 4):
    """The record of a launch of layer_norm_backward on 3 rows of 70 numbers that is told of `told_rows`."""
    rows = [np.ones((3, 70), np.float32) for _ in range(5)]
    mean, rstd = (np.ones(told_rows, np.float32) for _ in range(2))
    values = [rows[0], None, mean, rstd, rows[1], None, rows[2], rows[3], rows[4], told_rows, 70]
    return record("layer_norm_backward", "float32", (3, 1, 1), (64, 1, 1), shared, values)


def test_the_sound_launch_passes(tmp_path):
    for flags in SANITIZERS.values():
        done, _ = replay([norm_backward()], flags, folder=tmp_path)
        assert done.returncode == 0 and not done.stderr


def test_missing_barrier_is_caught(tmp_path):
    done, _ = replay([norm_backward()], SANITIZERS["thread"], "-DEMULATE_NO_BARRIER", folder=tmp_path, only="norm.cu")
    assert done.returncode and "WARNING: ThreadSanitizer: data race" in done.stderr
    assert re.search(r"block_sum.*common\.cuh", done.stderr), "the report names the place in the kernel's source"


@pytest.mark.parametrize("damage", [{"told_rows": 4}, {"shared": 2 * 70 * 4 - 4}], ids=["global", "shared"])
def test_write_out_of_bounds_is_caught(damage, tmp_path):
    done, _ = replay([norm_backward(**damage)], SANITIZERS["address"], folder=tmp_path)
    assert done.returncode and "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "norm.cu" in done.stderr


def test_faults_end_a_launch_with_a_message(emulator):
    """What the fibers find by themselves, and that the next launch is sound again."""
    x = np.ones(64, np.float32)
    for fault, message in (("misaligned", "misaligned access"), ("deadlock", "deadlock"), ("unknown", "no kernel")):
        with pytest.raises(RuntimeError, match=message):
            emulator.call(f"planted_{fault}", (1, 1, 1), (64, 1, 1), 0, [np.uint64(x.ctypes.data)])
    with pytest.raises(RuntimeError, match="whole warps"):
        emulator.run("relu2_forward", "float32", (1, 1, 1), (33, 1, 1), 0, [x, x, x.size])
    emulator.launch("relu2_forward", "float32", np.full(64, 2, np.float32), x, x.size)
    assert (x == 4).all()


def test_arguments_are_checked(emulator):
    x = np.ones(8, np.float32)
    for values, message in (
        ([x, 8], "takes 3 arguments"),
        ([x.astype(np.float64), x, 8], "must be an array of float32"),
        ([None, x, 8], "must not be None"),
    ):
        with pytest.raises(TypeError, match=message):
            emulator.launch("relu2_forward", "float32", *values)
    with pytest.raises(TypeError, match="not instantiated"):
        emulator.run("relu2_forward", "float64", (1, 1, 1), (32, 1, 1), 0, [x, x, 8])
