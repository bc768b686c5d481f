"""A whole training run: data, model, trainer, run folder, and what is said at its beginning and end."""
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import tensorgrad as tg

from ..errors import UserError
from ..model.gpt import GPT
from ..model.lora import merge_and_unload
from ..text import load_tokenizer, open_dataset, prepare
from ..text.finetune import Examples, is_examples, load_examples
from ..text.token_files import META
from .callbacks import Checkpoints, EarlyStopping, Samples
from .checkpoints import (
    METRICS,
    adapted_base,
    delete_run,
    find_weights,
    holds_weights,
    last_folder,
    load_last,
    load_run,
    load_weights,
    put_weights,
    refuse_taken,
    save_best,
    start_run,
    weights_of,
)
from .logs import Console, LossPlot, MetricsFile
from .lora import MERGED, merged_config
from .precision import weights_dtype
from .settings import differences
from .trainer import Interrupted, Trainer


def train(config, say=print, open_base=load_run, callbacks=()):
    """Train as `config`, a resolved TrainConfig, says, into `config.out_dir`. Returns the Trainer.

    `say` prints a text; `open_base(init_from)` gives a tuple that begins with model and tokenizer; `callbacks` are
    further ones. Raises UserError for what the user can mend, and Interrupted after Ctrl-C. Of the processes of
    `mpiexec -n N` the first one speaks, writes and samples.
    """
    folder, world = Path(config.out_dir), tg.distributed.world()
    first = world.rank == 0
    say = say if first else (lambda text: None)
    with world.in_turn():  # the first one downloads and prepares
        if not config.eval_only:
            refuse_taken(folder, config)
        trainer = make_trainer(on_own_device(config, world), say, open_base)
    if config.eval_only:
        trainer.evaluate()
        return trainer
    if first:
        if not config.resume:
            delete_run(folder)
        start_run(folder, config, trainer.dataset.tokenizer)
    trainer.callbacks += [*run_callbacks(folder, config), *callbacks]
    name = shlex.quote(str(folder))
    try:
        trainer.fit()
    except Interrupted as interrupt:
        raise Interrupted(f"{interrupt}, saved in {folder / 'last'}; "
                          f"go on with: python scripts/train.py --resume {name}") from None
    say(f"best val loss {trainer.best_val_loss:.4f} at iteration {trainer.best_iteration}, in {find_weights(folder)}\n"
        f"sample from it: python scripts/sample.py --init_from {name}")
    if config.lora_merge and first:
        write_merged(folder, trainer)
        say(f"merged     {folder / MERGED}: the model with the adapter in its weights")
    return trainer


def on_own_device(config, world):
    """`config`, with the GPU of this process where several processes train on GPUs: that of its number on its
    machine."""
    if world.size == 1 or config.device == "cpu":
        return config
    if config.device != "cuda":
        raise UserError(f"device = {config.device}: of several processes each takes its own GPU with --device cuda")
    return replace(config, device=f"cuda:{world.local_rank}") if world.local_rank else config


def write_merged(folder, trainer):
    """Write the best model of a run that trained an adapter as a run folder of plain weights; the trainer's model
    becomes that model."""
    model = trainer.model
    load_weights(model, folder)
    merge_and_unload(model)
    start_run(folder / MERGED, merged_config(trainer.config, model, folder), trainer.dataset.tokenizer)
    save_best(folder / MERGED, model, iter=trainer.best_iteration, val_loss=trainer.best_val_loss)


def make_trainer(config, say, open_base=load_run):
    """The Trainer of a run: new, from the weights of a model (`init_from`), or continued (`resume`)."""
    tg.manual_seed(config.seed)
    if config.lora_r:
        packed = {} if config.base_dtype == "float32" else {"dtype": config.base_dtype}
        model, tokenizer, report = adapted_base(config, partial(open_base, **packed))
        dataset = load_dataset(config, tokenizer)
    else:
        report, (model, dataset) = None, _whole_model(config, open_base)
    trainer = Trainer(model, config, dataset, [Console()])
    if config.resume:
        state = load_last(config.resume, model)
        trainer.load_state_dict(state)
    describe(trainer, say)
    if report:
        say(f"adapter    {report}")
    if config.resume and state["tokens"] != [len(dataset.train), len(dataset.val)]:
        say("note       the text is not the one this run began with")
    return trainer


