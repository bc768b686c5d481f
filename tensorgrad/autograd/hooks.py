"""The global op hook: everything that happens passes by here; profiler, tracer and drawer each fit on a page."""

import sys
import traceback
from contextlib import contextmanager

from .. import engine
from ..engine import OpHook, modes

__all__ = ["OpHook", "Trace", "op_hook", "where"]


@contextmanager
def op_hook(hook):
    """Let `hook` (an OpHook) see every operation inside the block, of all threads."""
    engine.hooks.append(hook)
    try:
        yield hook
    finally:
        engine.hooks.remove(hook)


@contextmanager
def module_paths():
    """Keep the path of the module whose forward is running in `modes.module_path`, for this thread."""
    before = modes.module_path
    if before is None:
        modes.module_path = []
    try:
        yield
    finally:
        modes.module_path = before


_OWN = __name__.rpartition(".")[0].rpartition(".")[0]  # "tensorgrad"


class Trace:
    """Where an operation was created: module path, user's line, and the stack for a report."""

    def __init__(self):
        self.module = ".".join(modes.module_path or ())
        frame = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == _OWN:
            frame = frame.f_back
        self._summary = traceback.extract_stack(frame, limit=12) if frame else []
        last = self._summary[-1] if self._summary else None
        self.line = f"{last.filename}:{last.lineno}" if last else "unknown line"

    def stack(self):
        return "".join(traceback.format_list(self._summary))


def where(op):
    """The module path and line of an op, as far as known."""
    trace = op.trace
    if trace is None:
        return op.name
    return f"{op.name}" + (f" in module {trace.module}" if trace.module else "") + f", created at {trace.line}"
