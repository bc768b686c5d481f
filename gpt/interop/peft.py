"""PEFT's adapter folders: adapter_config.json and adapter_model.safetensors, read and written.

    save_peft(model, "pirate", base="openai-community/gpt2")     # PeftModel.from_pretrained(base_model, "pirate")
    load_peft(model, "pirate", name="pirate")                    # what PEFT, or save_peft, wrote

Tensors are called base_model.model.<module in Hugging Face>.lora_A.weight (r, in) and .lora_B.weight (out, r); GPT-2's
transposed layers ("fan_in_fan_out") have them the same way. Embeddings have lora_embedding_A (r, V) and _B (C, r), DoRA
adds lora_magnitude_vector (out,). A model with swiglu has Llama's names, any other GPT-2's.
Where one product here computes several of Llama's projections, or blocks of one of GPT-2's layers have adapters of
their own, the factors are split or stacked so that the sum is exactly the same.
"""
import json
import math
import re
import warnings
from collections import Counter
from pathlib import Path

import tensorgrad as tg

from ..errors import UserError
from ..model.lora import DEFAULT, LoRAConfig, adapter_configs, inject, load_adapter_state, parts
from ..model.lora_layers import in_full
from ..model.lora_targets import find_targets, matches
from ..training.callbacks import Callback
from ..training.files import complete_or_nothing
from .safetensors import read_json, read_safetensors

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_KEYS = (r"lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?|base_layer\.weight")

# what changes the computation and is not done here, with the values that leave it alone
_UNSUPPORTED = {
    "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"), "modules_to_save": (),
    "use_qalora": (), "use_bdlora": (), "lora_bias": (), "layer_replication": (),
    "trainable_token_indices": (), "target_parameters": (), "alora_invocation_tokens": (), "megatron_config": (),
    "arrow_config": (), "kasa_config": (), "velora_config": (), "monteclora_config": (), "ensure_weight_tying": (),
}
_USED = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
         "layers_pattern", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
_HARMLESS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
             "fan_in_fan_out", "peft_version", "megatron_core", "loftq_config", "eva_config", "corda_config",
             "lora_ga_config", "qalora_group_size", "runtime_config"}


# ---- writing ----

