"""Reading GGUF files: metadata, then a table of tensors, then their bytes, which are mapped and not copied.

Everything is checked against the size of the file before it is believed: a count or a length can never make us read
or allocate more than the file holds. Quantized tensors are turned into float32 by the `gguf` package.
"""
import math
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..text.gguf_metadata import read_metadata
from .stored import Stored, map_bytes, map_narrow, refuse_pickle, widen_bfloat16

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
    metadata, reader, tensors = read_metadata(path, data)
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
        content = body[offset:end]
        narrow = partial(map_narrow, content, dtype, shape) if dtype in ("F16", "BF16") else None
        found[name] = Stored(shape, dtype, partial(_values, content, kind, shape), narrow)
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
