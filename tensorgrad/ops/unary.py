"""Functions of one variable: exponentials, roots, trigonometry, rounding."""

import math

from .. import dtypes
from ..engine import Op, apply
from ..errors import OpTypeError
from ..kernels.erf import erf as erf_array
from .common import cast, quiet, to_float, zero_like

# `unary(name, forward, backward, saves)`: forward(xp, x), backward(g, saved), where `saves` is "x", "y" or nothing.


def unary(name, forward, backward=None, saves=""):
    """An Op class for a function of one variable, from its values and its derivative."""

    @quiet
    def run(ctx, x):
        y = forward(ctx.xp, x)
        if saves:
            ctx.save(x if saves == "x" else y)
        return y

    def derive(ctx, g):
        return backward(g, *ctx.saved) if backward else zero_like(g)  # piecewise constant: zero

    return type(name, (Op,), {"forward": run, "backward": derive, "__doc__": f"{name.lower()} of each element."})


Exp = unary("Exp", lambda xp, x: xp.exp(x), lambda g, y: g * y, "y")
Exp2 = unary("Exp2", lambda xp, x: xp.exp2(x), lambda g, y: g * y * math.log(2), "y")
Expm1 = unary("Expm1", lambda xp, x: xp.expm1(x), lambda g, y: g * (y + 1), "y")
Log = unary("Log", lambda xp, x: xp.log(x), lambda g, x: g / x, "x")
Log2 = unary("Log2", lambda xp, x: xp.log2(x), lambda g, x: g / (x * math.log(2)), "x")
Log10 = unary("Log10", lambda xp, x: xp.log10(x), lambda g, x: g / (x * math.log(10)), "x")
Log1p = unary("Log1p", lambda xp, x: xp.log1p(x), lambda g, x: g / (x + 1), "x")
Sqrt = unary("Sqrt", lambda xp, x: xp.sqrt(x), lambda g, y: g / (y * 2), "y")
Rsqrt = unary("Rsqrt", lambda xp, x: 1 / xp.sqrt(x), lambda g, y: g * y**3 * -0.5, "y")
Reciprocal = unary("Reciprocal", lambda xp, x: 1 / x, lambda g, y: -g * y * y, "y")
Square = unary("Square", lambda xp, x: x * x, lambda g, x: g * x * 2, "x")
Abs = unary("Abs", lambda xp, x: xp.abs(x), lambda g, x: g * x.sign(), "x")
Sin = unary("Sin", lambda xp, x: xp.sin(x), lambda g, x: g * x.cos(), "x")
Cos = unary("Cos", lambda xp, x: xp.cos(x), lambda g, x: -g * x.sin(), "x")
Tan = unary("Tan", lambda xp, x: xp.tan(x), lambda g, y: g * (y * y + 1), "y")
Sinh = unary("Sinh", lambda xp, x: xp.sinh(x), lambda g, x: g * x.cosh(), "x")
Cosh = unary("Cosh", lambda xp, x: xp.cosh(x), lambda g, x: g * x.sinh(), "x")
Tanh = unary("Tanh", lambda xp, x: xp.tanh(x), lambda g, y: g * (1 - y * y), "y")
Erf = unary("Erf", erf_array, lambda g, x: g * (-x * x).exp() * (2 / math.sqrt(math.pi)), "x")
Floor = unary("Floor", lambda xp, x: xp.floor(x))
Ceil = unary("Ceil", lambda xp, x: xp.ceil(x))
Trunc = unary("Trunc", lambda xp, x: xp.trunc(x))
Sign = unary("Sign", lambda xp, x: (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype))  # 0 for nan


def _sigmoid(xp, x):
    e = xp.exp(-xp.abs(x))  # never overflows
    return xp.where(x >= 0, 1, e) / (1 + e)


Sigmoid = unary("Sigmoid", _sigmoid, lambda g, y: g * y * (1 - y), "y")


class Neg(Op):
    def forward(ctx, x):
        return -x

    def backward(ctx, g):
        return -g


class Round(Op):
    """Round half to even, to `decimals` places; gradient zero."""

    def forward(ctx, x, decimals):
        return ctx.xp.round(x, decimals)

    def backward(ctx, g):
        return zero_like(g)


def _u(op):
    """A method that applies `op` after making integers floating."""

    def method(self):
        return apply(op, to_float(self))

    method.__name__ = op.name
    method.__doc__ = op.__doc__
    return method


def _rounding(op):
    def method(self):
        return self.clone() if self.array.dtype.kind in "iu" else apply(op, self)

    method.__name__ = op.name
    method.__doc__ = f"{op.__doc__} Gradient zero."
    return method


class UnaryMethods:
    """PyTorch's methods of one variable; integers become the default floating dtype where the result is not whole."""

    exp, exp2, expm1, log, log2, log10, log1p = _u(Exp), _u(Exp2), _u(Expm1), _u(Log), _u(Log2), _u(Log10), _u(Log1p)
    sqrt, rsqrt, sigmoid, erf = _u(Sqrt), _u(Rsqrt), _u(Sigmoid), _u(Erf)
    sin, cos, tan, sinh, cosh, tanh = _u(Sin), _u(Cos), _u(Tan), _u(Sinh), _u(Cosh), _u(Tanh)
    floor, ceil, trunc = _rounding(Floor), _rounding(Ceil), _rounding(Trunc)

    def sign(self):
        """-1, 0 or 1. Gradient zero."""
        return apply(Sign, self) if self.array.dtype != bool else self.clone()

    def round(self, *, decimals=0):
        """Round half to even. Gradient zero."""
        return self.clone() if self.array.dtype.kind in "iu" else apply(Round, self, decimals=decimals)

    def neg(self):
        if self.array.dtype == bool:
            raise OpTypeError("neg: a bool tensor has no negative; use logical_not or ~")
        return apply(Neg, self)

    def positive(self):
        return self

    def reciprocal(self):
        """1 / self."""
        return apply(Reciprocal, to_float(self))

    def abs(self):
        return apply(Abs, self) if self.array.dtype != bool else self.clone()

    def square(self):
        return apply(Square, self if self.array.dtype != bool else cast(self, dtypes.int64))

    __neg__, __abs__, __pos__ = neg, abs, positive
