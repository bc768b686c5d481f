"""Switches for recording, per thread, as context managers and decorators."""

from contextlib import ContextDecorator

from .engine import modes


class _Switch(ContextDecorator):
    """Sets the thread's recording mode inside `with` (or a decorated function), nested to any depth."""

    grad = inference = None

    def __init__(self):
        self._before = []

    def _recreate_cm(self):
        return self.__class__()  # a decorated function may run in several threads at once

    def __enter__(self):
        self._before.append((modes.grad, modes.inference))
        modes.grad = self.grad
        if self.inference is not None:
            modes.inference = self.inference
        return self

    def __exit__(self, *error):
        modes.grad, modes.inference = self._before.pop()


class no_grad(_Switch):
    """Nothing inside is recorded."""

    grad = False


class enable_grad(_Switch):
    """Recorded again inside no_grad."""

    grad = True


class inference_mode(_Switch):
    """no_grad whose results may never enter a graph later: an error instead of a silent surprise."""

    grad, inference = False, True


class set_grad_enabled(_Switch):
    """Record or not, by a flag; acts at once, and as a context manager restores what was before."""

    def __init__(self, mode):
        self.grad = mode
        self._before = []
        self._outer = modes.grad
        modes.grad = mode

    def __call__(self, function):
        modes.grad = self._outer  # as a decorator it acts inside the function only
        return super().__call__(function)

    def _recreate_cm(self):
        return set_grad_enabled(self.grad)

    def __enter__(self):
        self._before.append((self._outer, modes.inference))
        modes.grad = self.grad
        return self


def is_grad_enabled():
    return modes.grad


def is_inference_mode_enabled():
    return modes.inference
