"""From any format to any other, as `scripts/convert.py` does it."""
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..model.lora import adapter_names, merge_and_unload
from ..text import get_tokenizer
from ..training.checkpoints import save_best, start_run
from ..training.config import TrainConfig
from .gguf import export_gguf
from .hugging_face import export_hf
from .load import load, load_with_tokenizer
from .reference0 import load_reference0


@dataclass
class ConvertConfig:
    """How to convert a model."""

    to: Literal["auto", "hf", "gguf", "run"] = "auto"
    """Format of the target: "hf" = a folder for Hugging Face's transformers, "gguf" = a file for llama.cpp, "run" = a
    run folder of ours; "auto" = gguf where the target's name ends so, else hf."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the weights in the target; runs are always float32."""
    tokenizer: str = ""
    """Tokenizer to write, where the source has none or another is meant: a name or path as in training."""
    lora: str = ""
    """LoRA matrices of reference system 0, an .npz, to be added to the weights of an .npz."""


def convert_model(source, target, config, say=print):
    """Write the model `source` as `target`. LoRA adapters are merged. Raises UserError for what cannot be."""
    target = Path(target)
    to = config.to if config.to != "auto" else "gguf" if target.suffix == ".gguf" else "hf"
    if to != "gguf" and target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; choose another folder")
    if to == "run" and config.dtype != "float32":
        raise UserError("runs are written as float32; leave --dtype out")
    model, tokenizer = _open(source, config)
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


def _open(source, config):
    if config.lora:
        if Path(source).suffix != ".npz":
            raise UserError("--lora goes with an .npz of reference system 0; a run's adapters are merged without it")
        model, tokenizer = load_reference0(source, config.lora)
    elif config.tokenizer:
        model, tokenizer = load(source)[0], None
    else:
        model, tokenizer, _ = load_with_tokenizer(source)
    return model, get_tokenizer(config.tokenizer) if config.tokenizer else tokenizer
