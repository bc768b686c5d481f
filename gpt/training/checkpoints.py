"""What a run leaves on disk, and how it comes back.

    out/config.toml  tokenizer.json  model.safetensors     the best weights so far: all that is needed to sample
    out/last/        the same three files with the latest weights, and the rest of the training state:
                     train_state.safetensors (the optimizer's tensors), train_state.json (everything else)

A run that trains an adapter (lora_r) has adapter.safetensors in the place of model.safetensors, and the path of the
model it belongs to in config.toml.

Nothing is ever half written: a file is written under a temporary name, fsynced and renamed; last/ is written as a whole
new folder that then takes the place of the old one by a rename. A crash or a full disk leaves what was saved before.
"""
import json
from functools import partial
from pathlib import Path

import tensorgrad as tg

from ..errors import UserError
from ..model.gpt import GPT
from ..model.lora import adapter_names, adapter_state
from ..model.storage import store
from ..text import load_tokenizer
from .config import TrainConfig, read_run, run_toml
from .files import complete_or_nothing, delete
from .lora import MERGED, adapt
from .precision import weights_dtype

CONFIG, TOKENIZER, WEIGHTS, ADAPTER = "config.toml", "tokenizer.json", "model.safetensors", "adapter.safetensors"
PEFT_FOLDER = "peft"
METRICS = "metrics.jsonl"
STATE_TENSORS, STATE_JSON = "train_state.safetensors", "train_state.json"


# ---- writing ----

def refuse_taken(folder, config):
    """Raise UserError where a run of `config` would overwrite what is in `folder`: another run, unless the user said
    `overwrite`, or files of the same names that are no run's."""
    folder = Path(folder)
    if config.resume and folder.resolve() == Path(config.resume).resolve():
        return
    foreign = next((name for name in (CONFIG, TOKENIZER, WEIGHTS, ADAPTER) if (folder / name).exists()), None)
    if foreign and not (folder / METRICS).exists():
        raise UserError(f"{folder} is not a run folder but holds a {foreign}; choose another --out_dir")
    if find_weights(folder) and not config.overwrite:
        raise UserError(f"{folder} holds a run already: continue it with --resume {folder}, choose another --out_dir, "
                        "or replace it with --overwrite")


def delete_run(folder):
    """Delete the run in `folder`, file by known file; anything else there is left alone."""
    extra = (MERGED, PEFT_FOLDER) if (Path(folder) / METRICS).exists() else ()  # folders of a run, not merely so named
    for name in (*extra, WEIGHTS, ADAPTER, "last", "last.old", CONFIG, TOKENIZER, METRICS, "samples.txt", "loss.png"):
        delete(Path(folder) / name)


def start_run(folder, config, tokenizer):
    """Make a run folder: write config.toml and tokenizer.json."""
    folder = Path(folder)
    with complete_or_nothing(folder / CONFIG, "the configuration") as path:
        path.write_text(run_toml(config), encoding="utf-8")
    tokenizer.save(folder / TOKENIZER)


def save_best(folder, model, **facts):
    """Write model.safetensors, or adapter.safetensors; `facts` (iteration, val_loss ...) go into its metadata."""
    with complete_or_nothing(Path(folder) / weights_file(model), "the best weights") as path:
        tg.save(weights_of(model), path, metadata={name: str(value) for name, value in facts.items()})


def save_last(folder, model, config, tokenizer, state):
    """Write last/: weights, configuration, tokenizer, and `state`, a tree of dicts, lists, Tensors and JSON values."""
    with complete_or_nothing(Path(folder) / "last", "the checkpoint") as new:
        new.mkdir()
        tensors = {}
        tree = pack(state, tensors)
        tg.save(weights_of(model), new / weights_file(model))
        tg.save(tensors, new / STATE_TENSORS)
        (new / STATE_JSON).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        (new / CONFIG).write_text(run_toml(config), encoding="utf-8")
        tokenizer.save(new / TOKENIZER)


def weights_file(model):
    """The name of the file for what `weights_of` gives."""
    return ADAPTER if adapter_names(model) else WEIGHTS


