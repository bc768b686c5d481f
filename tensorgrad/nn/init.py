"""Initial values for parameters, written in place outside the graph; each function returns its tensor.

Fans, gains and bounds follow Glorot and Bengio 2010 (xavier), He et al. 2015 (kaiming), Saxe et al. 2014 (orthogonal).
The numbers come from the default generator of the tensor's device: `tg.manual_seed` repeats them.
"""

import math
from contextlib import contextmanager
from contextvars import ContextVar
from statistics import NormalDist

import numpy as np

from ..random import default_generator

_skipped = ContextVar("skipped", default=False)


@contextmanager
def skip_init():
    """Within it uniform_ and normal_ leave their tensor as it is: large models whose weights are about to be read are
    made at once, and take no memory before."""
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


def _fill(tensor, array):
    """Write `array` (NumPy, on the CPU) into the tensor in place."""
    tensor.array[...] = tensor.device.asarray(array.astype(tensor.dtype, copy=False))
    tensor._bump()
    return tensor


def _generator(tensor):
    return default_generator(tensor.device).numpy()


def _standard_normal(tensor, generator):
    return generator.standard_normal(tensor.shape, dtype="float64" if tensor.dtype == "float64" else "float32")


def uniform_(tensor, a=0.0, b=1.0):
    """Uniform in [a, b)."""
    if _skipped.get():
        return tensor
    draw = _generator(tensor).random(tensor.shape, dtype="float64" if tensor.dtype == "float64" else "float32")
    draw *= b - a
    draw += a
    return _fill(tensor, draw)


def normal_(tensor, mean=0.0, std=1.0):
    """N(mean, std**2)."""
    if _skipped.get():
        return tensor
    draw = _standard_normal(tensor, _generator(tensor))
    draw *= std
    draw += mean
    return _fill(tensor, draw)


def trunc_normal_(tensor, mean=0.0, std=1.0, a=-2.0, b=2.0):
    """N(mean, std**2) restricted to [a, b]: values outside are drawn again."""
    normal = NormalDist(mean, std)
    inside = normal.cdf(b) - normal.cdf(a)
    if inside < 1e-3:
        raise ValueError(
            f"trunc_normal_: only {inside:.2g} of N({mean}, {std}**2) lies in [{a}, {b}]; "
            "move the mean towards the interval or widen it"
        )
    generator = _generator(tensor)
    draw = _standard_normal(tensor, generator) * std + mean
    outside = (draw < a) | (draw > b)
    while count := int(outside.sum()):
        draw[outside] = generator.standard_normal(count) * std + mean
        outside = (draw < a) | (draw > b)
    return _fill(tensor, draw)


def constant_(tensor, val):
    """All elements `val`."""
    tensor.array.fill(val)
    tensor._bump()
    return tensor


def zeros_(tensor):
    """All elements 0."""
    return constant_(tensor, 0)


def ones_(tensor):
    """All elements 1."""
    return constant_(tensor, 1)


def calculate_gain(nonlinearity, param=None):
    """The factor by which weights must grow to make up for the nonlinearity that follows them; `param` is the negative
    slope of "leaky_relu" (0.01)."""
    if nonlinearity == "leaky_relu":
        return math.sqrt(2 / (1 + (0.01 if param is None else param) ** 2))
    gains = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 3 / 4}
    if nonlinearity not in gains:
        raise ValueError(
            f"calculate_gain: unknown nonlinearity {nonlinearity!r}; known are leaky_relu, " + ", ".join(gains)
        )
    return gains[nonlinearity]


def _fans(tensor):
    """(fan_in, fan_out): inputs and outputs per unit of a weight (out, in, *window)."""
    if tensor.ndim < 2:
        raise ValueError(f"a fan needs a tensor of at least two dimensions, not one of shape {tuple(tensor.shape)}")
    out_features, in_features, *window = tensor.shape
    return in_features * math.prod(window), out_features * math.prod(window)


def xavier_uniform_(tensor, gain=1.0):
    """Uniform in +-gain * sqrt(6 / (fan_in + fan_out))."""
    bound = gain * math.sqrt(6 / sum(_fans(tensor)))
    return uniform_(tensor, -bound, bound)


def xavier_normal_(tensor, gain=1.0):
    """N(0, gain**2 * 2 / (fan_in + fan_out))."""
    return normal_(tensor, 0.0, gain * math.sqrt(2 / sum(_fans(tensor))))


def _kaiming_std(tensor, a, mode, nonlinearity):
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode is 'fan_in' or 'fan_out', not {mode!r}")
    fan = _fans(tensor)[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(fan) if fan else 0.0


def kaiming_uniform_(tensor, a=0.0, mode="fan_in", nonlinearity="leaky_relu"):
    """Uniform in +-gain * sqrt(3 / fan)."""
    bound = math.sqrt(3) * _kaiming_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound)


def kaiming_normal_(tensor, a=0.0, mode="fan_in", nonlinearity="leaky_relu"):
    """N(0, gain**2 / fan)."""
    return normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity))


def orthogonal_(tensor, gain=1.0):
    """A random (semi-)orthogonal matrix times `gain`; dimensions after the first count as one."""
    if tensor.ndim < 2:
        raise ValueError(f"orthogonal_ needs at least two dimensions, not shape {tuple(tensor.shape)}")
    rows = tensor.shape[0]
    columns = tensor.numel() // rows if rows else 0
    draw = _generator(tensor).standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(draw)
    q *= np.sign(np.diag(r))  # makes the distribution uniform (Mezzadri 2007)
    if rows < columns:
        q = q.T
    return _fill(tensor, gain * q.reshape(tensor.shape))
