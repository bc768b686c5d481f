"""detect_anomaly: the first NaN, with the operation, the module and the line that made it."""

import traceback
from contextlib import ContextDecorator, ExitStack

import numpy as np

from ..engine import OpHook
from .hooks import Trace, module_paths, op_hook, where


class AnomalyError(RuntimeError):
    """A NaN appeared; the message names op, module path, creating line and both stacks."""


class detect_anomaly(ContextDecorator):
    """Inside, every operation remembers where it was created, and the first NaN that appears in a result of forward
    (from inputs without NaN) or in a gradient raises AnomalyError. Slow; for debugging. check_nan=False only
    remembers, so that other errors name the line."""

    def __init__(self, check_nan=True):
        self.check_nan, self._open = check_nan, []

    def __enter__(self):
        stack = ExitStack()
        stack.enter_context(module_paths())
        stack.enter_context(op_hook(_Tracer(self.check_nan)))
        self._open.append(stack)
        return self

    def __exit__(self, *error):
        self._open.pop().close()


class _Tracer(OpHook):
    def __init__(self, check_nan):
        self.check_nan = check_nan
        self.inside = 0  # backward of how many operations is running: what these compute is reported as theirs

    def before_forward(self, op, arrays):
        op.trace = Trace()

    def after_forward(self, op, arrays, outputs):
        if self.inside or not self.check_nan:
            return
        if any(map(_has_nan, arrays)) or not any(_has_nan(t.array) for t in outputs):
            return
        raise AnomalyError(
            f"forward of {where(op)} made a NaN from inputs without one: {_ranges(arrays)}\n"
            f"created at (most recent call last):\n{op.trace.stack()}"
        )

    def before_backward(self, op, gradients):
        self.inside += 1

    def after_backward(self, op, gradients, input_gradients):
        self.inside -= 1
        bad = [i for i, g in enumerate(input_gradients) if g is not None and _has_nan(g.array)]
        if not self.check_nan or not bad or any(g is not None and _has_nan(g.array) for g in gradients):
            return
        shapes = ", ".join(str(op.inputs[i][0]) for i in bad)
        forward = op.trace.stack() if op.trace else "  (created before detect_anomaly was entered)\n"
        raise AnomalyError(
            f"backward of {where(op)} made a NaN in the gradient of input {', '.join(map(str, bad))}: {shapes}\n"
            f"forward, created at (most recent call last):\n{forward}"
            f"backward, called from (most recent call last):\n{''.join(traceback.format_stack(limit=12)[:-1])}"
        )


def _has_nan(array):
    return array.dtype.kind not in "iub" and bool(
        np.isnan(array).any() if isinstance(array, np.ndarray) else (array != array).any()
    )


def _ranges(arrays):
    return "; ".join(f"{tuple(a.shape)} from {a.min()} to {a.max()}" if a.size else f"{tuple(a.shape)}" for a in arrays)
