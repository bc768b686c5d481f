"""Switches for recording, per thread, as context managers and decorators."""

from contextlib import ContextDecorator
from functools import wraps
from inspect import isgeneratorfunction

from .engine import modes


class _Switch(ContextDecorator):
    """Sets the thread's recording mode inside `with` (or a decorated function: `@no_grad()` or `@no_grad`), nested to
    any depth. In a decorated generator it holds while the generator's own code runs, not between its values."""

    grad = inference = None

    def __new__(cls, function=None, **options):
        switch = super().__new__(cls)
        return cls()(function) if callable(function) else switch

    def __init__(self):
        self._before = []

    def _recreate_cm(self):
        return self.__class__()  # a decorated function may run in several threads at once

    def __call__(self, function):
        if not isgeneratorfunction(function):
            return super().__call__(function)

        @wraps(function)
        def run(*args, **kwargs):
            generator = function(*args, **kwargs)
            resume, value = generator.send, None
            while True:
                try:
                    with self._recreate_cm():
                        value = resume(value)
                except StopIteration as end:
                    return end.value
                try:
                    resume, value = generator.send, (yield value)
                except GeneratorExit:
                    generator.close()
                    raise
                except BaseException as error:  # thrown in by the caller: the generator's business
                    resume, value = generator.throw, error

        return run

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
    """no_grad whose results may never enter a graph later: an error instead of a silent surprise. With mode=False
    recording is on inside, whatever holds outside."""

    def __init__(self, mode=True):
        super().__init__()
        self.grad, self.inference = not mode, mode

    def _recreate_cm(self):
        return inference_mode(self.inference)


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
