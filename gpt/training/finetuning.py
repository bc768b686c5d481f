"""Fine-tuning: a model that is there, a text or examples of one's own, and what that did to the held-out part."""
import math
from pathlib import Path

from ..errors import UserError
from .checkpoints import METRICS, PEFT_FOLDER, load_run
from .config import resolve
from .logs import read_metrics
from .run import train


def finetune_config(explicit, fallback, shape_of=None):
    """The TrainConfig of a fine-tuning run: that of `resolve`. Raises UserError where no model is named."""
    values = fallback | explicit
    if not values.get("resume") and values.get("init_from", "scratch") == "scratch":
        raise UserError("fine-tuning starts from a model: name it with --init_from, a .gguf file, a Hugging Face "
                        "folder or a run; scripts/train.py trains one from nothing")
    return resolve(explicit, fallback, shape_of)


def finetune(config, say=print, open_base=load_run, callbacks=()):
    """`train`, then a word on held-out perplexity before and after, and on what to do with the result. Returns the
    Trainer; the best adapter, or the best weights, are what the run folder holds."""
    trainer = train(config, say, open_base, callbacks)
    if config.eval_only or trainer.world.rank:
        return trainer
    folder = Path(config.out_dir)
    losses = {r["iter"]: r["val_loss"] for r in read_metrics(folder / METRICS) if "val_loss" in r}
    before, after = losses[min(losses)], trainer.best_val_loss
    change = 1 - after / before if before else 0.0
    say(f"held out   perplexity {math.exp(before):.3f} before, {math.exp(after):.3f} after (loss {before:.4f} and "
        f"{after:.4f}, {change:.1%} lower)")
    if (folder / PEFT_FOLDER).is_dir():
        say(f"adapter    {folder / PEFT_FOLDER}: for PEFT; with its base model it is --init_from {folder} here")
    return trainer
