"""A whole training run: data, model, trainer, run folder, and what is said at its beginning and end."""
import shlex
from pathlib import Path

import tensorgrad as tg

from ..errors import UserError
from ..model.gpt import GPT
from ..text import load_tokenizer, open_dataset, prepare
from ..text.token_files import META
from .callbacks import Checkpoints, EarlyStopping, Samples
from .checkpoints import METRICS, WEIGHTS, delete_run, last_folder, load_last, load_weights, refuse_taken, start_run
from .logs import Console, LossPlot, MetricsFile
from .settings import differences
from .trainer import Interrupted, Trainer


def train(config, say=print):
    """Train as `config`, a resolved TrainConfig, says, into `config.out_dir`. Returns the Trainer.

    `say` prints a text. Raises UserError for what the user can mend, and Interrupted after Ctrl-C.
    """
    folder = Path(config.out_dir)
    if not config.eval_only:
        refuse_taken(folder, config)
    trainer = make_trainer(config, say)
    if config.eval_only:
        trainer.evaluate()
        return trainer
    if not config.resume:
        delete_run(folder)
    start_run(folder, config, trainer.dataset.tokenizer)
    trainer.callbacks += run_callbacks(folder, config)
    name = shlex.quote(str(folder))
    try:
        trainer.fit()
    except Interrupted as interrupt:
        raise Interrupted(f"{interrupt}, saved in {folder / 'last'}; "
                          f"go on with: python scripts/train.py --resume {name}") from None
    say(f"best val loss {trainer.best_val_loss:.4f} at iteration {trainer.best_iteration}, in {folder / WEIGHTS}\n"
        f"sample from it: python scripts/sample.py --init_from {name}")
    return trainer


def make_trainer(config, say):
    """The Trainer of a run: new, from the weights of a run (`init_from`), or continued (`resume`)."""
    source = None if config.init_from == "scratch" else config.init_from
    if config.resume:
        source = last_folder(config.resume)
    dataset = load_dataset(config, load_tokenizer(source) if source else None)
    tg.manual_seed(config.seed)
    model = GPT(config.model_config(dataset.tokenizer.vocab_size)).to(getattr(tg, config.dtype))
    trainer = Trainer(model, config, dataset, [Console()])
    if config.resume:
        state = load_last(config.resume, model)
        trainer.load_state_dict(state)
    elif source:
        load_weights(model, source)
    describe(trainer, say)
    if config.resume and state["tokens"] != [len(dataset.train), len(dataset.val)]:
        say("note       the text is not the one this run began with")
    return trainer


def load_dataset(config, tokenizer=None):
    """The tokens of `config.data`: a folder made by scripts/prepare.py, or a text, whose tokens are then kept in the
    cache. `tokenizer` is the one that the model needs, None for a new one."""
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
    passes = steps * config.tokens_per_step / len(dataset.train)
    changed = "  ".join(f"{name}={value}" for name, value in differences(config).items())
    say(f"model      {trainer.model.num_params(non_embedding=False):,} parameters, {config.dtype} on {config.device}\n"
        f"text       {meta['text']}: {meta['description']}; {meta['text_bytes']:,} bytes, "
        f"sha256 {meta['text_sha256'][:12]}\n"
        f"tokens     {len(dataset.train):,} to train on, {len(dataset.val):,} for validation; "
        f"{dataset.tokenizer.name} vocabulary of {dataset.tokenizer.vocab_size:,}\n"
        f"steps      {steps:,} of {config.tokens_per_step:,} tokens: {passes:.2f} times the training text\n"
        f"settings   that are not the default: {changed}\n"
        f"writes to  {'nothing' if config.eval_only else config.out_dir}")
