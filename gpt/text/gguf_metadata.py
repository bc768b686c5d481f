"""The metadata at the beginning of a GGUF file: keys with numbers, texts, arrays of either.

Everything is checked against the size of the file before it is believed: a count or a length can never make us read
or allocate more than the file holds.
"""
import struct

import numpy as np

from ..errors import UserError

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
            12: "<f8"}
_STRING, _ARRAY = 8, 9


def read_metadata(path, data):
    """(metadata, GGUFReader at the table of tensors, their number) of the bytes `data` (bytes,) uint8 of a GGUF file of
    version 2 or 3; `path` is for messages.

    Numbers and strings are Python's, arrays of numbers NumPy's, arrays of strings lists. Raises UserError for anything
    that is not sound."""
    if data[:4].tobytes() != b"GGUF":
        raise UserError(f"{path}: not a GGUF file")
    reader = GGUFReader(path, data, 4)
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
    return metadata, reader, tensors


class GGUFReader:
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
