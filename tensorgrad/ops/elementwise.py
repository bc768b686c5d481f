"""Operations on each element: arithmetic, powers, exponentials, trigonometry, rounding, comparison, selection."""
import math

import numpy as np

from .. import dtypes
from ..engine import Op, apply, wrap
from ..errors import OpTypeError
from ..kernels.erf import erf as erf_array
from .common import binary, cast, is_tensor, operands, scalar, to_float

quiet = np.errstate(all="ignore")  # log(0) is -inf and 0/0 is nan without a warning, as in PyTorch


class Broadcasting(Op):
    """Shared error text of operations that broadcast their inputs."""

    def explain(ctx, arrays, options):
        try:
            np.broadcast_shapes(*(a.shape for a in arrays))
        except ValueError:
            return "these shapes do not broadcast: from the right, sizes must be equal or 1"


# ---- arithmetic ------------------------------------------------------------------------------------------------------

class Add(Broadcasting):
    symbol = "+"

    def forward(ctx, a, b):
        return a + b

    def backward(ctx, g):
        return g, g


class Sub(Broadcasting):
    symbol = "-"

    def forward(ctx, a, b):
        return a - b

    def backward(ctx, g):
        need_a, need_b = ctx.needs
        return g, -g if need_b else None


class Mul(Broadcasting):
    symbol = "*"

    def forward(ctx, a, b):
        if ctx.recording:
            need_a, need_b = ctx.needs
            ctx.save(a if need_b else None, b if need_a else None)
        return a * b

    def backward(ctx, g):
        a, b = ctx.saved
        return None if b is None else g * b, None if a is None else g * a


class Div(Broadcasting):
    symbol = "/"

    @quiet
    def forward(ctx, a, b):
        if ctx.recording:
            ctx.save(a if ctx.needs[1] else None, b)
        return a / b

    def backward(ctx, g):
        a, b = ctx.saved
        g = g / b
        return g, None if a is None else -g * (a / b)


class Neg(Op):
    def forward(ctx, x):
        return -x

    def backward(ctx, g):
        return -g


class Pow(Broadcasting):
    symbol = "**"

    @quiet
    def forward(ctx, a, b):
        if b.ndim == 0 and b.dtype.kind == "f" and (power := _SIMPLE_POWERS.get(float(b))):
            y = power(ctx.xp, a)
        else:
            y = ctx.xp.power(a, b)
        if ctx.recording:
            ctx.save(a, b, y if ctx.needs[1] else None)
        return y

    def backward(ctx, g):
        a, b, y = ctx.saved
        need_a, need_b = ctx.needs
        ga = gb = None
        if need_a:  # where the exponent is 0 the power is constant, also at 0 ** 0
            ga = g * (b * a ** (b - 1)).masked_fill(b == 0, 0.0)
        if need_b:  # 0 ** b is constant for b > 0; PyTorch counts b = 0 in
            gb = g * (y * a.log()).masked_fill((a == 0).logical_and(b >= 0), 0.0)
        return ga, gb


_SIMPLE_POWERS = {  # what pow() would take ten times longer for
    0.5: lambda xp, a: xp.sqrt(a), 1.0: lambda xp, a: a.copy(), 2.0: lambda xp, a: a * a,
    3.0: lambda xp, a: a * a * a, -1.0: lambda xp, a: 1 / a,
}


class FloorDiv(Op):
    @quiet
    def forward(ctx, a, b):
        if b.dtype.kind in "iu" and (b == 0).any():
            raise ZeroDivisionError("integer division by zero")
        return ctx.xp.floor_divide(a, b)

    def backward(ctx, g):
        return zero_like(g), zero_like(g)


class Remainder(Op):
    """a - floor(a / b) * b, the sign of b."""

    @quiet
    def forward(ctx, a, b):
        ctx.save(a, b)
        return ctx.xp.remainder(a, b)

    def backward(ctx, g):
        a, b = ctx.saved
        return g, -g * (a / b).floor()


class Maximum(Broadcasting):
    """The larger of two; where equal, each gets half of the gradient."""

    def forward(ctx, a, b):
        ctx.save(a, b)
        return ctx.xp.maximum(a, b)

    def backward(ctx, g):
        a, b = ctx.saved
        return tie_split(ctx, g, a.array, b.array, ctx.xp.less)


