"""A training run that takes a fraction of a second, for the tests of the trainer and the command line."""
import os

import tensorgrad as tg
from gpt.model import GPT
from gpt.text import prepare
from gpt.training import TrainConfig, Trainer

TEXT = "".join(f"{a} and {b} make {a + b}; {b} less {a} is {b - a}.\n" for a in range(40) for b in range(a, 40, 3))

FIELDS = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "gradient_accumulation_steps": 1,
    "max_iters": 12, "eval_interval": 4, "eval_iters": 2, "learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 2,
    "log_interval": 1, "dropout": 0.1,
}


def tiny_config(folder, **changes):
    """A TrainConfig for the text file made in `folder`, which also holds the run (`out`)."""
    data = folder / "sums.txt"
    data.write_text(TEXT)
    return TrainConfig(**FIELDS | {"data": str(data), "out_dir": str(folder / "out")} | changes)


def tiny_trainer(config, callbacks=()):
    """A Trainer on the data of `config`, as scripts/train.py makes it."""
    dataset = prepare(config.data, config.tokenizer, val_fraction=config.val_fraction)
    tg.manual_seed(config.seed)
    model = GPT(config.model_config(dataset.tokenizer.vocab_size)).to(getattr(tg, config.dtype))
    return Trainer(model, config, dataset, callbacks)


def flags(fields):
    """{"max_iters": 5} as ["--max_iters=5"]."""
    return [f"--{name}={value}" for name, value in fields.items()]


def losses(records):
    """{iteration: loss} of the steps among metrics records."""
    return {record["iter"]: record["loss"] for record in records if "loss" in record}


def environment(folder):
    """Environment variables for a subprocess: its own cache, one thread."""
    return os.environ | {"TENSORGRAD_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
