"""From any format to any other, as `scripts/convert.py` does it."""
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..model.lora import adapter_names, adapter_state, merge_and_unload
from ..text import get_tokenizer
from ..training.checkpoints import save_best, start_run
from ..training.config import TrainConfig, read_run
from .gguf import export_gguf
from .hugging_face import export_hf
from .load import base_of, load, load_with_tokenizer
from .peft import is_peft_folder, load_peft, save_peft
from .reference0 import load_reference0


@dataclass
class ConvertConfig:
    """How to convert a model."""

    to: Literal["auto", "hf", "gguf", "run", "peft"] = "auto"
    """Format of the target: "hf" = a folder for Hugging Face's transformers, "gguf" = a file for llama.cpp, "run" = a
    run folder of ours, "peft" = the adapter alone, as PEFT opens it; "auto" = gguf where the target's name ends so,
    else hf."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the weights in the target; runs are always float32."""
    tokenizer: str = ""
    """Tokenizer to write, where the source has none or another is meant: a name or path as in training."""
    lora: str = ""
    """Adapter to be added to the weights: a PEFT folder; for an .npz of reference system 0 its LoRA matrices, an
    .npz."""


def convert_model(source, target, config, say=print):
    """Write the model `source` as `target`. LoRA adapters are merged, unless a PEFT folder is written. Raises UserError
    for what cannot be."""
    target = Path(target)
    to = config.to if config.to != "auto" else "gguf" if target.suffix == ".gguf" else "hf"
    if to != "gguf" and target.suffix in (".gguf", ".npz", ".safetensors", ".bin", ".pt"):
        raise UserError(f"{target} is the name of a file, and {to} makes a folder; name one, or a .gguf file")
    if to != "gguf" and target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; choose another folder")
    if to == "run" and config.dtype != "float32":
        raise UserError("runs are written as float32; leave --dtype out")
    model, tokenizer = _open(source, config)
    if to == "peft":
        if not adapter_names(model):
            raise UserError(f"{source} has no adapter, which is all that a PEFT folder holds")
        save_peft(model, target, base=base_of_adapter(source))
        say(f"wrote      {target}: PEFT folder, {sum(t.numel() for t in adapter_state(model).values()):,} parameters")
        return
    if adapter_names(model):
        merge_and_unload(model)
    if to == "hf":
        kind = f"Hugging Face folder, {export_hf(model, target, tokenizer, config.dtype)}"
    elif to == "gguf":
        kind = f"GGUF file, {export_gguf(model, target, tokenizer, config.dtype)}"
        if model.config.activation == "gelu":
            say("note       llama.cpp has only the approximate GELU: its logits differ by about 1e-3")
    else:
        start_run(target, TrainConfig(**asdict(model.config), out_dir=str(target)), tokenizer)
        save_best(target, model)
        kind = "run folder"
    say(f"wrote      {target}: {kind}, {model.num_params(non_embedding=False):,} parameters")


def base_of_adapter(source):
    """The path or hub name of the base model of a run that trained an adapter, or of a PEFT folder."""
    return base_of(source) if is_peft_folder(source) else read_run(source)["init_from"]


def _open(source, config):
    """(model, tokenizer or None)."""
    if config.lora and Path(source).suffix == ".npz":
        model, tokenizer = load_reference0(source, config.lora)
        return model, get_tokenizer(config.tokenizer) if config.tokenizer else tokenizer
    if config.lora and not is_peft_folder(config.lora):
        raise UserError(f"{config.lora} is no PEFT folder (it has no adapter_config.json); LoRA matrices in an .npz go "
                        "with an .npz of reference system 0")
    if config.tokenizer:
        model, tokenizer = load(source)[0], get_tokenizer(config.tokenizer)
    else:
        model, tokenizer, _ = load_with_tokenizer(source)
    if config.lora:
        if adapter_names(model):
            merge_and_unload(model)
        load_peft(model, config.lora)
    return model, tokenizer
