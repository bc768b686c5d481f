"""How long `import tensorgrad` takes beside `import numpy`, and what one small operation costs."""
import importlib
import importlib.util
import subprocess
import sys
import time
from statistics import median

import numpy as np

from .runner import ROOT, BenchError, Contender, environment, middle, print_table, progress, take_turns, times_faster

TIMER = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
CALLS, REPEATS = 5000, 7


def report(options):
    """Measure and print both; the results as (rows, skipped)."""
    skipped = {}
    modules = ["numpy", "tensorgrad"]
    chosen = [Contender("tensorgrad", required=True), Contender("numpy", mode="numpy", required=True)]
    if options.peers != ["none"] and importlib.util.find_spec("torch") is None:
        skipped["torch"] = "torch is not installed"
    elif options.peers != ["none"]:
        modules.append("torch")
        chosen.append(Contender("torch", mode="eager"))
    imports = _imports(modules, options)
    print_table(["import", "ms", "min", "x numpy"],
                [[row["module"], row["ms"], row["min_ms"], row["over_numpy"]] for row in imports])
    results = take_turns(chosen, "overhead", options, skipped)
    adds = [{"library": contender.name, "microseconds": middle(own, "microseconds"),
             "speed_vs_torch": times_faster(results, contender, "microseconds")} for contender, own in results.items()]
    print_table(["a + b, 8 x 8, with gradient", "us", "torch/ours"],
                [[row["library"], row["microseconds"], row["speed_vs_torch"]] for row in adds])
    return [*imports, *adds], skipped


def _imports(modules, options):
    times = {module: [] for module in modules}
    for turn in range(-1, options.rounds):  # the first turn writes .pyc files and warms the disk's cache
        progress(f"round {max(turn + 1, 0)}/{options.rounds}: import")
        for module in modules:
            done = subprocess.run([sys.executable, "-P", "-c", TIMER.format(module)], capture_output=True, text=True,
                                  env=environment(options.threads, root=str(ROOT)))
            if done.returncode:
                raise BenchError(f"import {module} failed: {done.stderr.strip().splitlines()[-1]}")
            if turn >= 0:
                times[module].append(1e3 * float(done.stdout))
    return [{"module": module, "ms": median(own), "min_ms": min(own),
             "over_numpy": median(a / b for a, b in zip(own, times["numpy"], strict=True))}
            for module, own in times.items()]


# ---- in the measuring process ----------------------------------------------------------------------------------------


def overhead(spec):
    """Microseconds of `a + b` on 8 x 8 float32, operands that require gradients; NumPy's own beside it."""
    arrays = [np.ones((8, 8), np.float32) for _ in range(2)]
    if spec["mode"] == "numpy":
        a, b = arrays
    else:
        library = importlib.import_module("tensorgrad" if spec["mode"] == "ours" else "torch")
        a, b = (library.from_numpy(array).requires_grad_() for array in arrays)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(CALLS):
            a + b
        times.append(time.perf_counter() - started)
    return {"microseconds": 1e6 * min(times) / CALLS}
