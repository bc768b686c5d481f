"""The settings of a training run: one flat dataclass, and how files, flags and earlier runs make up its values.

Names and defaults are nanoGPT's where it has them, so a run without any file is its GPT-2 124M run; the program reads
configs/default.toml when no file is named.
"""
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..model.config import GPTConfig
from .settings import read_toml, to_toml


@dataclass
class TrainConfig(GPTConfig):
    """Everything a training run depends on: the model's fields, then these. Raises UserError for impossible values."""

    vocab_size: int = 0
    """Number of tokens the model knows; 0 = as many as the tokenizer has. A larger number pads (50304 for gpt2)."""

    data: str = "pydocs"
    """Text to learn: "pydocs" (English documentation that is on this machine), "shakespeare", a file, a folder of
    files, a folder made by scripts/prepare.py, which brings its own tokenizer and validation part, or a .jsonl file
    with {"text"}, {"prompt", "completion"} or {"messages"} on each line, where prompts are read but not learned."""
    tokenizer: str = "char"
    """"char", one of tiktoken's vocabularies ("gpt2", "cl100k_base", "o200k_base"), or a tokenizer.json."""
    val_fraction: float = 0.1
    """Share of the text, from its end, that is kept for validation."""
    out_dir: str = "out"
    """Folder the run is written to: config.toml, tokenizer.json, model.safetensors (best), last/, metrics.jsonl."""
    overwrite: bool = False
    """Delete the run that out_dir already holds; without it such a folder is refused."""
    init_from: str = "scratch"
    """"scratch", or what to start from (fine-tuning), with its weights, tokenizer and shape: the folder of a finished
    run, a Hugging Face folder, or a .gguf file."""
    resume: str = ""
    """Folder of a run to continue exactly where it was saved; "auto" = out_dir if it holds one, else a new run."""

    device: str = "cpu"
    """"cpu", "cuda" or "cuda:N"."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Type of weights and arithmetic. bfloat16, float16: weights stay float32, matrix products are computed from 16
    bits; with float16 the loss is scaled, so that small gradients survive."""
    seed: int = 1337
    """Seed of initial weights, batches and dropout."""

    batch_size: int = 12
    """Sequences per forward pass; one step sees batch_size x block_size x gradient_accumulation_steps tokens."""
    sequence_length: int = 0
    """Tokens per sequence in training and evaluation, where the model could read more; 0, or more than block_size =
    block_size."""
    gradient_accumulation_steps: int = 40
    """Forward and backward passes per optimizer step; their gradients are averaged. The processes of `mpiexec -n N`
    share them out: a multiple of N."""
    activation_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again in backward: less memory, about a third more time,
    the same result."""
    cuda_graph: bool = False
    """Record a whole step on the GPU and launch it at once: for small batches, where Python takes longer than the GPU.
    For one process, with adamw, without dropout, in float32 or bfloat16, on a text."""
    max_iters: int = 600000
    """Optimizer steps in all."""

    eval_interval: int = 2000
    """Steps between evaluations (and checkpoints)."""
    eval_iters: int = 200
    """Random batches of the validation text per evaluation, the same each time; 0 = the whole text, in order. Of
    examples the first so many batches; 0 = all."""
    eval_only: bool = False
    """Evaluate once and stop; nothing is written."""
    always_save_checkpoint: bool = True
    """Save last/ at every evaluation; if false, only when the validation loss improves and at the end."""
    patience: int = 0
    """Stop after this many evaluations without a better validation loss; 0 = never."""
    log_interval: int = 1
    """Steps between lines of metrics.jsonl (and of the console where it is not a terminal)."""

    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    """"adamw"; "muon" for the matrices inside the blocks with AdamW for the rest; "sgd" with momentum beta1."""
    learning_rate: float = 6e-4
    """Highest learning rate, reached after the warm-up."""
    weight_decay: float = 0.1
    """Decoupled decay of parameters with two or more dimensions."""
    beta1: float = 0.9
    """Decay rate of the gradient's running mean."""
    beta2: float = 0.95
    """Decay rate of the squared gradient's running mean."""
    grad_clip: float = 1.0
    """Largest global norm of the gradients, to which they are scaled down; 0 = no clipping."""

    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up: down to min_lr along a cosine or a line, constant, or "wsd": held, then down."""
    warmup_iters: int = 2000
    """Steps over which the learning rate rises linearly."""
    lr_decay_iters: int = -1
    """Step at which min_lr is reached; -1 = max_iters."""
    min_lr: float = 6e-5
    """Lowest learning rate."""

    lora_r: int = 0
    """Rank of the LoRA adapters to train in place of the weights of init_from, which stay as they are; 0 = train all
    weights."""
    lora_alpha: float = 8.0
    """What an adapter adds counts lora_alpha / lora_r times."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of an adapter."""
    lora_targets: str = "c_attn"
    """Layers to adapt: names or their ends with commas between ("q_proj,v_proj"), "all-linear", or "regex:" and an
    expression for whole names."""
    use_rslora: bool = False
    """Adapters count lora_alpha / sqrt(lora_r) times."""
    use_dora: bool = False
    """Adapters also learn the lengths of the weights' rows (DoRA): often a little better, slower."""
    base_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """How the frozen matrices under an adapter lie in memory on a CPU: 16-bit ones of a file stay as they are there."""
    lora_merge: bool = False
    """At the end, also write the model with the adapter in its weights, as a run folder: out_dir/merged."""

    sample_interval: int = 0
    """Steps between samples, shown and appended to samples.txt; 0 = none."""
    sample_tokens: int = 200
    """Tokens per sample."""
    sample_prompt: str = ""
    """Text that samples continue."""
    sample_temperature: float = 0.8
    """Temperature of samples: below 1 safer, above 1 wilder, 0 = the likeliest token always."""
    sample_top_k: int = 0
    """Choose among this many likeliest tokens; 0 = all."""

    def __post_init__(self):
        self.model_config(vocab_size=self.vocab_size or 1)  # checks the model's fields
        for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_iters", "eval_iters", "patience", "warmup_iters", "sample_interval", "sample_tokens",
                     "sequence_length", "sample_top_k", "learning_rate", "min_lr", "weight_decay", "grad_clip",
                     "sample_temperature"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("beta1", "beta2"):
            _require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        if self.cuda_graph:
            none = "0: a graph would draw the same numbers again"
            for name, fits, wanted in (
                ("device", not self.device.startswith("cpu"), "cuda"),
                ("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
                ("dropout", not self.dropout, none),
                ("lora_dropout", not (self.lora_r and self.lora_dropout), none),
                ("optimizer", self.optimizer == "adamw", "adamw"),
            ):
                _require(self, name, fits, f"{wanted}, or leave cuda_graph out")
        _require(self, "val_fraction", 0 < self.val_fraction < 1, "between 0 and 1")
        _require(self, "lora_r", self.lora_r >= 0, "0 or more")
        if self.lora_r and self.init_from == "scratch":
            raise UserError("LoRA trains additions to a model that is there: name it with --init_from, or leave "
                            "lora_r out")
        if self.base_dtype != "float32" and (not self.lora_r or self.device != "cpu" or self.dtype == "float64"):
            raise UserError(f"base_dtype = {self.base_dtype} is for the frozen weights under an adapter on a CPU: give "
                            "lora_r, device cpu and dtype float32 or bfloat16, or leave base_dtype out")

    def model_config(self, vocab_size):
        """The GPTConfig of this run for a tokenizer of `vocab_size` tokens."""
        if self.vocab_size and self.vocab_size < vocab_size:
            raise UserError(f"vocab_size = {self.vocab_size} is less than the tokenizer's {vocab_size} tokens; "
                            "leave it at 0 to take the tokenizer's")
        values = {field.name: getattr(self, field.name) for field in fields(GPTConfig)}
        return GPTConfig(**values | {"vocab_size": self.vocab_size or vocab_size})

    @property
    def tokens_per_step(self):
        return self.batch_size * self.window * self.gradient_accumulation_steps

    @property
    def window(self):
        """Tokens per sequence, with the default filled in."""
        return min(self.sequence_length or self.block_size, self.block_size)


def _require(config, name, holds, range_):
    if not holds:
        raise UserError(f"{name} = {getattr(config, name)}: must be {range_}")


def run_folder(path):
    """The run folder meant by `path`: itself, or its parent where `path` is the run's last/ folder."""
    path = Path(path)
    return path.parent if path.name == "last" and not (path / "last").exists() else path


def resolve(explicit, fallback=None, shape_of=None):
    """The TrainConfig for the values given by files and flags, `explicit`, over those of `fallback`.

    A run to resume brings its own values, which stand in the place of `fallback`; what to start from (`init_from`)
    brings the shape of its model: `shape_of(init_from)` is a dict with it, by default a run's. Raises UserError.
    """
    fallback = fallback or {}
    values = fallback | explicit
    resume, init_from = values.get("resume", ""), values.get("init_from", "scratch")
    if resume == "auto":
        folder = Path(values.get("out_dir", TrainConfig.out_dir))
        resume = str(folder) if (folder / "last").exists() or (folder / "last.old").exists() else ""
    if resume:
        run = run_folder(resume)
        values = read_run(run) | {"out_dir": str(run)} | explicit
        resume = str(run)
    elif init_from != "scratch":
        shape = {field.name for field in fields(GPTConfig)}
        brought = (shape_of or read_run)(init_from)
        values = fallback | {name: value for name, value in brought.items() if name in shape} | explicit
        if values.get("lora_r") and Path(init_from).exists():  # wherever one stands when the adapter is used
            values["init_from"] = str(Path(init_from).resolve())
    return TrainConfig(**values | {"resume": resume})


def run_toml(config):
    """The config.toml of a run: all values but those that only say how it was called this time."""
    return to_toml(replace(config, resume="", overwrite=False, eval_only=False))


def read_run(folder):
    """The values in the config.toml of a run folder."""
    path = Path(folder) / "config.toml"
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder, it has no config.toml; a run is made by scripts/train.py")
    return read_toml(path, TrainConfig)
