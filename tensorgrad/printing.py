"""Tensors as text, laid out like PyTorch's: tensor([[1., 2.]], requires_grad=True)."""

import math

import numpy as np

PRECISION, THRESHOLD, EDGE, WIDTH = 4, 1000, 3, 80


def tensor_repr(t):
    array = t.device.to_numpy(t.array)
    name = "Parameter containing:\ntensor" if type(t).__name__ == "Parameter" else "tensor"
    suffix = []
    if t.device.type != "cpu":
        suffix.append(f"device='{t.device}'")
    if array.dtype.name not in ("float32", "int64", "bool"):
        suffix.append(f"dtype={array.dtype.name}")
    if array.size == 0:
        suffix = ([f"size={tuple(array.shape)}"] if array.ndim != 1 else []) + suffix
    if t.grad_fn is not None:
        suffix.append(f"grad_fn=<{t.grad_fn.name}>")
    elif t.requires_grad:
        suffix.append("requires_grad=True")
    body = "[]" if array.size == 0 else _body(array)
    tail = "".join(f", {s}" for s in suffix)
    return f"{name}({body}{tail})"


def _body(array):
    formatter = _formatter(_shown(array) if array.size > THRESHOLD else array)
    if array.ndim == 0:
        return formatter(array[()])
    text = np.array2string(
        array,
        separator=", ",
        prefix="tensor(",
        threshold=THRESHOLD,
        edgeitems=EDGE,
        max_line_width=WIDTH,
        formatter={"all": formatter},
    )
    return text.replace(", ...,", ",  ...,")  # as PyTorch spaces it


def _shown(array):
    """The elements that a summary prints."""
    for dim, n in enumerate(array.shape):
        if n > 2 * EDGE:
            array = np.take(array, [*range(EDGE), *range(n - EDGE, n)], axis=dim)
    return array


def _formatter(values):
    """A function that formats one element so that all have one width."""
    if values.dtype.kind == "b":
        width = max(len(str(bool(v))) for v in values.reshape(-1)) if values.ndim else 0
        return lambda v: f"{str(bool(v)):>{width}}"
    if values.dtype.kind in "iu":
        width = max(len(str(int(v))) for v in values.reshape(-1))
        return lambda v: f"{int(v):>{width}}"
    values = values.astype(np.float64)
    finite = values[np.isfinite(values) & (values != 0)]
    high, low = (float(np.abs(finite).max()), float(np.abs(finite).min())) if finite.size else (0.0, 0.0)
    whole = bool((finite == np.ceil(finite)).all())
    if finite.size and (high / low > 1000 or high > 1e8 or low < 1e-4):

        def text(v):
            return f"{v:.{PRECISION}e}" if math.isfinite(v) else str(v)
    elif whole:

        def text(v):
            return f"{v:.0f}." if math.isfinite(v) else str(v)
    else:

        def text(v):
            return f"{v:.{PRECISION}f}" if math.isfinite(v) else str(v)

    width = max((len(text(float(v))) for v in finite), default=2) if values.ndim else 0
    return lambda v: f"{text(float(v)):>{width}}"
