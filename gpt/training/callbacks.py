"""What may happen beside the training itself. Each callback does one thing; a Trainer calls them in their order."""
from pathlib import Path

import tensorgrad as tg

from . import checkpoints
from .files import append_text
from .sampling import write_text


class Callback:
    """The hooks of a Trainer; a subclass defines those it needs.

    A `record` is the dict that becomes a line of metrics.jsonl. `trainer.iteration` counts finished optimizer steps.
    """

    def on_start(self, trainer):
        """Before the first step, after any resume."""

    def on_step(self, trainer, record):
        """After each optimizer step; `record`: iter (the step's number, from 0), loss, lr, grad_norm, tokens_per_s."""

    def on_evaluation(self, trainer, record):
        """After each evaluation; `record`: iter, val_loss, val_ppl, val_bpb, val_probability."""

    def on_event(self, trainer, record):
        """When something out of the ordinary happened; `record`: iter, event (a word), message."""

    def on_sample(self, trainer, text):
        """After a text was sampled."""

    def on_stop(self, trainer):
        """Once, when training ends as planned, early or by an interruption: not when it fails."""

    def on_close(self, trainer):
        """The very last, however training ends."""


class Checkpoints(Callback):
    """Keeps the best weights and the latest training state in a run folder (see checkpoints.py).

    The latest state is written at every evaluation if `config.always_save_checkpoint`, else when the loss improved, and
    in any case when training stops.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.saved_at = None  # iteration of the latest state that was written

    def on_evaluation(self, trainer, record):
        best = trainer.best_iteration == trainer.iteration
        if best:
            checkpoints.save_best(self.folder, trainer.model, iter=trainer.iteration, val_loss=record["val_loss"])
        if best or trainer.config.always_save_checkpoint:
            self.save(trainer)

    def on_stop(self, trainer):
        if self.saved_at != trainer.iteration:
            self.save(trainer)

    def save(self, trainer):
        checkpoints.save_last(self.folder, trainer.model, trainer.config, trainer.dataset.tokenizer,
                              trainer.state_dict())
        self.saved_at = trainer.saved_at = trainer.iteration


class EarlyStopping(Callback):
    """Stops after `patience` evaluations in a row without a better validation loss."""

    def __init__(self, patience):
        self.patience = patience

    def on_evaluation(self, trainer, record):
        if trainer.evaluations_since_best >= self.patience:
            trainer.stop(f"no better validation loss in {self.patience} evaluations")


class Samples(Callback):
    """Writes a text every `config.sample_interval` steps. It does not touch the random numbers of the training."""

    def __init__(self, path):
        self.path = Path(path)

    def on_start(self, trainer):
        trainer.dataset.tokenizer.encode(trainer.config.sample_prompt)  # an impossible prompt is known at once

    def on_step(self, trainer, record):
        config = trainer.config
        if trainer.iteration % config.sample_interval:
            return
        with trainer.interruptible():
            state = tg.get_rng_state(config.device)
            try:
                text = write_text(trainer.model, trainer.dataset.tokenizer, config.sample_prompt, config.sample_tokens,
                                  config.sample_temperature, config.sample_top_k)
            finally:
                tg.set_rng_state(state, config.device)
        append_text(self.path, f"--- iteration {trainer.iteration}\n{text}\n")
        trainer.emit("on_sample", text)
