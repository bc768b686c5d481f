"""A whole training run: data, model, trainer, run folder, and what is said at its beginning and end."""
import shlex
from pathlib import Path

import tensorgrad as tg

from ..errors import UserError
from ..model.gpt import GPT
from ..text import load_text, load_tokenizer, prepare
from .callbacks import Checkpoints, EarlyStopping, Samples
from .checkpoints import WEIGHTS, delete_run, last_folder, load_last, load_weights, refuse_taken, start_run
from .logs import Console, LossPlot, MetricsFile
from .settings import differences
from .trainer import Interrupted, Trainer


def train(config, say=print):
    """Train as `config`, a resolved TrainConfig, says, into `config.out_dir`. Returns the Trainer.

    `say` prints a line. Raises UserError for what the user can mend, and Interrupted after Ctrl-C.
    """
    folder = Path(config.out_dir)
    if not config.eval_only:
        refuse_taken(folder, config)
    source = last_folder(config.resume) if config.resume else None if config.init_from == "scratch" else config.init_from
    corpus = load_text(config.data)
    dataset = prepare(corpus, load_tokenizer(source) if source else config.tokenizer, val_fraction=config.val_fraction)
    tg.manual_seed(config.seed)
    model = GPT(config.model_config(dataset.tokenizer.vocab_size)).to(getattr(tg, config.dtype))

    trainer = Trainer(model, config, dataset, [Console()])
    if config.resume:
        trainer.load_state_dict(load_last(config.resume, model))
    elif source:
        load_weights(model, source)
    describe(trainer, corpus, say)
    if config.eval_only:
        trainer.evaluate()
        return trainer

    if not config.resume:
        delete_run(folder)
    start_run(folder, config, dataset.tokenizer)
    trainer.callbacks += callbacks(folder, config)
    resume = f"python scripts/train.py --resume {shlex.quote(str(folder))}"
    try:
        trainer.fit()
    except Interrupted as interrupt:
        raise Interrupted(f"{interrupt}, saved in {folder / 'last'}; go on with: {resume}") from None
    say(f"best val loss {trainer.best_val_loss:.4f} at iteration {trainer.best_iteration}, in {folder / WEIGHTS}\n"
        f"sample from it: python scripts/sample.py --init_from {shlex.quote(str(folder))}")
    return trainer


def callbacks(folder, config):
    """The callbacks that keep a run folder. The metrics come first, so a checkpoint never knows more than they do;
    samples come last, as they can be interrupted."""
    metrics = MetricsFile(folder / "metrics.jsonl")
    chosen = [metrics, Checkpoints(folder), LossPlot(metrics.path, folder / "loss.png")]
    if config.patience:
        chosen.append(EarlyStopping(config.patience))
    if config.sample_interval:
        chosen.append(Samples(folder / "samples.txt"))
    return chosen


def describe(trainer, corpus, say):
    """Say what is about to be trained, on what, and where it goes."""
    config, dataset = trainer.config, trainer.dataset
    steps = config.max_iters - trainer.iteration
    passes = steps * config.tokens_per_step / len(dataset.train)
    changed = "  ".join(f"{name}={value}" for name, value in differences(config).items())
    say(f"model      {trainer.model.num_params(non_embedding=False):,} parameters, {config.dtype} on {config.device}\n"
        f"text       {corpus.name}: {corpus.description}; {corpus.size:,} bytes, sha256 {corpus.sha256[:12]}\n"
        f"tokens     {len(dataset.train):,} to train on, {len(dataset.val):,} for validation; "
        f"{dataset.tokenizer.name} vocabulary of {dataset.tokenizer.vocab_size:,}\n"
        f"steps      {steps:,} of {config.tokens_per_step:,} tokens: {passes:.2f} times the training text\n"
        f"settings   that are not the default: {changed}\n"
        f"writes to  {'nothing' if config.eval_only else config.out_dir}")
