"""The kernels under NVIDIA's compiler, without a GPU: scripts/check_cuda.py."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("check_cuda", ROOT / "scripts" / "check_cuda.py")
check_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_cuda)


@pytest.fixture(scope="module")
def tools():
    try:
        return check_cuda.tools()
    except check_cuda.Missing as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("file", ["optimizer.cu", "softmax.cu"])
def test_compiles_without_spills(tools, file):
    """Two files for one generation; .ci/run has the script do all of them for four."""
    rows = check_cuda.check_file(file, [90])
    assert len(rows) == sum(len(k.types) for k in check_cuda.KERNELS.values() if k.source == file)
    assert all(0 < row["registers"] <= 128 and row["spill"] == 0 for row in rows), rows


def compiled(tools, text):
    nvrtc, include, dump = tools
    cubin, names = check_cuda.compile_cubin(nvrtc, include, text, "planted.cu", ["planted"], 90)
    return check_cuda.resources(dump, cubin)[names["planted"]]


def test_spills_are_seen(tools):
    """An array indexed by what is known only at run time cannot stay in registers."""
    body = "float a[64] = {}; for (int i = 0; i < n; i++) a[int(x[i]) % 64] += x[i]; x[n] = a[n % 64];"
    used = compiled(tools, f"__global__ void planted(float* x, int n) {{ {body} }}")
    assert used["spill"] >= 64 * 4
    assert compiled(tools, "__global__ void planted(float* x, int n) { x[n] = 1; }")["spill"] == 0


def test_errors_name_file_and_line(tools):
    with pytest.raises(RuntimeError, match=re.compile(r"planted.cu, sm_90:.*planted.cu\(2\): error", re.S)):
        compiled(tools, "__global__ void planted(float* x, int n) {\n nonsense; }")


def test_missing_tools_are_one_line():
    """Where NVRTC is not installed the script says how to get it."""
    code = (
        "import runpy, sys; sys.modules['nvidia'] = None; sys.modules['cuda.pathfinder'] = None; "
        "sys.argv = ['check_cuda.py']; runpy.run_path('scripts/check_cuda.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cuda-check" in done.stderr
