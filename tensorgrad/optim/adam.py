"""Adam and AdamW."""

from ..kernels import routines
from ..kernels.reference_update import adamw_block, is_one
from .optimizer import Optimizer


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
        adamw_block(
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

    def _update_run(self, group, buffer, first, last, step, grad_scale):
        update_adamw(buffer, first, last, step, group, group["eps"], grad_scale)

    def _update_run_unless(self, found_inf, group, buffer, first, last, step, grad_scale):
        update_adamw(buffer, first, last, step, group, group["eps"], grad_scale, found_inf)


def update_adamw(buffer, first, last, step, group, eps, grad_scale, found_inf=None):
    """One AdamW step of the parameters first..last-1 of a flat buffer, in one routine, which scales the gradients on
    the way: clipping costs no pass over them. `found_inf` (on a GPU): see Optimizer.step."""
    extra = {} if is_one(grad_scale) else {"grad_scale": grad_scale}
    if found_inf is not None:
        extra["found_inf"] = found_inf
    if getattr(routines(buffer.device), "WRITES_SHADOWS", False) and (shadow := buffer.shadow(first, last)) is not None:
        extra["shadow"] = shadow
    routines(buffer.device).adamw(
        buffer.device.xp,
        *buffer.run(first, last),
        lr=group["lr"],
        betas=group["betas"],
        eps=eps,
        weight_decay=group["weight_decay"],
        step=step,
        **extra,
    )
    if "shadow" in extra:
        buffer.keep_shadow(first, last)
