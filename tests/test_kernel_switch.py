"""TENSORGRAD_LEVEL: each value selects its level, all train a GPT alike; and training keeps no memory."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import tensorgrad as tg
from gpt import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"composed": "reference", "reference": "reference", "numpy": "threaded", "numba": "compiled_all"}

TRAIN = """
import json
import numpy as np
import tensorgrad as tg
from gpt import GPT, GPTConfig
from tensorgrad import kernels
sizes = dict(block_size=66, vocab_size=67, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, dropout=0.1)
rng, losses = np.random.default_rng(0), []
for variant in (dict(bias=True), dict(position="rotary", norm="rmsnorm", activation="swiglu"),
                dict(norm_position="post", activation="relu2")):
    tg.manual_seed(1)
    model = GPT(GPTConfig(**sizes, **variant))
    optimizer = tg.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        idx, targets = (tg.tensor(rng.integers(0, 67, (2, 66))) for _ in range(2))
        optimizer.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        tg.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
print(json.dumps([kernels.routines(tg.device("cpu")).__name__.rpartition(".")[2], losses]))
"""
BLOCK_NUMBA = "import sys\nsys.modules['numba'] = None\n"
USE = """
import numpy as np
import tensorgrad as tg
for attempt in range(2):
    try:
        tg.tensor(np.ones((2, 3), np.float32)).softmax(1)
    except ImportError as error:
        print(error)
print(tg.kernels.routines(tg.device("cpu")).__name__)
"""


def python(code, level):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TENSORGRAD_LEVEL": level}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=environment)


@pytest.fixture(scope="module")
def composed_run():
    return json.loads(python(TRAIN, "composed").stdout)


@pytest.mark.parametrize("level", ["composed", "reference", "numpy", "numba", "fast"])
def test_each_level_is_selected_and_trains_alike(level, composed_run):
    if level == "numba":
        pytest.importorskip("numba", reason="needs the extra fast")
    done = python(TRAIN, level)
    assert done.returncode == 0, done.stderr
    module, losses = json.loads(done.stdout)
    assert module in ((MODULES[level],) if level in MODULES else ("compiled_all", "threaded"))
    np.testing.assert_allclose(losses, composed_run[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", ["fastest", "", "NumPy"])
def test_an_unknown_level_is_named(level):
    done = python("import tensorgrad", level)
    assert done.returncode != 0
    message = f"TENSORGRAD_LEVEL must be one of composed, reference, numpy, numba, fast, not {level!r}"
    assert done.stderr.strip().endswith(message), done.stderr


def test_numba_without_numba_says_what_to_install():
    """Each time it is asked for, not only the first."""
    done = python(BLOCK_NUMBA + USE, "numba")
    lines = [line for line in done.stdout.splitlines() if "TENSORGRAD_LEVEL=numba needs the extra fast" in line]
    assert len(lines) == 2 and "pip install numba" in lines[0], done.stdout + done.stderr


def test_the_default_without_numba_is_numpy():
    done = python(BLOCK_NUMBA + USE, "fast")
    assert done.stdout.split() == ["tensorgrad.kernels.threaded"], done.stdout + done.stderr


def test_kept_kernels_depend_on_the_mathematics_they_use(tmp_path):
    """A kernel that Numba has kept is compiled anew where a file changes whose functions it calls."""
    pytest.importorskip("numba", reason="needs the extra fast")
    folder = tmp_path / "tensorgrad"
    shutil.copytree(ROOT / "tensorgrad", folder, ignore=shutil.ignore_patterns("__pycache__"))
    use = ("import numpy as np\nfrom tensorgrad.kernels import compiled\nx = np.full(5000, 2, np.float32)\n"
           "print(compiled.relu2_like(x)[0])")
    with open(folder / "kernels" / "compiled.py", "a") as file:
        file.write("\n\n@njit_fast\ndef _like(start, stop, x, y):\n    for i in range(start, stop):\n"
                   "        y[i] = twice(x[i])\n\n\ndef relu2_like(x):\n    return _flat(_like, x, empty_like(x))\n\n\n"
                   "from .compiled_math import twice\n")
    results = []
    for factor in (2, 3):
        text = (ROOT / "tensorgrad" / "kernels" / "compiled_math.py").read_text()
        (folder / "kernels" / "compiled_math.py").write_text(
            f"{text}\n\n@njit_fast\ndef twice(x):\n    return F32({factor}) * x\n")
        done = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)})
        results.append(done.stdout.strip() or done.stderr)
    assert results == ["4.0", "6.0"]


def test_training_a_gpt_keeps_no_memory():
    """With the cyclic collector off, 50 steps hold no more arrays and no more objects than 5."""
    model = GPT(GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32, dropout=0.1))
    optimizer = tg.optim.AdamW(model.parameters(), lr=1e-3)
    idx, targets = (tg.randint(0, 31, (4, 16)) for _ in range(2))
    of_numpy = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    sizes, objects = [], []
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for step in range(50):
            optimizer.zero_grad()
            loss = model(idx, targets)[1]
            loss.backward()
            tg.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()
            if step % 5 == 4:
                traces = tracemalloc.take_snapshot().filter_traces([of_numpy]).traces
                sizes.append(sum(trace.size for trace in traces))
                del traces
                objects.append(len(gc.get_objects()))
    finally:
        tracemalloc.stop()
        gc.enable()
    # what a step keeps would add up; what another thread of the test run holds for a moment does not
    assert min(sizes[6:]) <= max(sizes[1:4])
    assert min(objects[6:]) <= max(objects[1:4])