class Minimum(Broadcasting):
    """The smaller of two; where equal, each gets half of the gradient."""

    def forward(ctx, a, b):
        ctx.save(a, b)
        return ctx.xp.minimum(a, b)

    def backward(ctx, g):
        a, b = ctx.saved
        return tie_split(ctx, g, a.array, b.array, ctx.xp.greater)


def tie_split(ctx, g, a, b, loses):
    half = (a == b) * g.array.dtype.type(0.5)
    shares = [1 - loses(x, y) - half for x, y in ((a, b), (b, a))]
    return tuple(g * wrap(share.astype(g.array.dtype), ctx.device) for share in shares)


def zero_like(g):
    return wrap(g.device.xp.zeros_like(g.array), g.device)


# ---- functions of one variable ---------------------------------------------------------------------------------------
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
Rsqrt = unary("Rsqrt", lambda xp, x: 1 / xp.sqrt(x), lambda g, y: g * y ** 3 * -0.5, "y")
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
Sign = unary("Sign", lambda xp, x: xp.sign(x))


def _sigmoid(xp, x):
    e = xp.exp(-xp.abs(x))  # never overflows
    return xp.where(x >= 0, 1, e) / (1 + e)


Sigmoid = unary("Sigmoid", _sigmoid, lambda g, y: g * y * (1 - y), "y")


class Round(Op):
    """Round half to even, to `decimals` places; gradient zero."""

    def forward(ctx, x, decimals):
        return ctx.xp.round(x, decimals)

    def backward(ctx, g):
        return zero_like(g)


class Clamp(Op):
    """min(max(x, low), high) with numbers as bounds; gradient 1 inside and on the bounds."""

    def forward(ctx, x, low, high):
        ctx.save(x)
        ctx.low, ctx.high = low, high
        return ctx.xp.clip(x, low, high)

    def backward(ctx, g):
        x, = ctx.saved
        inside = ctx.xp.ones(x.array.shape, bool)
        if ctx.low is not None:
            inside &= x.array >= ctx.low
        if ctx.high is not None:
            inside &= x.array <= ctx.high
        return g.masked_fill(wrap(~inside, ctx.device), 0.0)


class Where(Broadcasting):
    """a where the condition holds, else b."""

    def forward(ctx, condition, a, b):
        ctx.save(condition)
        return ctx.xp.where(condition, a, b)

    def backward(ctx, g):
        condition, = ctx.saved
        zero = scalar(0, g, g.array.dtype)
        _, need_a, need_b = ctx.needs
        return (None, apply(Where, condition, g, zero) if need_a else None,
                apply(Where, condition, zero, g) if need_b else None)


class Copy(Op):
    """A copy in C order."""

    def forward(ctx, x):
        return x.copy()

    def backward(ctx, g):
        return g


class ToDevice(Op):
    """A copy on another device; the gradient travels back."""

    def forward(ctx, x, target):
        ctx.source, ctx.device = ctx.device, target
        return target.asarray(ctx.source.to_numpy(x)) if target.type == "cuda" else ctx.source.to_numpy(x)

    def backward(ctx, g):
        return apply(ToDevice, g, target=ctx.source)


def compare(a, b, function):
    """A comparison or predicate: a bool Tensor, never recorded."""
    if not (is_tensor(b) and a.array.dtype == b.array.dtype):
        a, b = operands(a, b)
    if a.device is not b.device:
        from ..errors import unify_devices
        device, (x, y) = unify_devices(Broadcasting, (a, b))
        return wrap(getattr(device.xp, function)(x, y), device)
    try:
        return wrap(getattr(a.device.xp, function)(a.array, b.array), a.device)
    except ValueError:
        from ..errors import OpError, describe
        raise OpError(f"{function}: {describe((a.array, b.array))}: these shapes do not broadcast: from the right, "
                      "sizes must be equal or 1") from None


def predicate(x, function):
    return wrap(getattr(x.device.xp, function)(x.array), x.device)


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


