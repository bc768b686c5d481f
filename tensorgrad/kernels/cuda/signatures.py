"""Every CUDA kernel in one table: where it is, its types and arguments, how it is launched.

    k = KERNELS["layer_norm_forward"]
    k.expression(("bfloat16", "float32"))     "layer_norm_forward<__nv_bfloat16, float>", to instantiate it
    source(k.source)                          the file's text with its includes in it, to compile
    bound = k.bind(types, values)             values by name and item sizes, for the rule
    k.geometry(bound)                         (grid, block, bytes of dynamic shared memory)

A grid with a 0 in it means that there is nothing to do: do not launch. Launchers pass None for an absent pointer as 0,
pass pointers of arrays without looking at their strides, and give each scalar the dtype of its Argument.

How to add one: write it in source/, with a body for packs and one for single elements; add its row here, with the
parameters exactly as in the source (a test compares them); add cases to tests/cuda_cases.py.
"""

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

FOLDER = Path(__file__).parent / "source"
CPP = {"float32": "float", "bfloat16": "__nv_bfloat16", "float16": "__half"}
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int32": 4, "uint32": 4, "int64": 8}
_SCALARS = {
    "float": "float32",
    "double": "float64",
    "int": "int32",
    "unsigned int": "uint32",
    "long long": "int64",
}


@dataclass(frozen=True)
class Argument:
    """One parameter of a kernel. `dtype` is a NumPy name or a letter of the kernel's template; `written` is False for a
    pointer to const; `optional` pointers may be None."""

    name: str
    dtype: str
    pointer: bool
    written: bool
    optional: bool


@dataclass(frozen=True)
class Kernel:
    """One row of the table. `types`: what the letters of `template` are instantiated for, as dtype names."""

    name: str
    source: str
    template: tuple
    types: tuple
    arguments: tuple
    geometry: object

    def expression(self, types):
        """The C++ name of an instance, e.g. "adamw<__half>"."""
        return f"{self.name}<{', '.join(CPP[t] for t in types)}>" if self.template else self.name

    def dtype(self, argument, types):
        """The dtype name of an Argument in the instance for `types`."""
        return dict(zip(self.template, types, strict=True)).get(argument.dtype, argument.dtype)

    def bind(self, types, values):
        """What geometry looks at: scalars by name, True or False for pointers, the item size for letters."""
        if len(values) != len(self.arguments):
            names = ", ".join(a.name for a in self.arguments)
            raise TypeError(f"{self.name} takes {len(self.arguments)} arguments ({names}), not {len(values)}")
        bound = SimpleNamespace(**{letter: ITEMSIZE[t] for letter, t in zip(self.template, types, strict=True)})
        for argument, value in zip(self.arguments, values, strict=True):
            if argument.pointer and value is None and not argument.optional:
                raise TypeError(f"{self.name}: {argument.name} must not be None")
            setattr(bound, argument.name, value is not None if argument.pointer else value)
        return bound


