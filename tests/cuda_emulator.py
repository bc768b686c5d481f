"""The CUDA kernels on the CPU: g++ compiles their source as it is against the headers in cuda_emulation/.

    emulator = Emulator()
    emulator.launch("gelu_forward", "bfloat16", x, y, x.size)      arguments as in the table, on NumPy arrays

`launch` takes grid and block from the table, as on a GPU; `run` takes them from the caller. Builds are kept by the hash
of all they depend on, in TENSORGRAD_CACHE or the user's cache folder.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import ml_dtypes
import numpy as np

from tensorgrad.kernels.cuda.signatures import FOLDER, KERNELS

HERE = Path(__file__).parent / "cuda_emulation"
FLAGS = [
    "-std=c++20",
    "-g",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-parentheses",
]
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


def dtype_of(name):
    """The NumPy dtype with this name, bfloat16 included."""
    return DTYPES.get(name) or np.dtype(name)


def has_compiler():
    return shutil.which("g++") is not None


def build(*flags, library, only=""):
    """The path of the kernels built with these flags, as a shared library or as the program that replays launches; of
    all source files or of one."""
    files = [*sorted(FOLDER.glob("*.cu*")), *sorted(HERE.iterdir())]
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    expressions = [k.expression(types) for k in KERNELS.values() for types in k.types]
    parts = [version, *expressions, *FLAGS, *flags, str(library), only, *(f.read_text(encoding="utf-8") for f in files)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    cache = Path(os.environ.get("TENSORGRAD_CACHE") or Path.home() / ".cache" / "tensorgrad") / "cuda_emulation"
    target, work = cache / (digest + (".so" if library else "")), cache / f"{digest}.work"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:  # tests in several processes build each thing once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(flags, library, only, work, target)
    return target


def _compile(flags, library, only, work, target):
    """Make `target` in the folder `work`."""
    work.mkdir(exist_ok=True)
    try:
        sources = [HERE / "main.cc"]
        for file in [only] if only else sorted({k.source for k in KERNELS.values()}):
            stem = Path(file).stem
            lines = ['#include "emulation.h"', f"namespace {stem} {{", f'#include "{FOLDER / file}"']
            for kernel in (k for k in KERNELS.values() if k.source == file):
                for number, types in enumerate(kernel.types):
                    name = kernel.expression(types)
                    lines.append(f'int {kernel.name}_{number} = emulation::add_kernel("{name}", &{name});')
            sources.append(work / f"{stem}.cc")
            sources[-1].write_text("\n".join([*lines, "}", ""]), encoding="utf-8")
        mode = ["-fPIC"] if library else ["-DREPLAY"]
        common = ["g++", *FLAGS, *flags, *mode, f"-I{HERE}", f"-I{FOLDER}"]
        objects = [work / (s.stem + ".o") for s in sources]
        jobs = [subprocess.Popen([*common, "-c", s, "-o", o]) for s, o in zip(sources, objects, strict=True)]
        failed = [s.name for s, job in zip(sources, jobs, strict=True) if job.wait()]
        if failed:
            raise RuntimeError(f"g++ could not compile {', '.join(failed)}")
        made = work / "made"
        subprocess.run([*common, *(["-shared"] if library else []), *objects, "-lpthread", "-o", made], check=True)
        os.replace(made, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Emulator:
    """Runs kernels in this process, their threads as fibers. With record=True it keeps every launch, for `replay`."""

    _lock = threading.Lock()  # __shared__ memory is static: one launch at a time

    def __init__(self, record=False):
        self._launch = ctypes.CDLL(str(build("-O2", library=True))).emulation_launch
        self._launch.restype = ctypes.c_char_p
        self.launches = [] if record else None

    def launch(self, name, types, *values):
        """Run the instance of kernel `name` for `types` (a dtype name or a tuple) on NumPy arrays and numbers."""
        types = (types,) if isinstance(types, str) else tuple(types)
        grid, block, shared = KERNELS[name].geometry(KERNELS[name].bind(types, values))
        self.run(name, types, grid, block, shared, values)

    def run(self, name, types, grid, block, shared, values):
        """The same with a grid, block and bytes of dynamic shared memory of one's own; nothing for an empty grid."""
        expression, words = _prepare(name, types, values)
        if not all(grid):
            return
        before = record(name, types, grid, block, shared, values) if self.launches is not None else None
        self.call(expression, grid, block, shared, words)
        if self.launches is not None:
            self.launches.append((before, [b.tobytes() for b in _buffers(values)]))

    def call(self, expression, grid, block, shared, words):
        """Launch by C++ name; `words`: NumPy scalars, addresses too. RuntimeError with the emulation's message."""
        boxes = [np.array(word) for word in words]
        pointers = (ctypes.c_void_p * len(boxes))(*(b.ctypes.data for b in boxes))
        sizes = [(ctypes.c_uint * 3)(*(int(n) for n in s)) for s in (grid, block)]
        with self._lock:
            fault = self._launch(expression.encode(), *sizes, ctypes.c_size_t(int(shared)), pointers)
        if fault:
            raise RuntimeError(f"{expression}: {fault.decode()}")


