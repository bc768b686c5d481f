"""Training adapters instead of weights: what the lora_ settings of a TrainConfig mean, and what a run leaves.

A run folder then holds adapter.safetensors where others have model.safetensors; its config.toml says in `init_from`
which model the adapter belongs to.
"""
from dataclasses import fields, replace
from pathlib import Path

import tensorgrad as tg

from ..errors import UserError
from ..model.config import GPTConfig
from ..model.lora import LoRAConfig, adapter_names, inject, merge_and_unload

MERGED = "merged"  # folder within a run's


def lora_config(config):
    """The LoRAConfig that a TrainConfig describes."""
    text = config.lora_targets.strip()
    if text.startswith("regex:"):
        targets = text.removeprefix("regex:")
    elif text == "all-linear":
        targets = text
    else:
        targets = tuple(text.replace(",", " ").split())
    return LoRAConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                      target_modules=targets, use_rslora=config.use_rslora, use_dora=config.use_dora)


def adapt(model, config):
    """Freeze `model`, a base model as it was opened, and add the adapter to be trained. Returns (model, Report).

    An adapter that it has already becomes part of its frozen weights. Raises UserError for settings that would need
    another base model."""
    for name, value in vars(model.config).items():
        wanted = getattr(config, name)
        if name == "block_size" and wanted <= value:
            continue  # shorter texts than it could read
        if name != "vocab_size" and wanted != value:
            raise UserError(f"{name} = {wanted}, but {config.init_from} has {value}, and with LoRA it stays as it is; "
                            f"leave {name} out, or train all weights with --lora_r 0")
    if adapter_names(model):
        merge_and_unload(model)
    if config.dtype == "float64":
        model.to(tg.float64)
    return model, inject(model, lora_config(config))


def merged_config(config, model, folder):
    """The TrainConfig with which a run folder of the merged model describes itself."""
    shape = {field.name: getattr(model.config, field.name) for field in fields(GPTConfig)}
    return replace(config, **shape, init_from="scratch", lora_r=0, lora_merge=False, resume="",
                   out_dir=str(Path(folder) / MERGED))
