"""Reading GGUF files: metadata, then a table of tensors, then their bytes, which are mapped and not copied.

Everything is checked against the size of the file before it is believed: a count or a length can never make us read
or allocate more than the file holds. Quantized tensors are turned into float32 by the `gguf` package.
"""
import math
import struct
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import UserError
from .stored import Stored, map_bytes, refuse_pickle, widen_bfloat16

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
            12: "<f8"}
_STRING, _ARRAY = 8, 9
# type number: (name, elements per block, bytes per block)
_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
          6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
          12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210)}


def read_gguf(path):
    """(metadata, {name: Stored}) of a GGUF file of version 2 or 3.

    Numbers and strings of the metadata are Python's, arrays of numbers NumPy's, arrays of strings lists. Raises
    UserError for anything that is not a whole, sound file."""
    path = Path(path)
    refuse_pickle(path)
    data = map_bytes(path)
    if data[:4].tobytes() != b"GGUF":
        raise UserError(f"{path}: not a GGUF file")
    reader = _Reader(path, data, 4)
    version = reader.number("<u4")
    if version not in (2, 3):
        raise UserError(f"{path}: GGUF version {version} is not read here, only 2 and 3 (of little-endian machines)")
    tensors, entries = reader.number("<u8"), reader.number("<u8")
    metadata = {}
    for _ in range(reader.count(entries, 13)):
        key = reader.string()
        if key in metadata:
            raise UserError(f"{path}: the metadata {key!r} comes twice; take another copy")
        metadata[key] = reader.value(reader.number("<u4"))
    table = {}
    for _ in range(reader.count(tensors, 24)):
        name = reader.string()
        if name in table:
            raise UserError(f"{path}: the tensor {name!r} comes twice; take another copy")
        table[name] = _entry(reader, name)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment % 8:
        raise UserError(f"{path}: general.alignment is {alignment!r}, not a multiple of 8; take another copy")
    body = data[-(-reader.at // alignment) * alignment:]
    return metadata, _stored(path, table, body, alignment)


class _Reader:
    """Takes values from the bytes `data`, from the place `at` on; raises UserError at their end."""

    def __init__(self, path, data, at):
        self.path, self.data, self.at = path, data, at

    def take(self, length):
        if length > len(self.data) - self.at:
            raise UserError(f"{self.path}: {length:,} bytes are wanted at {self.at:,} of a file of {len(self.data):,}; "
                            "it is truncated or damaged, take another copy")
        self.at += length
        return self.data[self.at - length:self.at]

    def count(self, number, least):
        """`number`, if the file can hold so many things of at least `least` bytes each."""
        if number * least > len(self.data) - self.at:
            raise UserError(f"{self.path}: {number:,} entries are claimed in {len(self.data) - self.at:,} bytes; it is "
                            "truncated or damaged, take another copy")
        return number

    def number(self, dtype):
        return self.take(np.dtype(dtype).itemsize).view(dtype)[0].item()

    def string(self):
        return self.take(self.number("<u8")).tobytes().decode("utf-8", "surrogateescape")

    def value(self, kind):
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise UserError(f"{self.path}: metadata of the unknown type {kind}; take another copy")
        kind, length = self.number("<u4"), self.number("<u8")
        if kind == _STRING:
            return self.strings(self.count(length, 8))
        if kind not in _SCALARS:
            raise UserError(f"{self.path}: an array of the type {kind} in the metadata; take another copy")
        return self.take(length * np.dtype(_SCALARS[kind]).itemsize).view(_SCALARS[kind])

    def strings(self, length):
        """Vocabularies have 100,000 strings: the same as string(), faster."""
        content, at, found = memoryview(self.data), self.at, []
        for _ in range(length):
            if at + 8 > len(content):
                self.take(len(content) - self.at + 8)                          # says that the file ends too early
            size, = struct.unpack_from("<Q", content, at)
            at += 8 + size
            if at > len(content):
                self.take(at - self.at)
            found.append(bytes(content[at - size:at]).decode("utf-8", "surrogateescape"))
        self.at = at
        return found


def _entry(reader, name):
    """(shape, type number, offset): dimensions are stored fastest first, shapes are slowest first."""
    dimensions = reader.number("<u4")
    if not 1 <= dimensions <= 4:
        raise UserError(f"{reader.path}: {name} has {dimensions} dimensions; take another copy")
    shape = tuple(reader.number("<u8") for _ in range(dimensions))[::-1]
    return shape, reader.number("<u4"), reader.number("<u8")


def _stored(path, table, body, alignment):
    found, end = {}, 0
    for name, (shape, kind, offset) in sorted(table.items(), key=lambda item: (item[1][2], math.prod(item[1][0]))):
        if kind not in _TYPES:
            names = ", ".join(known for known, _, _ in _TYPES.values())
            raise UserError(f"{path}: {name} is quantized in a way (number {kind}) that is not read here; take a file "
                            f"in one of {names}")
        dtype, elements, block = _TYPES[kind]
        if shape[-1] % elements:
            raise UserError(f"{path}: rows of {name} have {shape[-1]} elements, not a multiple of {elements} as "
                            f"{dtype} needs; take another copy")
        length = math.prod(shape) // elements * block
        if offset % alignment or offset < end or offset + length > len(body):
            raise UserError(f"{path}: {name} claims bytes {offset:,} to {offset + length:,} of {len(body):,}; the file "
                            "is truncated or damaged, take another copy")
        end = offset + length
        found[name] = Stored(shape, dtype, partial(_values, body[offset:end], kind, shape))
    return found


def _values(content, kind, shape):
    name, elements, block = _TYPES[kind]
    if name == "F32":
        return content.view("<f4").reshape(shape)
    if name == "F16":
        return content.view("<f2").reshape(shape).astype(np.float32)
    if name == "BF16":
        return widen_bfloat16(content.view("<u2").reshape(shape))
    quants = import_gguf().quants
    rows = content.reshape(*shape[:-1], shape[-1] // elements * block)
    return quants.dequantize(rows, import_gguf().GGMLQuantizationType(kind)).reshape(shape)


def import_gguf():
    """The package `gguf`."""
    try:
        import gguf
    except ImportError:
        raise UserError('quantized GGUF files and writing GGUF need the package gguf: '
                        'pip install "tensorgrad-gpt[gguf]"') from None
    return gguf