def _prepare(name, types, values):
    """(the instance's name, one NumPy scalar per argument: the number itself or the address), all checked."""
    kernel = KERNELS[name]
    types = (types,) if isinstance(types, str) else tuple(types)
    if types not in kernel.types:
        raise TypeError(f"{name} is not instantiated for {types}, only for {kernel.types}")
    words = []
    for argument, value in zip(kernel.arguments, values, strict=True):
        dtype = dtype_of(kernel.dtype(argument, types))
        if not argument.pointer:
            words.append(dtype.type(value))
        elif value is None and argument.optional:
            words.append(np.uint64(0))
        elif not isinstance(value, np.ndarray) or value.dtype != dtype:
            raise TypeError(f"{name}: {argument.name} must be an array of {dtype}, not {value!r:.80}")
        elif argument.written and not value.flags.writeable:
            raise TypeError(f"{name}: {argument.name} is written, but the array is read-only")
        else:
            words.append(np.uint64(value.ctypes.data))
    return kernel.expression(types), words


# ---- launches recorded in one process and replayed under a sanitizer in another --------------------------------------


def _root(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _buffers(values):
    return list({id(_root(v)): _root(v) for v in values if isinstance(v, np.ndarray)}.values())


def record(name, types, grid, block, shared, values):
    """One launch, not run, in the format that main.cc reads: name, sizes, the buffers' bytes, arguments."""
    expression, words = _prepare(name, types, values)
    buffers = _buffers(values)
    pack = lambda *numbers: struct.pack(f"<{len(numbers)}Q", *(int(n) for n in numbers))  # noqa: E731
    parts = [pack(len(expression)), expression.encode(), pack(*grid, *block, shared, len(buffers))]
    for b in buffers:
        parts += [pack(b.nbytes), b.tobytes()]
    parts.append(pack(len(values)))
    places = {id(b): i for i, b in enumerate(buffers)}
    for value, word in zip(values, words, strict=True):
        if isinstance(value, np.ndarray):
            root = _root(value)
            parts.append(pack(places[id(root)] + 1, value.ctypes.data - root.ctypes.data))
        else:
            parts += [pack(0), word.tobytes().ljust(8, b"\0")]
    return b"".join(parts)


def replay(launches, *flags, folder, only=""):
    """Run recorded launches in a program built with these flags. Returns the finished
    process and, as one piece, the bytes that all buffers then hold (None where it did not get to the end)."""
    program = build(*flags, library=False, only=only)
    source, out = folder / "launches", folder / "results"
    source.write_bytes(struct.pack("<Q", len(launches)) + b"".join(launches))
    done = subprocess.run([program, source, out], capture_output=True, text=True, timeout=600)
    return done, out.read_bytes() if done.returncode == 0 else None
