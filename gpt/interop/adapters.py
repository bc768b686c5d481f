"""LoRA adapters by name, from the folders that a setting lists: "pirate=adapters/pirate, legal=out-legal"."""
from pathlib import Path

from ..errors import UserError
from ..model.lora import active_adapters, set_adapters
from ..training.checkpoints import PEFT_FOLDER
from .load import load_with_tokenizer
from .peft import load_peft


def adapter_folders(text):
    """{name: folder} of such a setting. Raises UserError for one that reads otherwise."""
    folders = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, folder = (part.strip() for part in entry.partition("="))
        if not (name and equals and folder) or name in folders:
            raise UserError(f"adapters: {entry!r} should read NAME=FOLDER, each name once")
        folders[name] = folder
    return folders


def add_adapters(model, folders):
    """Load {name: folder}, PEFT folders or runs that trained an adapter, onto `model`. Those that were active before
    are active afterwards, and no others."""
    own = active_adapters(model)
    for name, folder in folders.items():
        peft = Path(folder) / PEFT_FOLDER  # a run that trained an adapter keeps its best one there
        load_peft(model, peft if peft.is_dir() else folder, name)
    set_adapters(model, own)


def loader(adapters):
    """`load_with_tokenizer` for a model with the adapters that the setting lists, the first of them active."""
    folders = adapter_folders(adapters)
    if not folders:
        return load_with_tokenizer

    def load(path, device="cpu", dtype="float32"):
        model, *others = load_with_tokenizer(path, device, dtype)
        add_adapters(model, folders)
        set_adapters(model, [next(iter(folders))])
        return model.eval(), *others

    return load
