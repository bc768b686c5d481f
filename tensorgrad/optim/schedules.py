"""Learning rates as pure functions of the iteration `it` = 0, 1, 2, ...

All start with `warmup_iters` iterations of linear warm-up, lr = learning_rate * (it + 1) / (warmup_iters + 1), and
those that fall reach `min_lr` at iteration `decay_iters` and stay there. Set an optimizer's rate before each step:

    schedule = get_schedule("cosine", learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, decay_iters=2000)
    for group in optimizer.param_groups:
        group["lr"] = schedule(it)
"""

import math
from functools import partial
from inspect import signature


def constant(it, *, learning_rate, warmup_iters=0):
    """`learning_rate` after the warm-up."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    return learning_rate


def linear(it, *, learning_rate, min_lr=0.0, warmup_iters=0, decay_iters):
    """A straight line from `learning_rate` at the end of the warm-up to `min_lr` at `decay_iters`."""
    if it < warmup_iters:
        return constant(it, learning_rate=learning_rate, warmup_iters=warmup_iters)
    if it >= decay_iters:
        return min_lr
    return learning_rate - (learning_rate - min_lr) * (it - warmup_iters) / (decay_iters - warmup_iters)


def cosine(it, *, learning_rate, min_lr=0.0, warmup_iters=0, decay_iters):
    """Half a period of a cosine from `learning_rate` to `min_lr` (Loshchilov and Hutter 2017), as nanoGPT has it."""
    if it < warmup_iters:
        return constant(it, learning_rate=learning_rate, warmup_iters=warmup_iters)
    if it >= decay_iters:
        return min_lr
    progress = (it - warmup_iters) / (decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def wsd(it, *, learning_rate, min_lr=0.0, warmup_iters=0, decay_iters, decay_fraction=0.2):
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM): constant, then a straight line to `min_lr` over the last
    `decay_fraction` of the `decay_iters` iterations."""
    start = max(warmup_iters, round(decay_iters * (1 - decay_fraction)))
    if it < start:
        return constant(it, learning_rate=learning_rate, warmup_iters=warmup_iters)
    return linear(it, learning_rate=learning_rate, min_lr=min_lr, warmup_iters=start, decay_iters=decay_iters)


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd}


def get_schedule(name, *, learning_rate, min_lr=0.0, warmup_iters=0, decay_iters=0, decay_fraction=0.2):
    """The schedule `name` ("constant", "linear", "cosine", "wsd") as a function it -> rate; each takes of the options
    those that it knows."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; known are {', '.join(SCHEDULES)}")
    options = {
        "learning_rate": learning_rate,
        "min_lr": min_lr,
        "warmup_iters": warmup_iters,
        "decay_iters": decay_iters,
        "decay_fraction": decay_fraction,
    }
    known = signature(SCHEDULES[name]).parameters
    return partial(SCHEDULES[name], **{key: value for key, value in options.items() if key in known})
