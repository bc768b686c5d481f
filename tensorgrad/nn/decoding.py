"""One step of decoding through a stack of transformer blocks in a few compiled kernels, beside the same in Tensors.

The model's definition stays the one in modules; this computes the same from the same weights where the machine and
they allow it (a CPU, the extra `fast`, float32 or packed weights), for a tenth of the overhead.
"""

from dataclasses import dataclass

import numpy as np

from ..engine import hooks, modes, wrap
from ..kernels import routines
from ..kernels.packed import FEW
from ..kernels.pool import pool
from ..tensor import Tensor
from .packed import PackedWeight

GRAIN = 1 << 17  # elements of a weight from which a second thread pays off


@dataclass(frozen=True)
class BlockWeights:
    """A pre-norm block: x + proj(attention(norm_1 x)), then that + down(activation(up(norm_2 x))). Tensors or None."""

    norm_1: tuple  # (weight, bias)
    qkv: tuple  # (weight, bias): rows are queries, keys, values, head by head
    q_norm: Tensor | None
    k_norm: Tensor | None
    proj: tuple
    norm_2: tuple
    up: tuple
    down: tuple

    def tensors(self):
        """All of them, in order."""
        pairs = (self.norm_1, self.qkv, (self.q_norm, self.k_norm), self.proj, self.norm_2, self.up, self.down)
        return [tensor for pair in pairs for tensor in pair]


class StackDecoder:
    """Blocks, a final norm and a head for `rows` texts whose keys and values are rows `first` and on of `caches`.

    blocks: BlockWeights; last: ((norm weight, bias), (head weight, bias)); caches: a (keys, values) pair of Tensors
    (rows, key heads, length, head size) per block. `activation`: gelu, gelu_tanh, relu, relu2 or swiglu; `rms`: RMSNorm
    instead of LayerNorm. It keeps the arrays as they are now: make another one after weights were exchanged. Raises
    Unsupported where these weights or this machine are not for it."""

    def __init__(self, blocks, last, caches, first, rows, heads, activation, rms, eps, rotary):
        kernels = _kernels(blocks, last, caches, rows)
        keys = caches[0][0].array
        (_, groups, length, size), width = keys.shape, blocks[0].proj[0].shape[0]
        threads = pool().threads
        self.x = np.empty((rows, width), np.float32)
        self.slots, self.seen = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.cos, self.sin = np.zeros((2, rows, size), np.float32)
        self.normed = np.empty((threads, rows, width), np.float32)
        qkv = np.empty((rows, (heads + 2 * groups) * size), np.float32)
        scores, y = np.empty((threads, length), np.float32), np.empty((rows, heads * size), np.float32)
        scratch, raw = np.empty_like(self.x), np.empty((rows, blocks[0].up[0].shape[0]), np.float32)
        hidden = np.empty((rows, blocks[0].down[0].shape[1]), np.float32)
        kind, eps = getattr(kernels, activation.upper()), np.float32(eps)
        self.tasks = []
        for block, (keys, values) in zip(blocks, caches, strict=True):
            own = _vector(block.q_norm, size, 1), _vector(block.k_norm, size, 1)
            norms = [(*_affine(norm, width), eps, rms) for norm in (block.norm_1, block.norm_2)]
            tail = (heads, size, block.q_norm is not None, *own, rotary, self.cos, self.sin, keys.array, values.array,
                    first, self.slots, self.seen, self.normed, qkv, scores, y)
            self.tasks += [
                _tasks(kernels.attend, groups, block.qkv[0], (self.x, *norms[0], *_linear(*block.qkv), *tail), True, 1),
                _tasks(kernels.add_product, width, block.proj[0], (y, *_linear(*block.proj), scratch, self.x)),
                _tasks(kernels.expand, hidden.shape[1], block.up[0],
                       (self.x, *norms[1], *_linear(*block.up), kind, self.normed, raw, hidden), True),
                _tasks(kernels.add_product, width, block.down[0], (hidden, *_linear(*block.down), scratch, self.x))]
        norm, head = last
        self._head = (kernels, head[0], (self.x, *_affine(norm, width), eps, rms, *_linear(*head), kernels.NONE,
                                         self.normed))

    def step(self, x, slots, seen, rotary=None):
        """Logits (rows, V) after one more token each: x (rows, C) its vectors; slots: where its keys and values go;
        seen: how many slots it attends to; rotary: (cos, sin), each (rows, size), of its position."""
        self.x[...] = x.array
        self.slots[...], self.seen[...] = slots, seen
        if rotary is not None:
            self.cos[...], self.sin[...] = (table.array.reshape(-1, table.shape[-1]) for table in rotary)
        run = pool().run
        for tasks in self.tasks:
            run(tasks)
        kernels, weight, arguments = self._head
        logits = np.empty((len(self.x), weight.shape[0]), np.float32)
        run(_tasks(kernels.expand, weight.shape[0], weight, (*arguments, logits, logits), True))
        return wrap(logits, x.device)


class Unsupported(Exception):
    """These weights, or this machine, are not for StackDecoder."""


def observed():
    """Does anybody look at single operations (a profiler, a tracer)? They want to see them."""
    return bool(hooks) or modes.module_path is not None


def _kernels(blocks, last, caches, rows):
    """The compiled kernels. Raises Unsupported."""
    tensors = [t for block in blocks for t in block.tensors()] + [t for pair in last for t in pair]
    tensors += [t for pair in caches for t in pair]
    fine = rows <= FEW and all(
        t is None or t.device.type == "cpu" and (t.array.flags.c_contiguous or t.array.flags.f_contiguous)
        and (t.array.dtype == np.float32 or isinstance(t, PackedWeight)) for t in tensors)
    if not fine or not hasattr(routines(caches[0][0].device), "few_rows"):
        raise Unsupported
    from ..kernels import compiled_decode

    return compiled_decode


def _vector(tensor, size, value):
    return np.full(size, value, np.float32) if tensor is None else tensor.array


def _affine(norm, width):
    return _vector(norm[0], width, 1), _vector(norm[1], width, 0)


def _linear(weight, bias):
    """(weight as the kernels take it, scale, bias)."""
    scale = getattr(weight, "scale", None)
    array = weight.array.view(np.int16) if weight.array.dtype == np.float16 else weight.array
    return array, np.ones((1, 1), np.float32) if scale is None else scale, _vector(bias, len(array), 0)


def _tasks(kernel, n, weight, arguments, numbered=False, align=16):
    """The tasks that split range(n) over the pool's threads: kernel(start, stop, [number,] *arguments)."""
    parts = max(1, min(pool().threads, n // align, weight.array.size // GRAIN))
    edges = [n * i // parts // align * align for i in range(parts)] + [n]
    return [(kernel, (start, stop, *((number,) if numbered else ()), *arguments))
            for number, (start, stop) in enumerate(zip(edges, edges[1:], strict=False))]
