"""What all exports share: the weights as a published architecture has them."""
from dataclasses import replace

import numpy as np

from ..errors import UserError
from ..model.positions import sinusoidal_table
from ..training.checkpoints import weights_of
from .architectures import as_published
from .names import skeleton

DTYPES = {"float32": np.float32, "float16": np.float16}


def check_dtype(dtype):
    """Raise UserError for a type that is not written."""
    if dtype not in DTYPES:
        raise UserError(f"weights are written as {' or '.join(DTYPES)}, not as {dtype!r}")


def published(model, tokenizer=None):
    """(architecture, GPTConfig, {our name: float32 array}) of a model to be exported.

    Biases that the architecture has and the model has not are zero, positions are a table, a vocabulary that was padded
    beyond the tokenizer's is cropped. Raises UserError for a model that fits no architecture, and for one with LoRA
    adapters that are not merged."""
    config = model.config
    name, target = as_published(config)
    if tokenizer is not None and tokenizer.vocab_size < config.vocab_size:
        target = replace(target, vocab_size=tokenizer.vocab_size)
    own = {key: tensor.detach().cpu().float().numpy() for key, tensor in weights_of(model).items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in weights_of(skeleton(target)).items()}
    extra = next((key for key in own if key not in wanted), None)
    if extra is not None:
        raise UserError(f"the model has weights of its own ({extra}); merge its LoRA adapters before exporting it")
    weights = {}
    for key, shape in wanted.items():
        if key in own:
            weights[key] = own[key][:shape[0]]
        elif key == "transformer.wpe.weight" and config.position == "sinusoidal":
            weights[key] = sinusoidal_table(config.block_size, config.n_embd, np.dtype("float32"), "cpu").numpy()
        elif key == "transformer.wpe.weight" or key.endswith(".bias"):
            weights[key] = np.zeros(shape, np.float32)
        else:
            raise UserError(f"the model has no {key}; merge its LoRA adapters before exporting it")
    return name, target, weights
