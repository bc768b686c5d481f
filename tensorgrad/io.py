"""save and load: dicts of tensors as safetensors files. Never pickle."""

import os

import numpy as np

from .device import device as as_device
from .engine import TensorBase, wrap


def save(tensors, path, metadata=None):
    """Write a dict name -> Tensor or array to a safetensors file, all or nothing (temporary name, fsync, rename).

    Arrays are made contiguous first: safetensors 0.8 writes others wrongly without a word. metadata: a dict of strings
    kept in the file's header."""
    from safetensors.numpy import save_file

    arrays = {}
    for name, value in tensors.items():
        if isinstance(value, TensorBase):
            value = value.device.to_numpy(value.array)
        if not isinstance(value, np.ndarray):
            raise TypeError(
                f"save: {name!r} is a {type(value).__name__}, not a tensor or array; a file holds one dict of tensors "
                "(nest by dots in their names) and, as `metadata`, one of strings"
            )
        arrays[name] = np.ascontiguousarray(value).reshape(value.shape)
    if metadata is not None and not all(isinstance(s, str) for item in metadata.items() for s in item):
        raise TypeError("save: metadata must map strings to strings")
    # right from the arrays into the file: no copy of them all in between
    _write_atomic(path, lambda temporary: save_file(arrays, temporary, {"format": "pt", **(metadata or {})}))


def _write_atomic(path, write):
    """Let `write(temporary)` make a file, so that `path` holds either the old content or the new, whatever happens."""
    import tempfile

    folder, name = os.path.split(os.fspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder or ".", prefix=name + ".", suffix=".tmp")
    try:
        os.close(handle)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path, device="cpu"):
    """Read a safetensors file into a dict name -> Tensor on `device`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    place = as_device(device)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"load: there is no file {str(path)!r}")
    try:
        return {name: wrap(place.asarray(array), place) for name, array in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"load: {str(path)!r} is not a readable safetensors file: {error}") from None


def load_metadata(path):
    """The dict of strings in a safetensors file's header."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}
