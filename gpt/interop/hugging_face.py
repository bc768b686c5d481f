"""Folders as Hugging Face's transformers writes and opens them: config.json, *.safetensors, tokenizer files.

    model, tokenizer_path, config = load_hf("SmolLM2-135M-Instruct")   # a folder, or a name on the hub
    export_hf(model, "exported", tokenizer)             # AutoModelForCausalLM.from_pretrained("exported") opens it
"""
import json
import re
from pathlib import Path

import numpy as np

import tensorgrad as tg

from ..errors import UserError
from ..text.tokenizers import hugging_face_files
from ..training.files import complete_or_nothing
from .architectures import from_config_json, to_config_json
from .exporting import DTYPES, check_dtype, published
from .names import GPT2, gather, scatter
from .safetensors import WEIGHTS, read_folder, read_json

CONFIG = "config.json"
_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt")
_SHORT = {"gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
          "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl"}


def is_hf_folder(path):
    """Is `path` a folder with a model that transformers wrote?"""
    path = Path(path)
    return (path / CONFIG).is_file() and not (path / "config.toml").is_file()


def read_hf_config(folder):
    """(GPTConfig, Names, our modules without bias) of a folder."""
    path = Path(folder) / CONFIG
    return from_config_json(read_json(path), path)


def load_hf(folder, device="cpu", dtype="float32"):
    """(model, path of its tokenizer or None, GPTConfig) of a folder. The model is in evaluation mode, its matrices
    stored as `dtype` (see load.py); those that are stored so in the file and need no rearrangement are mapped from it.
    Raises UserError for anything that is no sound model of a known kind."""
    folder = Path(folder)
    config, names, without_bias = read_hf_config(folder)
    stored = read_folder(folder)
    if names is GPT2 and not any(name.startswith("transformer.") for name in stored):  # as OpenAI's own files are
        stored = {name if name == "lm_head.weight" else f"transformer.{name}": one for name, one in stored.items()}
    if config.tie_weights:  # some files repeat the embedding as head
        stored.pop("lm_head.weight", None)
    model = gather(config, names, stored, folder, without_bias, dtype)
    tokenizer = next((folder / name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()), None)
    return model.to(device), tokenizer, config


def export_hf(model, folder, tokenizer=None, dtype="float32"):
    """Write `model` as a folder that transformers opens, with its tokenizer where one is given; `dtype` "float32" or
    "float16". Returns the architecture. Raises UserError for a model that is none of those that transformers has, and
    for a folder that is not empty."""
    check_dtype(dtype)
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another folder")
    name, config, weights = published(model, tokenizer)
    _, names, _ = from_config_json(to_config_json(config, name), folder)
    tensors = {key: np.ascontiguousarray(array, DTYPES[dtype])
               for key, array in scatter(config, names, weights).items()}
    roles = {f"{role}_token_id": getattr(tokenizer, f"{role}_id", None) for role in ("bos", "eos", "pad")}
    content = to_config_json(config, name) | {"dtype": dtype, "torch_dtype": dtype} | roles
    if folder.is_dir():
        folder.rmdir()
    with complete_or_nothing(folder, "the model") as new:
        new.mkdir()
        (new / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tg.save(tensors, new / WEIGHTS)
        if tokenizer is not None:
            for file, text in hugging_face_files(tokenizer, config.block_size).items():
                (new / file).write_bytes(text)
    return name


def from_hub(name):
    """The folder of a model of the hub, downloaded or found in the cache. Raises UserError where the package or the
    network is not there."""
    name = _SHORT.get(name, name)
    unknown = UserError(f"{name[:200]}: no such file or folder, and no name of a model on the hub (owner/name)")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise unknown
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise UserError(f"{name}: no such file or folder; to get it from the hub: "
                        'pip install "tensorgrad-gpt[hf]"') from None
    try:
        return Path(snapshot_download(name, allow_patterns=[*_FILES]))
    except HFValidationError:  # it has its own idea of names
        raise unknown from None
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError) as error:
        raise UserError(f"{name}: no such file or folder, and the hub gives none ({type(error).__name__}); check name "
                        "and network, or copy the model's folder here") from None
