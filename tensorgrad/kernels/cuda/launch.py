"""Launching the kernels of `signatures.py`: compiled by NVRTC when first used, kept by CuPy on disk.

`launch(xp, name, types, *values)` runs a kernel on the current device and stream of the array module `xp`; values are
arrays, numbers, and None for absent pointers. What runs kernels for a module can be replaced (`use`): tests put a CPU
emulation of the same sources there."""

import numpy as np

from .signatures import KERNELS, source

NULL = np.uint64(0)  # an absent pointer, as CuPy takes it
_launchers = {}  # array module -> what launches its kernels, or None


def use(xp, launcher):
    """Let `launcher.launch(name, types, *values)` run the kernels on arrays of `xp`; None: there are none."""
    _launchers[xp] = launcher


def has_kernels(xp):
    """Can kernels run on arrays of this module?"""
    if xp not in _launchers:
        _launchers[xp] = CupyLauncher(xp) if xp.__name__ == "cupy" else None
    return _launchers[xp] is not None


def launch(xp, name, types, *values):
    """Run the instance of kernel `name` for `types` (a dtype name or a tuple)."""
    _launchers[xp].launch(name, types, *values)


class CupyLauncher:
    """Kernels through cupy.RawModule. An instance is compiled when it is first launched (a fraction of a second, once
    per machine: CuPy keeps the result in ~/.cupy), for the GPU at hand."""

    def __init__(self, cupy):
        self.cupy = cupy
        self.functions = {}  # (name, types) -> (the instance, what makes each number: the parameter's dtype, or None)

    def launch(self, name, types, *values):
        types = (types,) if isinstance(types, str) else tuple(types)
        kernel = KERNELS[name]
        grid, block, shared = kernel.geometry(kernel.bind(types, values))
        if not all(grid):
            return
        found = self.functions.get((name, types))
        if found is None:
            makers = [None if a.pointer else np.dtype(kernel.dtype(a, types)).type for a in kernel.arguments]
            found = self.functions[name, types] = self._compile(kernel, types), makers
        function, makers = found
        arguments = [NULL if value is None else value if make is None else make(value)  # arrays as they are
                     for value, make in zip(values, makers, strict=True)]
        function(grid, block, tuple(arguments), shared_mem=shared)

    def _compile(self, kernel, types):
        expression = kernel.expression(types)
        module = self.cupy.RawModule(
            code=source(kernel.source), options=("-std=c++17",), name_expressions=(expression,)
        )
        return module.get_function(expression)
