"""A tensor in a file: its shape and type are known, its values are read when they are asked for."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import UserError


@dataclass(frozen=True)
class Stored:
    """One tensor of a weight file. `read()` gives its values as float32 of `shape`: float32 ones are mapped from the
    file (written to, a page becomes private; the file stays as it is), others are converted. `narrow()`, of F16 and
    BF16 alone, maps them as they are: float16, or the bits of bfloat16 as uint16."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    narrow: Callable[[], np.ndarray] | None = None

    @property
    def size(self):
        """Number of elements."""
        return math.prod(self.shape)


def map_bytes(path):
    """The content of a file as an uint8 array (bytes,), mapped copy-on-write."""
    if path.stat().st_size == 0:
        raise UserError(f"{path}: an empty file; take another copy")
    return np.memmap(path, np.uint8, mode="c").view(np.ndarray)


def map_narrow(content, dtype, shape):
    """The bytes of an F16 or BF16 tensor as float16, or as bits (uint16), of `shape`."""
    if content.ctypes.data % 2:  # arithmetic wants aligned numbers
        content = content.copy()
    return content.view("<f2" if dtype == "F16" else "<u2").reshape(shape)


def adjoin(arrays):
    """Arrays (rows, ...) one below the other: one view where they lie so in memory already, else a copy."""
    first, rows = arrays[0], sum(len(array) for array in arrays)
    if len(arrays) == 1:
        return first
    at = first.ctypes.data
    for array in arrays:
        if array.ctypes.data != at or not array.flags.c_contiguous or array.dtype != first.dtype:
            return np.concatenate(arrays)
        at += array.nbytes
    return np.lib.stride_tricks.as_strided(first, (rows, *first.shape[1:]), first.strides)


def widen_bfloat16(bits):
    """float32 values of bfloat16 ones given as uint16: they are the upper halves of float32."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def refuse_pickle(path):
    """Raise UserError where `path` is a pickle, by its name or its first bytes (a ZIP archive, as torch.save makes
    them, or a bare pickle)."""
    with open(path, "rb") as file:
        start = file.read(4)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl") or start == b"PK\x03\x04" or start[:1] == b"\x80" and (
            start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise UserError(f"{path} is a pickle, which may run any program when it is opened, and is not read here; take "
                        "the model's .safetensors files, or have transformers write them where you trust the file: "
                        "model.save_pretrained(folder)")