def save_peft(model, folder, name=DEFAULT, base=None):
    """Write the adapter `name` of `model` as a PEFT folder that `PeftModel.from_pretrained` opens.

    base: what the folder says its base model is, a path or a hub name. The scale is the trained one, whatever
    `set_scale` asked for."""
    layers = _as_peft(model, name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{module}.{key}": tensor for module, (own, _) in layers.items() for key, tensor in own.items()}
    tg.save(tensors, folder / WEIGHTS)
    with complete_or_nothing(folder / CONFIG, "the adapter's configuration") as new:
        content = _peft_config(model, adapter_configs(model)[name], layers, base)
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _as_peft(model, name):
    """{module in Hugging Face: ({"lora_A.weight": A (r, in), "lora_B.weight": B (out, r), ...}, scale)}."""
    llama, layers = _is_llama(model), {}
    blocks = {}  # layer -> the Targets of its blocks
    for target in find_targets(model):
        if not target.is_whole:
            blocks.setdefault(target.layer, []).append(target)
    stacks = {}
    for part in parts(model, name):
        target, tensors = part.target, {key: tensor.detach() for key, tensor in part.tensors().items()}
        if llama and target.is_whole and target.llama is None:  # all rows of q, k and v: the same A, each its B
            for block in blocks[target.layer]:
                layers[block.llama] = ({key: tensor if key == "lora_A.weight" else tensor[slice(*block.rows)]
                                        for key, tensor in tensors.items()}, part.base_scale)
        elif llama or target.is_whole:
            layers[target.llama if llama else target.name] = (tensors, part.base_scale)
        else:
            stacks.setdefault(target.layer, []).append(part)
    for layer, stack in stacks.items():
        layers[layer] = _stack(stack, model.get_submodule(layer))
    return layers


def _stack(stack, layer):
    """Adapters of blocks of rows as one of the whole layer, whose rank is the sum of theirs: the As one under the
    other, the Bs along a diagonal, each in its rows and in the columns of its A; with DoRA other rows keep their
    length. ({name: tensor}, scale)."""
    scale = stack[0].base_scale
    a = tg.cat([part.lora_A.detach() for part in stack])                       # (sum of ranks, in)
    b = tg.zeros(layer.out_features, a.size(0), dtype=a.dtype, device=a.device)
    found = {"lora_A.weight": a, "lora_B.weight": b}
    if stack[0].lora_magnitude_vector is not None:
        found["lora_magnitude_vector"] = in_full(layer.base_weight).norm(dim=1)                    # (out,)
    column = 0
    for part in stack:
        (start, stop), r = part.target.rows, part.lora_A.size(0)
        b[start:stop, column:column + r] = part.lora_B.detach() * (part.base_scale / scale)
        if part.lora_magnitude_vector is not None:
            found["lora_magnitude_vector"][start:stop] = part.lora_magnitude_vector.detach()
        column += r
    return found, scale


def _peft_config(model, config, layers, base):
    """The content of adapter_config.json."""
    ranks = {module: next(iter(tensors.values())).size(0) for module, (tensors, _) in layers.items()}
    alphas = {module: _tidy(scale * (math.sqrt(ranks[module]) if config.use_rslora else ranks[module]))
              for module, (_, scale) in layers.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": None,
        "inference_mode": True, "r": r, "lora_alpha": alpha, "lora_dropout": config.lora_dropout,
        "target_modules": _shortest(layers, _modules(model)), "exclude_modules": None, "modules_to_save": None,
        "rank_pattern": {module: value for module, value in ranks.items() if value != r},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "use_rslora": config.use_rslora, "use_dora": config.use_dora, "bias": "none", "init_lora_weights": True,
        "fan_in_fan_out": not _is_llama(model), "layers_to_transform": None, "layers_pattern": None,
    }


def _tidy(number):
    """15.999999999999998 -> 16; PEFT writes whole numbers as such."""
    near = round(number)
    return near if math.isclose(number, near, rel_tol=1e-12) else number


def _shortest(chosen, modules):
    """A list of target_modules that finds `chosen` among all `modules` and nothing else: "attn.c_attn" where every
    block's is chosen, else full names."""
    ends = {}
    for module in modules:
        end = re.split(r"\.\d+\.", module)[-1]
        ends.setdefault(end, []).append(module)
    return sorted(entry for end, all_ in ends.items()
                  for entry in ([end] if all(module in chosen for module in all_) else
                                [module for module in all_ if module in chosen]))


def _is_llama(model):
    return any(target.name.endswith(".gate_proj") for target in find_targets(model))


def _modules(model):
    """{name in Hugging Face: Target} of all linear layers of the model."""
    if _is_llama(model):
        return {target.llama: target for target in find_targets(model) if target.llama}
    return {target.name: target for target in find_targets(model) if target.is_whole}


# ---- reading ----

def is_peft_folder(path):
    """Is `path` a folder with an adapter?"""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.json").is_file()


def base_name(folder):
    """The path or hub name of its base model that a PEFT folder gives. Raises UserError where it gives none."""
    path = Path(folder) / CONFIG
    name = read_json(path).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise UserError(f"{path} does not say which model the adapter belongs to: write its path or hub name there as "
                        "base_model_name_or_path")
    return name


def load_peft(model, folder, name=DEFAULT):
    """Add the adapter in a PEFT folder to `model` as `name`, and activate it. Returns the Report of `inject`.

    Raises UserError for a folder that is none, for options that are not supported, and where the tensors are not
    exactly those that the configuration and the model call for; FileNotFoundError."""
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise UserError(f"{folder} holds adapter_model.bin, a pickle, which could run code when opened; save the "
                        "adapter again with save_pretrained(..., safe_serialization=True)")
    tensors = {key: tg.from_numpy(stored.read()) for key, stored in read_safetensors(path).items()}
    modules = _modules(model)
    factors = _by_module(tensors, path)
    for module in factors:
        if module not in modules:
            raise UserError(f"{path} adapts {module}, which is no layer of this model (it has "
                            f"{', '.join(_shortest(modules, modules))}); was it trained on another one?")
    expected = [module for module in modules if matches(config, module)]
    for module in [*expected, *factors]:
        if module not in factors:
            raise UserError(f"{path} has no tensors for {module}, which target_modules of {CONFIG} choose; the file is "
                            "incomplete, or of another model")
        if module not in expected:
            raise UserError(f"{path} has tensors for {module}, which target_modules of {CONFIG} do not choose; the two "
                            "files do not belong together")
    targets = [target for module, target in modules.items() if module in factors]
    state = {}
    for module, own in factors.items():
        target = modules[module]
        _check(path, module, own, config, model.get_submodule(target.layer), target)
        state |= {f"{target.name}.{key}": tensor for key, tensor in own.items()}
    report = inject(model, config, name, targets)
    load_adapter_state(model, state, name, source=str(path))
    return report


def _read_config(path):
    """adapter_config.json as a LoRAConfig."""
    content = read_json(path)
    if content.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {content.get('peft_type')}; only LORA is supported")
    for option, neutral in _UNSUPPORTED.items():
        value = content.get(option)
        if value and value not in neutral:
            raise UserError(f"{path}: {option} = {json.dumps(value)} is not supported")
    unknown = [key for key in content if content[key] and key not in _USED | _HARMLESS | set(_UNSUPPORTED)]
    if unknown:
        warnings.warn(f"{path}: unknown options are ignored: {', '.join(unknown)}", stacklevel=3)
    used = {key: tuple(value) if isinstance(value, list) else value
            for key, value in content.items() if key in _USED and value is not None}
    if not used.get("target_modules"):
        raise UserError(f"{path}: target_modules is missing")
    try:
        return LoRAConfig(**used)
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from None


def _by_module(tensors, path):
    """{module in Hugging Face: {"lora_A.weight": Tensor, ...}}."""
    factors = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({_KEYS})", key)
        if not found:
            raise UserError(f"{path} has an unexpected tensor {key}; expected are {PREFIX}<module>.lora_A.weight and "
                            ".lora_B.weight, and lora_embedding_A and _B of embeddings")
        factors.setdefault(found[1], {})[found[2].replace("vector.weight", "vector")] = tensor
    return factors


def _check(path, module, own, config, layer, target):
    """Raise UserError unless an adapter's tensors for a layer are those that its configuration calls for."""
    r, rows = config.for_target(target)[0], target.rows[1] - target.rows[0]
    if target.is_embedding:
        table = own.pop("base_layer.weight", None)  # PEFT repeats the table, in case its rows have become more
        if table is not None and (table.shape != layer.weight.shape or not tg.allclose(
                table.float(), in_full(layer.weight), atol=1e-2, rtol=1e-2)):
            raise UserError(f"{path}: the adapter comes with another {module} than the model's, which is not supported")
        wanted = {"lora_embedding_A": (r, rows), "lora_embedding_B": (layer.embedding_dim, r)}
    else:
        wanted = {"lora_A.weight": (r, layer.in_features), "lora_B.weight": (rows, r)}
        wanted |= {"lora_magnitude_vector": (rows,)} if config.use_dora else {}
    for key in [*wanted, *own]:
        if key not in own:
            raise UserError(f"{path} has no tensor {PREFIX}{module}.{key}")
        if key not in wanted:
            raise UserError(f"{path} has an unexpected tensor {PREFIX}{module}.{key}; expected are {', '.join(wanted)}")
        if tuple(own[key].shape) != wanted[key]:
            raise UserError(f"{path}: {PREFIX}{module}.{key} has shape {tuple(own[key].shape)}, but r = {r} and the "
                            f"model call for {wanted[key]}")


class PeftFolder(Callback):
    """Keeps the best adapter of a training run as a PEFT folder."""

    def __init__(self, folder, base=None):
        self.folder, self.base = Path(folder), base

    def on_evaluation(self, trainer, record):
        if trainer.best_iteration == trainer.iteration:
            save_peft(trainer.model, self.folder, base=self.base)