def weights_of(model):
    """What a run trains of its model: the adapter, or state_dict with a tied tensor once, under its first name."""
    if adapter_names(model):
        return adapter_state(model)
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def pack(tree, tensors, path=""):
    """A JSON-able copy of `tree`; its Tensors go into the dict `tensors`, their names there stand in their places."""
    if isinstance(tree, tg.Tensor):
        tensors[path] = tree
        return {"tensor": path}
    if isinstance(tree, dict):
        return {str(key): pack(value, tensors, f"{path}.{key}".lstrip(".")) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [pack(value, tensors, f"{path}.{i}") for i, value in enumerate(tree)]
    return tree


def unpack(tree, tensors):
    """The inverse of `pack`: integer keys, which JSON turns into text, are integers again."""
    if isinstance(tree, dict):
        if set(tree) == {"tensor"}:
            return tensors[tree["tensor"]]
        return {int(key) if key.isdigit() else key: unpack(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    return tree


# ---- reading ----

def last_folder(folder):
    """The folder of the latest checkpoint in a run folder, or None: last.old if a crash hit between two renames."""
    return next((path for path in (Path(folder) / "last", Path(folder) / "last.old") if path.is_dir()), None)


def find_weights(folder):
    """The path of the weights in a run folder: the best ones, or the latest; None where there are none."""
    places = [path / name for path in (Path(folder), last_folder(folder)) if path for name in (WEIGHTS, ADAPTER)]
    return next((path for path in places if path.exists()), None)


def holds_weights(folder):
    """Is this a run folder whose weights are a whole model's?"""
    weights = find_weights(folder)
    return (Path(folder) / CONFIG).is_file() and (weights is None or weights.name == WEIGHTS)


def load_last(folder, model):
    """Read last/ of a run folder: the weights into `model`; returns the state that `save_last` was given."""
    last = last_folder(folder)
    if last is None:
        raise UserError(f"{folder}: nothing to resume, it has no last/; start anew, or with --init_from {folder}")
    load_weights(model, last)
    tensors = _load(last / STATE_TENSORS)
    try:
        tree = json.loads((last / STATE_JSON).read_text(encoding="utf-8"))
        return unpack(tree, tensors)
    except (ValueError, KeyError) as error:
        raise UserError(f"{last / STATE_JSON}: damaged ({error}); start with --init_from {last}") from None


def load_run(folder, device="cpu", open_base=None, dtype="float32"):
    """(model, tokenizer, config) of a run folder: the best weights, or the latest while there are no best ones.

    The model is on `device` and in evaluation mode, its matrices stored as `dtype` (see model/storage.py). Where the
    run trained an adapter, its base model is opened by `open_base(path)`, which gives a tuple that begins with the
    model; by default it is a run as well. Raises UserError for a folder that is no run, or whose files do not fit
    together; FileNotFoundError.
    """
    folder = Path(folder)
    config = TrainConfig(**read_run(folder))
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if config.lora_r:
        packed = {} if dtype == "float32" else {"dtype": dtype}
        model, _, _ = adapted_base(config, partial(open_base or load_run, **packed))
    else:
        model = GPT(config.model_config(tokenizer.vocab_size)).to(weights_dtype(config.dtype))
    load_weights(model, folder)
    return store(model.to(device).eval(), dtype), tokenizer, config


def adapted_base(config, open_base=None):
    """(model, tokenizer, Report): the base model of a run that trains an adapter, with that adapter untrained."""
    if Path(config.init_from).is_absolute() and not Path(config.init_from).exists():  # else a name that is looked up
        raise UserError(f"the base model of this adapter, {config.init_from}, is no longer there; put it back, or say "
                        "where it is in the init_from of the run's config.toml")
    base, tokenizer, *_ = (open_base or load_run)(config.init_from)
    model, report = adapt(base, config)
    return model, tokenizer, report


def load_weights(model, folder):
    """Copy the weights of a run folder, the best or else the latest, into `model`. Raises UserError naming the first
    tensor that does not fit."""
    path = find_weights(folder)
    if path is None:
        raise UserError(f"{folder}: no {weights_file(model)} in it; scripts/train.py writes one at its first "
                        "evaluation")
    put_weights(model, _load(path), path)


def put_weights(model, weights, path):
    """Copy `weights`, a dict of Tensors that came from `path`, into `model`; they must be exactly its own."""
    own = weights_of(model)
    remedy = "take the model's shape from the config.toml beside it (leave out n_layer, n_embd, ...), or train anew"
    for name, tensor in own.items():
        if name not in weights:
            raise UserError(f"{path} has no tensor {name}, which the model needs; {remedy}")
        theirs, ours = tuple(weights[name].shape), tuple(tensor.shape)
        if theirs != ours:
            raise UserError(f"{path}: {name} has shape {theirs}, in the model it has {ours}; {remedy}")
    unknown = next((name for name in weights if name not in own), None)
    if unknown:
        raise UserError(f"{path} has a tensor {unknown}, which the model does not; {remedy}")
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def _load(path):
    try:
        return tg.load(path)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); take another copy, or train anew") from None
