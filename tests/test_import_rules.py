"""The layers of the design: an arrow never points up."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["model", "text", "training", "inference", "interop", "serving"]  # a room may import those before it
NUMPY_ALLOWED = ("gpt/text/", "gpt/interop/", "gpt/serving/")


def imports(path):
    """(module, imported names) of every import in a file, relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level]) if node.level else []
            yield ".".join(base + ([node.module] if node.module else [])), tuple(a.name for a in node.names)


def modules(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", modules("tensorgrad"), ids=lambda p: str(p.relative_to(ROOT)))
def test_tensorgrad(path):
    name = str(path.relative_to(ROOT))
    for module, _ in imports(path):
        top = module.split(".")[0]
        assert top not in ("gpt", "torch", "transformers"), f"{name} imports {module}"
        may = name == "tensorgrad/cuda_device.py" or name.startswith("tensorgrad/kernels/cuda/")
        assert top != "cupy" or may, f"{name} imports {module}"
        if name.startswith("tensorgrad/ops/"):
            assert module != "tensorgrad.tensor", f"{name} imports tensor.py"
        if name.startswith("tensorgrad/kernels/"):
            assert module.startswith("tensorgrad.kernels") or top != "tensorgrad", f"{name} imports {module}"


@pytest.mark.parametrize("path", modules("gpt"), ids=lambda p: str(p.relative_to(ROOT)))
def test_gpt(path):
    name = path.relative_to(ROOT).as_posix()
    room = name.split("/")[1]
    for module, names in imports(path):
        parts = module.split(".")
        assert parts[0] not in ("cupy", "torch", "transformers", "peft"), f"{name} imports {module}"
        if parts[0] == "numpy":
            assert name.startswith(NUMPY_ALLOWED), f"{name} imports numpy"
        if parts[0] == "tensorgrad":  # public names: no underscore, and not the insides
            assert len(parts) < 2 or parts[1] in ("nn", "optim", "autograd", "utils", "io"), f"{name} imports {module}"
            assert not any(n.startswith("_") for n in names), f"{name} imports {names} from {module}"
        if parts[0] == "gpt" and len(parts) > 1 and parts[1] in ROOMS and room in ROOMS:
            assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{name} imports {module}, a room above it"


def test_import_is_light():
    """`import tensorgrad` loads neither CuPy nor Numba nor the parts that few programs need."""
    code = ("import sys, tensorgrad; heavy = {'cupy', 'numba', 'torch', 'matplotlib', 'tiktoken', 'safetensors', "
            "'rich', 'tyro'} & set(sys.modules); print(sorted(heavy))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"
