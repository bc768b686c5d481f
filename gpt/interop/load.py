"""A model and its tokenizer from whatever somebody has: a run folder, a Hugging Face folder or hub name, a GGUF file,
a PEFT folder, which names its base model, or the arrays of reference system 0."""
from dataclasses import asdict, fields
from pathlib import Path

from ..errors import UserError
from ..model.config import GPTConfig
from ..model.storage import check_storage, store
from ..text import load_tokenizer
from ..training.checkpoints import TOKENIZER, find_weights, load_run
from ..training.config import read_run
from .gguf import load_gguf, read_gguf_config
from .gguf_file import read_gguf
from .hugging_face import from_hub, is_hf_folder, load_hf, read_hf_config
from .peft import base_name, is_peft_folder, load_peft
from .reference0 import load_reference0
from .stored import refuse_pickle


def load(path, device="cpu", dtype="float32"):
    """(model, path of its tokenizer or None, config) of a model of any format.

    The config of a run is its TrainConfig, else a GPTConfig. The model is on `device`, in evaluation mode and, but for
    runs in float64, computes in float32. `dtype` other than "float32", for a CPU alone: its matrices are stored as
    "bfloat16", "float16" or "int8" and frozen (see nn.quantize); 16-bit ones of a file stay mapped as they are. Raises
    UserError for what is no model, or one that is not read here."""
    check_storage(dtype, device)
    path = local(path)
    if path.suffix == ".gguf":
        return load_gguf(path, device, dtype)
    if is_hf_folder(path):
        return load_hf(path, device, dtype)
    if is_peft_folder(path):
        model, tokenizer, config = load(base_of(path), device, dtype)
        load_peft(model, path)
        return model, tokenizer, config
    if path.suffix == ".npz":
        model, _ = load_reference0(path, device=device)
        return store(model, dtype), None, model.config
    model, _, config = load_run(path, device, load_with_tokenizer, dtype)
    return model, path / TOKENIZER, config


def load_with_tokenizer(path, device="cpu", dtype="float32"):
    """(model, tokenizer, config): `load` with the tokenizer itself. Raises UserError where there is none."""
    path = local(path)
    model, _, config = load(path, device, dtype)
    return model, tokenizer_of(path), config


def tokenizer_of(path):
    """The tokenizer of a model of any format. Raises UserError where there is none."""
    path = local(path)
    if path.suffix == ".npz":
        return load_reference0(path)[1]
    if is_peft_folder(path) and not (path / TOKENIZER).is_file():
        return tokenizer_of(base_of(path))
    return load_tokenizer(path)


def shape_of(path):
    """The fields of GPTConfig that a model of any format brings, a dict; weights are not read."""
    path = local(path)
    if path.suffix == ".gguf":
        return asdict(read_gguf_config(*read_gguf(path), path)[0])
    if path.suffix == ".npz":
        return asdict(load_reference0(path)[0].config)
    if is_hf_folder(path):
        return asdict(read_hf_config(path)[0])
    if is_peft_folder(path):
        return shape_of(base_of(path))
    names = {field.name for field in fields(GPTConfig)}
    return {name: value for name, value in read_run(path).items() if name in names}


def local(path):
    """The file or folder that `path` means; a name that is none is looked up on the hub. Raises UserError for weights
    in a form that is not opened."""
    found = Path(path)
    if not found.exists():
        return from_hub(str(path))
    if found.is_file() and found.suffix not in (".gguf", ".npz"):
        refuse_pickle(found)
        raise UserError(f"{path} is neither a folder nor a .gguf or .npz file; of a .safetensors file give the folder, "
                        "with the config.json beside it")
    known = found.is_file() or is_hf_folder(found) or is_peft_folder(found) or (found / "config.toml").is_file()
    if not known and not find_weights(found):
        raise UserError(f"{path}: not a run folder (it has no config.toml), no Hugging Face folder (config.json) and "
                        "no PEFT folder (adapter_config.json)")
    return found


def base_of(folder):
    """The path or hub name of the model that the adapter in a PEFT folder belongs to. Raises UserError."""
    base = base_name(folder)
    if is_peft_folder(base):
        raise UserError(f"{folder}: its base model {base} is an adapter as well; merge that first: "
                        f"scripts/convert.py {base} FOLDER")
    return base
