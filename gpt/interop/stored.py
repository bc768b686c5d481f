"""A tensor in a file: its shape and type are known, its values are read when they are asked for."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import UserError


@dataclass(frozen=True)
class Stored:
    """One tensor of a weight file. `read()` gives its values as float32 of `shape`: float32 ones are mapped from the
    file (written to, a page becomes private; the file stays as it is), others are converted."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def size(self):
        """Number of elements."""
        return math.prod(self.shape)


def map_bytes(path):
    """The content of a file as an uint8 array (bytes,), mapped copy-on-write."""
    if path.stat().st_size == 0:
        raise UserError(f"{path}: an empty file; take another copy")
    return np.memmap(path, np.uint8, mode="c").view(np.ndarray)


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
