"""Muon: momentum, orthogonalised; for the matrices of hidden layers.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon);
Liu et al. 2025, "Muon is scalable for LLM training" (arXiv 2502.16982) for the scale that shares AdamW's learning rate.
"""

import math

from ..kernels import routines
from .adam import update_adamw
from .optimizer import Optimizer

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STACK = 1 << 22  # elements of matrices of one shape that are worked on at once


def newton_schulz(device, matrix, coefficients=NS_COEFFICIENTS, steps=5, eps=1e-7):
    """New matrices near U V^T for U S V^T (float, (..., rows, columns)): with X = matrix / |matrix|, `steps` times

        A = X X^T,   X <- a X + (b A + c A A) X,

    a quintic applied to the singular values, which takes all but tiny ones to about 0.7 ... 1.2."""
    a, b, c = coefficients
    xp, matmul = device.xp, routines(device).matmul
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.swapaxes(-1, -2) if tall else matrix  # the Gram matrix of the shorter side is the smaller one
    x = x / xp.maximum(xp.sqrt((x * x).sum(axis=(-2, -1), keepdims=True)), eps)
    for _ in range(steps):
        gram = matmul(xp, x, x.swapaxes(-1, -2))
        polynomial = matmul(xp, gram, gram)
        polynomial *= c
        polynomial += b * gram
        update = matmul(xp, polynomial, x)
        x *= a
        x += update
    return x.swapaxes(-1, -2) if tall else x


class Muon(Optimizer):
    """p <- p * (1 - lr * weight_decay) - lr * scale * newton_schulz(u) for two-dimensional parameters, where
    b = momentum * b + (1 - momentum) * g and u = b, or momentum * b + (1 - momentum) * g with `nesterov`.

    `adjust_lr_fn`: "original" (or None): scale = sqrt(max(1, rows / columns)); "match_rms_adamw":
    scale = 0.2 * sqrt(max(rows, columns)), with which AdamW's lr and weight decay can be used.

    Groups with the flag `use_muon=False` (embeddings, heads, vectors) are updated by AdamW in the same optimizer:
    `Muon([{"params": matrices}, {"params": others, "use_muon": False, "lr": 3e-4}])`; their options are lr,
    weight_decay, betas (0.9, 0.95) and adamw_eps (1e-8)."""

    def __init__(
        self,
        params,
        lr=1e-3,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        ns_coefficients=NS_COEFFICIENTS,
        eps=1e-7,
        ns_steps=5,
        adjust_lr_fn=None,
        betas=(0.9, 0.95),
        adamw_eps=1e-8,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
                "betas": betas,
                "adamw_eps": adamw_eps,
                "use_muon": True,
            },
        )

    def _check(self, group):
        super()._check(group)
        if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"Muon: adjust_lr_fn is 'original' or 'match_rms_adamw', not {group['adjust_lr_fn']!r}")
        for p in group["params"] if group["use_muon"] else ():
            if p.ndim != 2:
                raise ValueError(
                    f"Muon takes matrices; give the parameter of shape {tuple(p.shape)} to a group with use_muon=False"
                )

    def _state_names(self, group):
        return ("momentum_buffer",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")

    def _update_run(self, group, buffer, first, last, step, grad_scale):
        if not group["use_muon"]:
            return update_adamw(buffer, first, last, step, group, group["adamw_eps"], grad_scale)
        buffer.scale_gradients(first, last, grad_scale)
        momentum, xp, alike = group["momentum"], buffer.device.xp, {}
        for _, grad, average, delta, _ in buffer.blocks(first, last):
            xp.subtract(grad, average, out=delta)
            delta *= 1 - momentum
            average += delta
        for i in range(first, last):
            alike.setdefault(buffer.params[i].array.shape, []).append(i)
        for (rows, columns), numbers in alike.items():
            together = max(1, _STACK // max(rows * columns, 1))
            for i in range(0, len(numbers), together):
                self._update_alike(group, buffer, numbers[i : i + together])

    def _update_alike(self, group, buffer, numbers):
        """Update matrices of one shape, with products of all of them at once."""
        lr, xp = group["lr"], buffer.device.xp
        average, grad = (
            xp.stack([buffer.view(flat, i) for i in numbers]) for flat in (buffer.state["momentum_buffer"], buffer.grad)
        )
        direction = grad + group["momentum"] * (average - grad) if group["nesterov"] else average
        updates = newton_schulz(buffer.device, direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = updates.shape[-2:]
        if group["adjust_lr_fn"] == "match_rms_adamw":
            scale = 0.2 * math.sqrt(max(rows, columns))
        else:
            scale = math.sqrt(max(1, rows / columns))
        updates *= lr * scale
        for i, update in zip(numbers, updates, strict=True):
            p = buffer.params[i].array
            p *= 1 - lr * group["weight_decay"]
            p -= update
