"""What stands between the products of a transformer block, on arrays of NumPy and CuPy alike: gates, rotations, and
sums with what follows them. Names and conventions as in reference.py, which is one module with this."""

from .blocks import blockwise

__all__ = ["relu2", "relu2_backward", "rotary", "sigmoid", "swiglu", "swiglu_backward"]

# ---- SwiGLU (Shazeer 2020, arXiv:2002.05202), squared ReLU (So et al. 2021, arXiv:2109.08668) ------------------------


def sigmoid(xp, x):
    e = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1, e) / (1 + e)


def swiglu(xp, gate, value):
    """silu(gate) value, (n, width) each; their rows may lie apart, as halves of one product do."""
    y = gate * sigmoid(xp, gate)
    y *= value
    return y


def swiglu_backward(xp, gate, value, g, dgate, dvalue):
    """Writes the gradients into `dgate` and `dvalue`."""
    s = sigmoid(xp, gate)
    y = gate * s
    xp.multiply(g, y, out=dvalue)
    y *= 1 - s
    y += s
    y *= value
    xp.multiply(g, y, out=dgate)


def relu2(xp, x):
    return blockwise(lambda v: _relu2(xp, v), xp.empty(x.shape, x.dtype), x)


def _relu2(xp, x):
    y = xp.maximum(x, 0)
    y *= y
    return y


def relu2_backward(xp, x, g):
    return blockwise(lambda x, g: _relu2_backward(xp, x, g), xp.empty(x.shape, x.dtype), x, g)


def _relu2_backward(xp, x, g):
    dx = xp.maximum(x, 0)
    dx *= 2
    dx *= g
    return dx


# ---- rotary positions (Su et al. 2021, arXiv:2104.09864) -------------------------------------------------------------


def rotary(xp, x, cos, sin, adjoint):
    """x (..., T, d) turned: (low cos - high sin, high cos + low sin), where low and high are the halves of the last
    dimension and cos, sin (..., T, d) those of the tables. `adjoint`: the transposed map, which is the gradient's; for
    tables whose halves are equal it turns back by the same angle."""
    half = x.shape[-1] // 2
    low, high = x[..., :half], x[..., half:]
    y = x * cos
    if adjoint:
        y[..., :half] += high * sin[..., half:]
        y[..., half:] -= low * sin[..., :half]
    else:
        y[..., :half] -= high * sin[..., :half]
        y[..., half:] += low * sin[..., half:]
    return y.astype(x.dtype, copy=False)