def _whole_model(config, open_base):
    """(model, dataset) of a run that trains all weights; those of a run to resume are not loaded yet."""
    source = None if config.init_from == "scratch" else config.init_from
    plain = config.resume or not source or holds_weights(source)  # ours, and no adapter of another model
    if plain:
        if config.resume:
            source = last_folder(config.resume)
        tokenizer = load_tokenizer(source) if source else None
    else:
        base, tokenizer, *_ = open_base(source)
    dataset = load_dataset(config, tokenizer)
    tg.manual_seed(config.seed)
    model = GPT(config.model_config(dataset.tokenizer.vocab_size)).to(weights_dtype(config.dtype))
    if not plain:
        weights = weights_of(merge_and_unload(base))
        positions = weights.get("transformer.wpe.weight")
        if positions is not None:
            weights["transformer.wpe.weight"] = positions[:config.block_size]  # shorter texts than it could read
        put_weights(model, weights, source)
    elif source and not config.resume:
        load_weights(model, source)
    return model, dataset


def load_dataset(config, tokenizer=None):
    """The tokens of `config.data`: a folder made by scripts/prepare.py, a JSONL file of examples, or a text, whose
    tokens are then kept in the cache. `tokenizer` is the one that the model needs, None for a new one."""
    if is_examples(config.data):
        if tokenizer is None:
            raise UserError(f"{config.data} holds examples to fine-tune on: say with --init_from which model")
        return load_examples(config.data, tokenizer, config.window, config.val_fraction)
    if not (Path(config.data) / META).is_file():
        return prepare(config.data, tokenizer or config.tokenizer, val_fraction=config.val_fraction)
    dataset = open_dataset(config.data)
    if tokenizer and tokenizer.fingerprint() != dataset.tokenizer.fingerprint():
        raise UserError(f"{config.data} was prepared with another tokenizer than the model's; prepare it again with "
                        "the tokenizer.json of the run, or give the text itself")
    return dataset


def run_callbacks(folder, config):
    """The callbacks that keep a run folder. The metrics come first, so a checkpoint never knows more than they do;
    samples come last, as they can be interrupted."""
    metrics = MetricsFile(folder / METRICS)
    callbacks = [metrics, Checkpoints(folder), LossPlot(metrics.path, folder / "loss.png")]
    if config.patience:
        callbacks.append(EarlyStopping(config.patience))
    if config.sample_interval:
        callbacks.append(Samples(folder / "samples.txt"))
    return callbacks


def describe(trainer, say):
    """Say what is about to be trained, on what, and where it goes."""
    config, dataset, meta = trainer.config, trainer.dataset, trainer.dataset.meta
    steps = max(0, config.max_iters - trainer.iteration)
    if isinstance(dataset.train, Examples):
        per_step, unit = config.batch_size * config.gradient_accumulation_steps, "examples"
    else:
        per_step, unit = config.tokens_per_step, "tokens"
    passes = steps * per_step / len(dataset.train)
    changed = "  ".join(f"{name}={value}" for name, value in differences(config).items())
    world = trainer.world
    if world.size > 1:
        plural = "s" if world.threads > 1 else ""
        say(f"processes  {world.size}, each with {world.threads} thread{plural} and a share of every step's batches")
    say(f"model      {trainer.model.num_params(non_embedding=False):,} parameters, {config.dtype} on {config.device}\n"
        f"text       {meta['text']}: {meta['description']}; {meta['text_bytes']:,} bytes, "
        f"sha256 {meta['text_sha256'][:12]}\n"
        f"{unit:10} {len(dataset.train):,} to train on, {len(dataset.val):,} for validation; "
        f"{dataset.tokenizer.name} vocabulary of {dataset.tokenizer.vocab_size:,}\n"
        f"steps      {steps:,} of {per_step:,} {unit}: {passes:.2f} times the training text\n"
        f"settings   that are not the default: {changed}\n"
        f"writes to  {'nothing' if config.eval_only else config.out_dir}")
