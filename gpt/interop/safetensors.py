"""Reading safetensors files without copying them: 8 bytes with the length of a header, the header in JSON, then arrays.

Everything that the header claims is checked against the size of the file before any array exists. Several files with
`model.safetensors.index.json`, which says what is where, are read as one.
"""
import json
import math
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import UserError
from .stored import Stored, map_bytes, map_narrow, refuse_pickle, widen_bfloat16

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes, as in the reference implementation
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
          "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_folder(folder):
    """{name: Stored} of the weights in a folder: model.safetensors, or the files that its index names."""
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    others = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if others:
        refuse_pickle(others[0])
    raise UserError(f"{folder}: no {WEIGHTS} and no {INDEX} in it")


def read_safetensors(path):
    """{name: Stored} of a safetensors file. Raises UserError for anything that is not a whole, sound file."""
    path = Path(path)
    refuse_pickle(path)
    data = map_bytes(path)
    if len(data) < 10:
        raise UserError(f"{path}: {len(data)} bytes are no safetensors file; take another copy")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(_MAX_HEADER, len(data) - 8):
        raise UserError(f"{path}: its header claims {length:,} bytes of a file of {len(data):,}; it is truncated or no "
                        "safetensors file, take another copy")
    header = parse_json(data[8:8 + length].tobytes(), path)
    header.pop("__metadata__", None)
    body = data[8 + length:]
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    expected = 0
    for (begin, end), name in sorted((spans[name], name) for name in spans):
        if begin != expected:
            raise UserError(f"{path}: the bytes of {name} begin at {begin}, not at {expected} where those before it "
                            "end; tensors overlap or leave gaps, take another copy")
        expected = end
    if expected != len(body):
        raise UserError(f"{path}: its tensors need {expected:,} bytes, it has {len(body):,}; it is truncated or "
                        "damaged, take another copy")
    return {name: _stored(path, name, body[slice(*spans[name])], **entry) for name, entry in header.items()}


def _stored(path, name, content, dtype, shape, data_offsets):
    narrow = partial(map_narrow, content, dtype, shape) if dtype in ("F16", "BF16") else None
    return Stored(tuple(shape), dtype, partial(_values, path, name, content, dtype, shape), narrow)


def read_json(path):
    """The JSON object in a file, of which nothing larger than a header may be is read. Raises UserError."""
    path = Path(path)
    if path.stat().st_size > _MAX_HEADER:
        raise UserError(f"{path}: larger than {_MAX_HEADER:,} bytes; take another copy")
    return parse_json(path.read_bytes(), path)


def parse_json(content, path):
    """A JSON object in which no key comes twice. Raises UserError that names `path`."""
    def unique(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key comes twice")
        return found

    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); take another copy") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: JSON, but no object; take another copy")
    return found


def _span(path, name, entry):
    """(begin, end) of a tensor's bytes, after checking its entry in the header."""
    fine = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    if fine:
        shape, offsets = entry["shape"], entry["data_offsets"]
        fine = (isinstance(entry["dtype"], str) and _whole_numbers(shape) and len(shape) <= 16
                and _whole_numbers(offsets) and len(offsets) == 2)
    if not fine:
        raise UserError(f"{path}: what it says about {name!r} is not a type, a shape and two offsets; take another "
                        "copy")
    if entry["dtype"] not in _BYTES:
        raise UserError(f"{path}: {name} has the unknown type {entry['dtype']!r}; there are {', '.join(_BYTES)}")
    needed = math.prod(shape) * _BYTES[entry["dtype"]]
    if offsets[1] - offsets[0] != needed:
        raise UserError(f"{path}: {name}, {entry['dtype']} {shape}, needs {needed:,} bytes, its offsets {offsets} have "
                        f"{offsets[1] - offsets[0]:,}; take another copy")
    return tuple(offsets)


def _whole_numbers(values):
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _values(path, name, content, dtype, shape):
    if dtype not in _FLOATS:
        raise UserError(f"{path}: {name} has the type {dtype}, but weights are {', '.join(_FLOATS)}")
    if dtype == "F32" and content.ctypes.data % 4:  # arithmetic wants aligned numbers
        content = content.copy()
    values = content.view(_FLOATS[dtype]).reshape(shape)
    return widen_bfloat16(values) if dtype == "BF16" else values.astype(np.float32, copy=False)


def _read_shards(folder):
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"{index}: no weight_map from names of tensors to names of files; take another copy")
    files = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or "\\" in name or ":" in name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: names the file {name!r}; only .safetensors files beside it are opened")
        if not (folder / name).is_file():
            raise UserError(f"{index}: names the file {name}, which is not there; download it again")
        files[name] = read_safetensors(folder / name)
    lost = next((name for name, place in places.items() if name not in files[place]), None)
    if lost is not None:
        raise UserError(f"{folder / places[lost]}: no tensor {lost}, which {INDEX} says is in it; take another copy")
    return {name: files[place][name] for name, place in places.items()}