class ElementwiseMethods:
    """PyTorch's elementwise methods and operators."""

    # ---- arithmetic; integers divide into the default floating dtype
    def add(self, other, *, alpha=1):
        """self + alpha * other, broadcast."""
        return binary(Add, self, other if alpha == 1 else other * alpha)

    def sub(self, other, *, alpha=1):
        """self - alpha * other, broadcast."""
        if self.array.dtype == bool and getattr(getattr(other, "array", other), "dtype", type(other)) == bool:
            raise OpTypeError("sub: booleans cannot be subtracted; use ^ or logical_xor")
        return binary(Sub, self, other if alpha == 1 else other * alpha)

    def mul(self, other):
        """self * other, broadcast."""
        return binary(Mul, self, other)

    def div(self, other, *, rounding_mode=None):
        """self / other; rounding_mode None, "trunc" or "floor"."""
        a, b = operands(self, other)
        if rounding_mode == "floor":
            return apply(FloorDiv, a, b)
        if rounding_mode not in (None, "trunc"):
            raise OpTypeError(f"div: rounding_mode must be None, 'trunc' or 'floor', got {rounding_mode!r}")
        result = apply(Div, to_float(a), to_float(b))
        return result if rounding_mode is None else cast(result.trunc(), a.array.dtype)

    def floor_divide(self, other):
        """floor(self / other)."""
        return binary(FloorDiv, self, other)

    def remainder(self, other):
        """self modulo other, with the sign of other."""
        return binary(Remainder, self, other)

    def pow(self, exponent):
        """self ** exponent."""
        a, b = operands(self, exponent)
        if a.array.dtype.kind in "iu" and not is_tensor(exponent) and exponent < 0:
            raise OpTypeError("pow: integers to negative integer powers are not allowed; convert to float first")
        return apply(Pow, a, b)

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

    def maximum(self, other):
        """Elementwise larger value; NaN wins; ties share the gradient."""
        return binary(Maximum, self, other)

    def minimum(self, other):
        """Elementwise smaller value; NaN wins; ties share the gradient."""
        return binary(Minimum, self, other)

    def lerp(self, end, weight):
        """self + weight * (end - self)."""
        return self + weight * (end - self)

    def addcmul(self, tensor1, tensor2, *, value=1):
        """self + value * tensor1 * tensor2."""
        return self + value * (tensor1 * tensor2)

    def addcdiv(self, tensor1, tensor2, *, value=1):
        """self + value * tensor1 / tensor2."""
        return self + value * (tensor1 / tensor2)

    def clamp(self, min=None, max=None):
        """Values below min become min, above max become max; bounds are numbers or tensors."""
        if min is None and max is None:
            raise OpTypeError("clamp: give min, max or both")
        if not is_tensor(min) and not is_tensor(max):
            x = self
            for bound in (min, max):
                if isinstance(bound, float):
                    x = to_float(x)
            return apply(Clamp, x, low=min, high=max)
        x = self
        for bound, compared in ((min, "lt"), (max, "gt")):
            if bound is not None:
                x, bound = operands(x, bound)
                keep = getattr(x, compared)(bound).logical_not()
                x = keep._select(x, bound)
        return x

    clip = clamp

    # ---- functions of one variable
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

    def logaddexp(self, other):
        """log(exp(self) + exp(other)) without overflow."""
        a, b = operands(self, other)
        top = a.detach().maximum(b.detach())
        top = top.masked_fill(top.isinf(), 0.0)
        return ((a - top).exp() + (b - top).exp()).log() + top

    # ---- selection
    def _select(self, a, b):
        return apply(Where, self, a, b)

    def where(self, condition, other):
        """self where condition holds, else other."""
        a, b = operands(self, other)
        return condition._select(a, b)

    def masked_fill(self, mask, value):
        """value where mask holds, else self."""
        if mask.array.dtype != bool:
            raise OpTypeError(f"masked_fill: the mask must be bool, got {mask.array.dtype}")
        if is_tensor(value):
            if value.array.ndim:
                raise OpTypeError("masked_fill: value must be a number or a 0-d tensor; use where() for more")
            value = cast(value, self.array.dtype)
        else:
            if self.array.dtype.kind in "iub" and isinstance(value, float) and value != int(value):
                raise OpTypeError(f"masked_fill: {value} does not fit dtype {self.array.dtype}")
            value = scalar(value, self, self.array.dtype)
        return apply(Where, mask, value, self)

    # ---- comparisons and predicates: bool, no gradient
    def eq(self, other):
        return compare(self, other, "equal")

    def ne(self, other):
        return compare(self, other, "not_equal")

    def lt(self, other):
        return compare(self, other, "less")

    def le(self, other):
        return compare(self, other, "less_equal")

    def gt(self, other):
        return compare(self, other, "greater")

    def ge(self, other):
        return compare(self, other, "greater_equal")

    def logical_and(self, other):
        return compare(self, other, "logical_and")

    def logical_or(self, other):
        return compare(self, other, "logical_or")

    def logical_xor(self, other):
        return compare(self, other, "logical_xor")

    def logical_not(self):
        return predicate(self, "logical_not")

    def isnan(self):
        return predicate(self, "isnan")

    def isinf(self):
        return predicate(self, "isinf")

    def isfinite(self):
        return predicate(self, "isfinite")

    def isclose(self, other, rtol=1e-5, atol=1e-8, equal_nan=False):
        """|self - other| <= atol + rtol * |other|, elementwise."""
        if self.array.dtype != other.array.dtype:
            raise OpTypeError(f"isclose: dtypes differ: {self.array.dtype} and {other.array.dtype}")
        if rtol < 0 or atol < 0:
            raise OpTypeError(f"isclose: rtol and atol must not be negative, got {rtol} and {atol}")
        xp = self.device.xp
        with quiet:
            return wrap(xp.isclose(self.array, other.array, rtol=rtol, atol=atol, equal_nan=equal_nan), self.device)

    def allclose(self, other, rtol=1e-5, atol=1e-8, equal_nan=False):
        """True where all elements are close; a Python bool."""
        return bool(self.isclose(other, rtol, atol, equal_nan).array.all())

    def equal(self, other):
        """True where shape and all elements are the same; a Python bool."""
        return self.array.shape == other.array.shape and bool((self.array == other.array).all())

    # ---- operators
    def __add__(self, other):
        return binary(Add, self, other)

    def __radd__(self, other):
        return binary(Add, other, self)

    def __sub__(self, other):
        return self.sub(other)

    def __rsub__(self, other):
        return binary(Sub, other, self)

    def __mul__(self, other):
        return binary(Mul, self, other)

    def __rmul__(self, other):
        return binary(Mul, other, self)

    def __truediv__(self, other):
        return self.div(other)

    def __rtruediv__(self, other):
        a, b = operands(other, self)
        return a.div(b)

    def __floordiv__(self, other):
        return self.floor_divide(other)

    def __rfloordiv__(self, other):
        return binary(FloorDiv, other, self)

    def __mod__(self, other):
        return self.remainder(other)

    def __rmod__(self, other):
        return binary(Remainder, other, self)

    def __pow__(self, other):
        return self.pow(other)

    def __rpow__(self, other):
        a, b = operands(other, self)
        return apply(Pow, a, b)

    def __neg__(self):
        return self.neg()

    def __pos__(self):
        return self

    def __abs__(self):
        return self.abs()

    def __eq__(self, other):
        return self.eq(other) if is_tensor(other) or isinstance(other, int | float | np.ndarray | np.generic) else False

    def __ne__(self, other):
        return self.ne(other) if is_tensor(other) or isinstance(other, int | float | np.ndarray | np.generic) else True

    __lt__, __le__, __gt__, __ge__ = lt, le, gt, ge

    def __invert__(self):
        return predicate(self, "invert")

    def __and__(self, other):
        return compare(self, other, "bitwise_and")

    def __or__(self, other):
        return compare(self, other, "bitwise_or")

    def __xor__(self, other):
        return compare(self, other, "bitwise_xor")

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    # ---- copies, dtypes, devices
    def clone(self):
        """A copy that passes the gradient on."""
        return apply(Copy, self)

    def to(self, *args, device=None, dtype=None, copy=False):
        """self with another dtype and/or on another device: to("cuda"), to(tg.float64), to(other_tensor). Both are
        operations with a gradient. Returns self where nothing changes (unless copy)."""
        from ..device import Device, device as as_device
        for arg in args:
            if is_tensor(arg):
                device, dtype = arg.device, arg.array.dtype
            elif isinstance(arg, Device) or (isinstance(arg, str) and arg.partition(":")[0] in ("cpu", "cuda")):
                device = arg
            elif isinstance(arg, bool):
                copy = arg
            else:
                dtype = arg
        result = self
        if dtype is not None:
            result = cast(result, dtypes.as_dtype(dtype))
        if device is not None and as_device(device) is not self.device:
            result = apply(ToDevice, result, target=as_device(device))
        return result.clone() if copy and result is self else result

    def type_as(self, other):
        return cast(self, other.array.dtype)

    def float(self):
        return cast(self, dtypes.float32)

    def double(self):
        return cast(self, dtypes.float64)

    def half(self):
        return cast(self, dtypes.float16)

    def bfloat16(self):
        return cast(self, dtypes.bfloat16_dtype())

    def long(self):
        return cast(self, dtypes.int64)

    def int(self):
        return cast(self, dtypes.int32)

    def bool(self):
        return cast(self, dtypes.bool)


