"""Optimizer and learning-rate schedule of a TrainConfig."""
from tensorgrad.optim import SGD, get_schedule


def make_schedule(config):
    """The learning rate as a function of the iteration, 0, 1, 2, ..."""
    decay_iters = config.max_iters if config.lr_decay_iters < 0 else config.lr_decay_iters
    return get_schedule(config.schedule, learning_rate=config.learning_rate, min_lr=config.min_lr,
                        warmup_iters=config.warmup_iters, decay_iters=decay_iters)


def make_optimizer(model, config):
    """AdamW, Muon or SGD over all trainable parameters; tensors of two or more dimensions decay, vectors do not."""
    if config.optimizer != "sgd":
        return model.configure_optimizers(config.weight_decay, config.learning_rate, (config.beta1, config.beta2),
                                          optimizer=config.optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return SGD(groups, lr=config.learning_rate, momentum=config.beta1)