@functools.cache
def source(name):
    """The text of a source file with `#include "..."` replaced by the file, so that whoever caches what he compiles can
    take this text as the key."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.*)"$', lambda m: source(m[1]), text, flags=re.M).replace("#pragma once\n", "")


# ---- launch rules ----------------------------------------------------------------------------------------------------

WAVE = 1056  # blocks that keep a data-centre GPU busy: 8 on each of 132 multiprocessors
SHARED_COLUMNS = 5888  # as in norm.cu


def _up(n, multiple):
    return -(-n // multiple)


def _flat(item):
    """A grid-stride loop, one pack of 16 bytes per thread and turn; `item`: the size of an element."""
    return lambda s: ((min(_up(s.n, 256 * 16 // item(s)), 4 * WAVE), 1, 1), (256, 1, 1), 0)


_of_T = _flat(lambda s: s.T)


def _row_per_warp(s):
    return (_up(s.rows, 8), 1, 1), (256, 1, 1), 0


def _threads(packs, most):
    """Whole warps, one pack per thread, at most `most` threads."""
    return min(max(_up(packs, 32), 1) * 32, most)


def tile_strips(rows, width, itemsize):
    """How many strips the rows are cut into by kernels that sum over them and are launched in tiles: the first size of
    their `partial`, (strips, width)."""
    tiles = max(_up(width * itemsize, 512), 1)  # a warp's 32 packs
    return min(_up(rows, 8), max(_up(WAVE, tiles), 1))


def _tiles(s):
    return (_up(s.width * s.T, 512), tile_strips(s.rows, s.width, s.T), 1), (32, 8, 1), 0


def norm_strips(rows):
    """The same for the backward of norms, where every block has a strip."""
    return min(rows, WAVE)


def _norm_backward(sums):
    def rule(s):
        block = _threads(_up(s.width * s.T, 16), 256)
        return (norm_strips(s.rows), 1, 1), (block, 1, 1), sums * s.width * 4 * (s.width <= SHARED_COLUMNS)

    return rule


def _row_per_block(width):
    """About four packs of 16 bytes per thread; `width` says how long a row is."""
    return lambda s: ((s.rows, 1, 1), (_threads(_up(width(s) * s.T, 4 * 16), 512), 1, 1), 0)


def _heads(share):
    """A grid-stride loop over packs in the first 1 / `share` of every row."""
    return lambda s: (
        (min(_up(s.batch * s.heads * s.length * _up(s.dim * s.T, 16 * share), 256), 4 * WAVE), 1, 1),
        (256, 1, 1),
        0,
    )


def square_partials(n, itemsize):
    """How many partial sums `sum_of_squares` leaves of n elements, at least one."""
    return min(max(_up(n * itemsize, 256 * 16), 1), WAVE)


def adamw_hyper(lr, betas, eps, weight_decay, step, gradient_scale=1.0):
    """The eight float32 numbers that `adamw` wants in device memory for update number `step` = 1, 2, ...;
    gradients are multiplied by `gradient_scale` (1 / loss scale, 1 / accumulated batches)."""
    beta1, beta2 = betas
    numbers = [1 - beta1, beta2, 1 - beta2, eps, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)]
    return np.array([*numbers, 1 - lr * weight_decay, gradient_scale], np.float32)


# ---- the table -------------------------------------------------------------------------------------------------------

ONE = (("float32",), ("bfloat16",), ("float16",))
NONE = ((),)
KERNELS = {}


def _kernel(name, file, template, types, parameters, geometry):
    """Add a row; `parameters` is written as in the source, with ? behind the name of a pointer that may be null."""
    arguments = []
    for text in parameters.split(","):
        kind, word = text.strip().rsplit(" ", 1)
        base = kind.removeprefix("const ").removesuffix("*")
        arguments.append(
            Argument(
                word.removesuffix("?"),
                base if base in template else _SCALARS[base],
                kind.endswith("*"),
                kind.endswith("*") and not kind.startswith("const "),
                word.endswith("?"),
            )
        )
    KERNELS[name] = Kernel(name, file, tuple(template), types, tuple(arguments), geometry)


_kernel(
    "dropout", "elementwise.cu", "T", ONE,
    "const T* x, T* y, long long n, unsigned int multiplier, unsigned int offset, unsigned int threshold, "
    "float scale",
    _of_T,
)  # fmt: skip
_kernel(
    "note_outside", "elementwise.cu", "", NONE,
    "const long long* index, long long* worst, long long n, long long low, long long high, long long ignore",
    _flat(lambda s: 8),
)  # fmt: skip

for _name in ("gelu", "gelu_tanh", "silu", "relu2"):
    _kernel(_name + "_forward", "activation.cu", "T", ONE, "const T* x, T* y, long long n", _of_T)
    _kernel(  # partial (tile_strips(rows, width, itemsize of T), width): for the gradient of a bias added to x
        _name + "_backward", "activation.cu", "T", ONE,
        "const T* x, const T* g, T* dx, float* partial?, long long rows, int width",
        _tiles,
    )  # fmt: skip
_kernel(
    "bias_add", "activation.cu", "T", ONE, "const T* x, const float* bias, T* y, long long rows, int width", _tiles
)
_kernel("column_sum", "activation.cu", "T", ONE, "const T* g, float* partial, long long rows, int width", _tiles)
_kernel(
    "column_sum_finish", "activation.cu", "", NONE, "const float* partial, float* out, int strips, int width",
    lambda s: ((_up(s.width, 32), 1, 1), (32, 32, 1), 0),
)  # fmt: skip
_kernel(
    "swiglu_forward", "activation.cu", "T", ONE,
    "const T* gate, const T* up, T* y, long long rows, int width, int stride",
    _tiles,
)  # fmt: skip
_kernel(  # partial (tile_strips(rows, width, itemsize of T), 2 * width)
    "swiglu_backward", "activation.cu", "T", ONE,
    "const T* gate, const T* up, const T* g, T* dgate, T* dup, float* partial?, long long rows, int width, int stride",
    _tiles,
)  # fmt: skip

_kernel(
    "layer_norm_forward", "norm.cu", "T", ONE,
    "const T* x, const T* branch?, const float* weight?, const float* bias?, T* total?, T* y, float* mean, "
    "float* rstd, long long rows, int width, float eps",
    _row_per_warp,
)  # fmt: skip
_kernel(
    "rms_norm_forward", "norm.cu", "T", ONE,
    "const T* x, const T* branch?, const float* weight?, T* total?, T* y, float* rstd, long long rows, int width, "
    "float eps",
    _row_per_warp,
)  # fmt: skip
_kernel(  # partial_weight, partial_bias: both or neither, (norm_strips(rows), width)
    "layer_norm_backward", "norm.cu", "T", ONE,
    "const T* total, const float* weight?, const float* mean, const float* rstd, const T* g, const T* dtotal?, T* dx, "
    "float* partial_weight?, float* partial_bias?, long long rows, int width",
    _norm_backward(2),
)  # fmt: skip
_kernel(
    "rms_norm_backward", "norm.cu", "T", ONE,
    "const T* total, const float* weight?, const float* rstd, const T* g, const T* dtotal?, T* dx, "
    "float* partial_weight?, long long rows, int width",
    _norm_backward(1),
)  # fmt: skip

# Attention scores in place; `multiplier, start, threshold` of reference.dropout_key and kept_scale = 1 / (1 - p), or
# 0, 0, 0 and 1 without dropout.
_DROPOUT = "unsigned int multiplier, unsigned int start, unsigned int threshold, float kept_scale"
_kernel(
    "softmax_forward", "softmax.cu", "T", ONE,
    f"T* scores, T* dropped?, long long rows, int queries, int keys, int offset, float scale, {_DROPOUT}",
    _row_per_warp,
)  # fmt: skip
_kernel(
    "softmax_backward", "softmax.cu", "T", ONE,
    "const T* probabilities, T* gradient, long long rows, int queries, int keys, int offset, float scale, " + _DROPOUT,
    _row_per_warp,
)  # fmt: skip

for _name in ("row_softmax", "row_log_softmax"):
    _kernel(
        _name + "_forward", "row_softmax.cu", "T", ONE, "const T* x, T* y, long long rows, int width",
        _row_per_block(lambda s: s.width),
    )  # fmt: skip
    _kernel(
        _name + "_backward", "row_softmax.cu", "T", ONE, "const T* y, const T* g, T* dx, long long rows, int width",
        _row_per_block(lambda s: s.width),
    )  # fmt: skip
_kernel(
    "cross_entropy_forward", "cross_entropy.cu", "T", ONE,
    "const T* logits, const long long* targets, float* loss, float* lse, long long rows, int classes, int stride, "
    "long long ignore_index",
    _row_per_block(lambda s: s.stride),
)  # fmt: skip
_kernel(
    "cross_entropy_backward", "cross_entropy.cu", "T", ONE,
    "const T* logits, const long long* targets, const float* lse, const float* g, T* gradient, long long rows, "
    "int classes, int stride, int g_stride, long long ignore_index",
    _row_per_block(lambda s: s.stride),
)  # fmt: skip

_kernel(
    "embedding_forward", "embedding.cu", "T", ONE,
    "const T* table, const long long* ids, T* out, long long rows, int width, int vocabulary",
    _row_per_warp,
)  # fmt: skip
_kernel(  # adds to dtable
    "embedding_backward_atomic", "embedding.cu", "T", ONE,
    "const long long* ids, const T* g, float* dtable, long long rows, int width, int vocabulary",
    _row_per_warp,
)  # fmt: skip
_kernel(  # adds to dtable; sorted, order: the ids in ascending order and their stable argsort
    "embedding_backward_sorted", "embedding.cu", "T", ONE,
    "const long long* sorted, const long long* order, const T* g, float* dtable, long long rows, int width, "
    "int vocabulary",
    lambda s: ((_up(s.rows, 8), min(_up(s.width * s.T, 512), 65535), 1), (32, 8, 1), 0),
)  # fmt: skip

_HEADS = (
    "int batch, int heads, int length, int dim, long long x_batch, long long x_head, long long x_position, "
    "long long y_batch, long long y_head, long long y_position"
)
# fewer than 2^32 rows: batch * heads * length
_kernel("copy_heads", "heads.cu", "T", ONE, f"const T* x, T* y, {_HEADS}", _heads(1))
_kernel(
    "rotary", "heads.cu", "T", ONE, f"const T* x, const float* cos, const float* sin, T* y, {_HEADS}, float sign",
    _heads(2),
)  # fmt: skip

_kernel(  # partial (square_partials(n, itemsize of T),)
    "sum_of_squares", "optimizer.cu", "T", ONE, "const T* x, double* partial, long long n",
    lambda s: ((square_partials(s.n, s.T), 1, 1), (256, 1, 1), 0),
)  # fmt: skip
_kernel(
    "unscale", "optimizer.cu", "T", ONE, "T* gradient, const float* inverse, int* found, long long n", _of_T
)
_kernel(  # hyper: adamw_hyper(...); clip: 2 numbers
    "adamw", "optimizer.cu", "U", ONE,
    "float* parameter, const float* gradient, float* exp_avg, float* exp_avg_sq, U* shadow?, const float* hyper, "
    "const float* clip?, long long n, long long decayed",
    _flat(lambda s: s.U),
)  # fmt: skip
