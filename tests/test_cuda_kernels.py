"""The CUDA kernels without a GPU: the same source under g++ (tests/cuda_emulation/), against NumPy in float64."""

import re

import pytest
from cuda_cases import CASES, WITHIN, Runner
from cuda_emulator import Emulator, has_compiler

from tensorgrad.kernels.cuda.signatures import FOLDER, KERNELS, source

pytestmark = pytest.mark.skipif(not has_compiler(), reason="the emulation of CUDA needs g++")

SIZES = [(1, 8, 0), (5, 77, 0), (3, 768, 0), (33, 130, 0), (0, 64, 0), (4, 64, 1), (2, 2568, 0), (2, 2571, 0)]
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
    found = re.search(rf"template <([^>]*)>\s*__global__ void {name}\(([^)]*)\)", text)
    assert found, f"{name} is not in {kernel.source}"
    assert [t.split()[-1] for t in found[1].split(",")] == list(kernel.template)
    scalars = {"float32": "float", "float64": "double", "int32": "int", "uint32": "unsigned int", "int64": "long long"}
    wanted = [
        "const " * (a.pointer and not a.written) + scalars.get(a.dtype, a.dtype) + "*" * a.pointer + f" {a.name}"
        for a in kernel.arguments
    ]
    assert [" ".join(p.split()) for p in found[2].split(",")] == wanted


def test_no_kernel_is_left_out_of_the_table():
    names = {n for f in FOLDER.glob("*.cu") for n in re.findall(r"__global__ void (\w+)\(", f.read_text())}
    assert names == set(KERNELS)


@pytest.mark.parametrize("name, types", INSTANCES, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_kernel(emulator, name, types):
    for rows, width, offset in SIZES:
        CASES[name](Runner(emulator, name, types, offset), rows, width)
