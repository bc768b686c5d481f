#!/usr/bin/env python3
"""Compile every CUDA kernel for several GPU generations, without a GPU, and print its registers and spills.

    pip install -e ".[cuda-check]" && python scripts/check_cuda.py [--arch 75 80 90 100] [--json FILE]

Costs about a minute of processor time. Exit code 1 where a kernel does not compile, or keeps what should be in
registers in memory (spills).
"""

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from tensorgrad.kernels.cuda.signatures import KERNELS, source

ARCHITECTURES = (75, 80, 90, 100)  # Turing, Ampere, Hopper, Blackwell


class Missing(Exception):
    """A tool that this check needs is not installed; the message says how to get it."""


def tools():
    """(the NVRTC library, the folder of CUDA's headers, the path of cuobjdump), from the packages of cuda-check."""
    try:
        import nvidia.cu13 as toolkit
        from cuda.pathfinder import load_nvidia_dynamic_lib

        library = ctypes.CDLL(load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (ImportError, RuntimeError) as error:
        raise Missing(f'compiling CUDA needs NVRTC ({error}); pip install -e ".[cuda-check]"') from None
    for folder in map(Path, toolkit.__path__):
        dump = next(folder.glob("bin/**/cuobjdump"), None)
        if dump and (folder / "include/cuda_fp16.h").exists():
            return library, folder / "include", dump
    raise Missing('cuobjdump or cuda_fp16.h is missing; pip install -e ".[cuda-check]"')


def compile_cubin(nvrtc, include, text, name, expressions, architecture):
    """`text` as a cubin (bytes) with the given template instances, and their mangled names by expression."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()

    def check(status):
        if status:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{name}, sm_{architecture}: {log.value.decode() or f'NVRTC status {status}'}")

    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None))
    for expression in expressions:
        check(nvrtc.nvrtcAddNameExpression(program, expression.encode()))
    # as CuPy compiles; NVRTC 12 takes the lambdas in kernels only with the last
    flags = (f"-arch=sm_{architecture}", "-std=c++17", f"-I{include}", "-ftz=true", "-default-device")
    options = [flag.encode() for flag in flags]
    check(nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)))
    names = {}
    for expression in expressions:
        mangled = ctypes.c_char_p()
        check(nvrtc.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(mangled)))
        names[expression] = mangled.value.decode()
    check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    cubin = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, names


def resources(cuobjdump, cubin):
    """Per mangled name: registers, bytes of local memory ("spill", 0 where all stays in registers), shared bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {n: {"registers": int(r), "spill": int(st) + int(lo), "shared": int(sh)} for n, r, st, sh, lo in found}


def check_file(file, architectures):
    """The rows of `check` for one source file."""
    nvrtc, include, dump = tools()
    expressions = [k.expression(types) for k in KERNELS.values() if k.source == file for types in k.types]
    rows = []
    for architecture in architectures:
        cubin, names = compile_cubin(nvrtc, include, source(file), file, expressions, architecture)
        used = resources(dump, cubin)
        rows += [{"kernel": e, "arch": architecture, **used[names[e]]} for e in expressions]
    return rows


def check(architectures=ARCHITECTURES):
    """One row (dict) per kernel instance and architecture: kernel, arch, registers, spill, shared."""
    tools()  # says what is missing, once
    files = sorted({k.source for k in KERNELS.values()})
    with ProcessPoolExecutor() as pool:
        return [row for rows in pool.map(check_file, files, repeat(architectures)) for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, e.g. 90")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    try:
        rows = check(options.arch)
    except (Missing, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    at = {(row["kernel"], row["arch"]): row for row in rows}
    print(f"{'registers (+ bytes spilled)':58}" + "".join(f"{f'sm_{a}':>10}" for a in options.arch))
    for kernel in kernels:
        cells = (at[kernel, a] for a in options.arch)
        texts = (f"{c['registers']}" + (f"+{c['spill']}" if c["spill"] else "") for c in cells)
        print(f"{kernel:58}" + "".join(f"{text:>10}" for text in texts))
    spilled = [row for row in rows if row["spill"]]
    print(f"{len(rows)} instances compiled, {len(spilled)} spill")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
