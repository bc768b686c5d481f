"""Adam and AdamW."""

import math

from .optimizer import Optimizer


def adamw_update(xp, p, grad, exp_avg, exp_avg_sq, scratch, *, lr, betas, eps, weight_decay, step):
    """One AdamW step on blocks of memory, in place: first p *= 1 - lr * weight_decay, then with m, v = the moving
    averages of grad and grad**2 and step = 1, 2, ...

        p -= lr * m / (1 - beta1**step) / (sqrt(v / (1 - beta2**step)) + eps)
    """
    beta1, beta2 = betas
    if weight_decay:
        p *= 1 - lr * weight_decay
    xp.subtract(grad, exp_avg, out=scratch)
    scratch *= 1 - beta1
    exp_avg += scratch
    exp_avg_sq *= beta2
    xp.multiply(grad, grad, out=scratch)
    scratch *= 1 - beta2
    exp_avg_sq += scratch
    xp.sqrt(exp_avg_sq, out=scratch)
    scratch /= math.sqrt(1 - beta2**step)
    scratch += eps
    xp.divide(exp_avg, scratch, out=scratch)
    scratch *= lr / (1 - beta1**step)
    p -= scratch


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015); `weight_decay` is added to the gradient as weight_decay * p (L2 regularisation)."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _state_names(self, group):
        return "exp_avg", "exp_avg_sq"

    def _update(self, group, step, xp, p, grad, exp_avg, exp_avg_sq, scratch, decayed):
        if group["weight_decay"]:
            xp.multiply(p, group["weight_decay"], out=decayed)
            decayed += grad
            grad = decayed
        adamw_update(
            xp,
            p,
            grad,
            exp_avg,
            exp_avg_sq,
            scratch,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=0.0,
            step=step,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): the decay shrinks the parameter directly and does
    not pass through the moving averages."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, lr, betas, eps, weight_decay)

    def _update(self, group, step, xp, p, grad, exp_avg, exp_avg_sq, scratch, _):
        adamw_update(
            xp,
            p,
            grad,
            exp_avg,
            exp_avg_sq,
            scratch,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
        )
