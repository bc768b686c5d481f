"""Stochastic gradient descent."""

from .optimizer import Optimizer


class SGD(Optimizer):
    """p -= lr * b with b = momentum * b + (1 - dampening) * g (Nesterov: p -= lr * (g + momentum * b)); `weight_decay`
    is added to the gradient as weight_decay * p. The first b is g, undampened, as in PyTorch."""

    def __init__(self, params, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
            },
        )

    def _check(self, group):
        super()._check(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("SGD: nesterov needs a momentum above 0 and no dampening")

    def _state_names(self, group):
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, group, step, xp, p, grad, *arrays):
        *state, delta, scratch = arrays
        momentum = group["momentum"]
        delta[...] = grad
        if group["weight_decay"]:
            xp.multiply(p, group["weight_decay"], out=scratch)
            delta += scratch
        if momentum:
            (buffer,) = state
            share = 1 - group["dampening"]
            if not isinstance(step, int):  # a device's number, at which one must not look; buffers begin with zeros
                share = xp.where(step == 1, 1.0, share)
            if isinstance(step, int) and step == 1:
                buffer[...] = delta
            else:
                buffer *= momentum
                xp.multiply(delta, share, out=scratch)
                buffer += scratch
            if group["nesterov"]:
                xp.multiply(buffer, momentum, out=scratch)
                delta += scratch
            else:
                delta[...] = buffer
        delta *= group["lr"]
        p -= delta
