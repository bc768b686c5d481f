"""Parameter: a Tensor that a Module counts as its own, to be trained."""

from ..tensor import Tensor


class Parameter(Tensor):
    """`Parameter(data, requires_grad=True)`: a leaf that shares the memory of `data` (a Tensor; anything else is
    copied)."""

    def __init__(self, data, requires_grad=True):
        data = data if isinstance(data, Tensor) else Tensor(data)
        self.array, self.device, self._version = data.array.view(), data.device, data.version()
        self.requires_grad_(requires_grad)


def drop_grad(parameter):
    """Set the gradient to None. Where it lives in a buffer lent to the engine, the buffer is taken back: somebody may
    still hold the gradient, and the next one must not overwrite it."""
    grad = parameter.grad
    if grad is not None:
        if grad.array is parameter._grad_buffer:
            parameter._grad_buffer = None
        parameter.grad = None


def zero_grad(parameter):
    """Fill the gradient, where there is one, with zeros."""
    grad = parameter.grad
    if grad is not None:
        grad.array.fill(0)
        grad._bump()
