"""The weights of reference system 0 (kalandjl/llm-from-scratch): a post-norm GPT over characters, kept as .npz.

    model, tokenizer = load_reference0("my_model.npz", lora="lora_weights.npz")

The arrays are (in, out) and one per head; positions are learned, 1000 of them; there are no biases but LayerNorm's, so
the others are zero here. Its LoRA file holds two matrices for the query and for the value of each head. Both are needed
(its own web application loads one of each); their product, divided by their rank, is added to the weights.
"""
import math
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..model.config import GPTConfig
from ..text import CharTokenizer
from ..training.checkpoints import weights_of
from .names import skeleton
from .safetensors import read_json

_LARGEST = 1 << 30  # bytes of all arrays of a file; the published one has 3 MB


def load_reference0(path, lora=None, vocab=None, device="cpu"):
    """(model, CharTokenizer) of an .npz file; `vocab` is its vocab.json (None: the one beside it).

    lora: an .npz of LoRA matrices, whose products are added. Raises UserError for files that are not what they should
    be."""
    path = Path(path)
    arrays, tokenizer = _read(path), _vocabulary(Path(vocab) if vocab else path.with_name("vocab.json"))
    config = _config(path, arrays, tokenizer.vocab_size)
    if lora is not None:
        _add_lora(arrays, _read(Path(lora)), Path(lora), config)
    model = skeleton(config)
    own = weights_of(model)
    for i in range(config.n_layer):
        block, ours = f"transform.{i}", f"transformer.h.{i}"
        heads = [[_take(path, arrays, f"{block}.multi_head_attention_block.heads.{j}.{part}",
                        (config.n_embd, config.head_dim)) for j in range(config.n_head)]
                 for part in ("query", "key", "value")]
        attention = np.concatenate([head.T for part in heads for head in part])   # (3 * C, C), rows [q | k | v]
        output = _take(path, arrays, f"{block}.multi_head_attention_block.W_output", (config.n_embd, config.n_embd))
        weights = {"attn.c_attn.weight": attention, "attn.c_proj.weight": output.T}
        for theirs, name, shape in (("W1", "mlp.c_fc", (config.n_embd, config.hidden_dim)),
                                    ("W2", "mlp.c_proj", (config.hidden_dim, config.n_embd))):
            weights[f"{name}.weight"] = _take(path, arrays, f"{block}.{theirs}", shape).T
        for n in (1, 2):
            for theirs, leaf in (("gamma", "weight"), ("beta", "bias")):
                weights[f"ln_{n}.{leaf}"] = _take(path, arrays, f"{block}.layer_norm{n}.{theirs}", (config.n_embd,))
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            weights[f"{name}.bias"] = np.zeros(own[f"{ours}.{name}.bias"].shape)
        for name, array in weights.items():
            _put(own[f"{ours}.{name}"], array)
    _put(own["transformer.wte.weight"], _take(path, arrays, "embedding_matrix", (config.vocab_size, config.n_embd)))
    _put(own["transformer.wpe.weight"], _take(path, arrays, "position_matrix", (config.block_size, config.n_embd)))
    if arrays:
        raise UserError(f"{path}: {len(arrays)} arrays that this model has no use for: {', '.join(list(arrays)[:8])}")
    return model.to(device).eval(), tokenizer


def _read(path):
    """{name: array} of an .npz file, after checking what the archive and the header of each array claim."""
    found = {}
    with open(path, "rb") as stream:
        try:
            archive = zipfile.ZipFile(stream)
            size = sum(entry.file_size for entry in archive.infolist())
            if size > _LARGEST:
                raise ValueError(f"it unpacks to {size:,} bytes, more than {_LARGEST:,}")
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    shape, fortran, dtype = _array_header(file)
                    if dtype.kind != "f" or math.prod(shape) * dtype.itemsize + file.tell() != entry.file_size:
                        raise ValueError(f"{entry.filename} claims {dtype} {shape} in {entry.file_size:,} bytes")
                    array = np.frombuffer(file.read(), dtype)
                    found[entry.filename.removesuffix(".npy")] = array.reshape(shape, order="F" if fortran else "C")
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError,
                OSError) as error:  # the last where a damaged directory points to before the file's beginning
            raise UserError(f"{path}: not an .npz of arrays that can be read ({error}); take another copy") from None
    return found


def _array_header(file):
    """(shape, is it in Fortran's order, dtype) of the .npy that begins here."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of .npy")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _vocabulary(path):
    if not path.is_file():
        raise UserError(f"{path}: the vocabulary is not there; it is the vocab.json beside the weights")
    characters = read_json(path).get("chars")
    if not isinstance(characters, list) or not all(isinstance(c, str) and len(c) == 1 for c in characters):
        raise UserError(f"{path}: no list of single characters under \"chars\"; take another copy")
    return CharTokenizer("".join(characters))


def _config(path, arrays, vocab_size):
    def count(pattern):
        return len({found[1] for found in map(re.compile(pattern).match, arrays) if found})

    layers, heads = count(r"transform\.(\d+)\."), count(r"transform\.0\.multi_head_attention_block\.heads\.(\d+)\.")
    needed = ("position_matrix", "transform.0.W1")
    if not layers or not heads or any(name not in arrays or arrays[name].ndim != 2 for name in needed):
        raise UserError(f"{path}: no arrays of a transformer of reference system 0 in it")
    return GPTConfig(
        block_size=len(arrays["position_matrix"]), vocab_size=vocab_size, n_layer=layers, n_head=heads,
        n_embd=arrays["transform.0.W1"].shape[0], ffn_dim=arrays["transform.0.W1"].shape[1], bias=True,
        activation="relu", norm_position="post")


def _add_lora(arrays, matrices, path, config):
    """Add A @ B of each query and value, (C, r) @ (r, hs), to its array in `arrays`."""
    for i in range(config.n_layer):
        for j in range(config.n_head):
            for part in ("query", "value"):
                name = f"transform.{i}.head.{j}.{part}"
                a, b = (matrices.pop(f"{name}.lora_{letter}", None) for letter in "AB")
                target = f"transform.{i}.multi_head_attention_block.heads.{j}.{part}"
                if a is None or b is None or a.ndim != 2 or b.ndim != 2 or target not in arrays or (
                        a.shape[1] != b.shape[0] or (a.shape[0], b.shape[1]) != arrays[target].shape):
                    raise UserError(f"{path}: {name} needs lora_A and lora_B that fit {target}")
                arrays[target] = arrays[target] + a @ b / a.shape[1]     # alpha = 1: divided by the rank
    if matrices:
        raise UserError(f"{path}: {len(matrices)} matrices that this model has no place for: "
                        f"{', '.join(list(matrices)[:8])}")


def _take(path, arrays, name, shape):
    array = arrays.pop(name, None)
    if array is None or array.shape != shape:
        raise UserError(f"{path}: {name} must be an array of shape {shape}"
                        + ("" if array is None else f", not {array.shape}"))
    return array


def _put(parameter, array):
    parameter.array[...] = array
    parameter._bump()
