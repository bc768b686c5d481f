"""Training: settings, the loop, evaluation, checkpoints, logs.

    config = TrainConfig(data="my_book.txt", n_layer=4, n_head=4, n_embd=128, block_size=128, max_iters=1000, ...)
    train(config)                                                # what scripts/train.py does
    trainer = Trainer(model, config, dataset, callbacks=[...])   # or its parts: trainer.fit()
    model, tokenizer, config = load_run("out")
"""
from .callbacks import Callback, Checkpoints, EarlyStopping, Samples
from .checkpoints import load_run
from .config import TrainConfig
from .evaluation import Evaluation, evaluate, validation_batches
from .logs import Console, LossPlot, MetricsFile, read_metrics
from .run import train
from .sampling import write_text
from .trainer import Interrupted, Trainer

__all__ = ["Callback", "Checkpoints", "Console", "EarlyStopping", "Evaluation", "Interrupted", "LossPlot",
           "MetricsFile", "Samples", "TrainConfig", "Trainer", "evaluate", "load_run", "read_metrics", "train",
           "validation_batches", "write_text"]
