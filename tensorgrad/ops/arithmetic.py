"""Arithmetic of two tensors, and choosing between them: add, mul, pow, maximum, clamp, where ..."""

import numpy as np

from .. import dtypes
from ..engine import LARGE, Op, apply, wrap
from ..errors import OpTypeError
from ..kernels import routines
from .common import binary, cast, is_tensor, operands, quiet, scalar, to_float, zero_like


class Broadcasting(Op):
    """Shared error text of operations that broadcast their inputs."""

    def explain(ctx, arrays, options):
        try:
            np.broadcast_shapes(*(a.shape for a in arrays))
        except ValueError:
            return "these shapes do not broadcast: from the right, sizes must be equal or 1"


class Add(Broadcasting):
    symbol = "+"

    def forward(ctx, a, b):
        return a + b if a.size < LARGE else routines(ctx.device).add(a, b)

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


class Pow(Broadcasting):
    symbol = "**"

    @quiet
    def forward(ctx, a, b):
        if b.ndim == 0 and b.dtype.kind == "f" and (power := _SIMPLE_POWERS.get(float(b))):
            y = power(ctx.xp, a)
        elif b.dtype.kind == "i" and (b < 0).any():  # as PyTorch: 1 and -1 have integer powers, the rest gives 0
            odd = ctx.xp.where(b % 2 == 0, 1, a)
            y = ctx.xp.where(b >= 0, ctx.xp.power(a, ctx.xp.maximum(b, 0)), ctx.xp.where(abs(a) == 1, odd, 0)).astype(
                a.dtype
            )
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
    0.5: lambda xp, a: xp.sqrt(a),
    1.0: lambda xp, a: a.copy(),
    2.0: lambda xp, a: a * a,
    3.0: lambda xp, a: a * a * a,
    -1.0: lambda xp, a: 1 / a,
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


class Clamp(Op):
    """min(max(x, low), high) with numbers as bounds; gradient 1 inside and on the bounds."""

    def forward(ctx, x, low, high):
        ctx.save(x)
        ctx.low, ctx.high = low, high
        return ctx.xp.clip(x, low, high)

    def backward(ctx, g):
        (x,) = ctx.saved
        inside = ctx.xp.ones(x.array.shape, bool)
        if ctx.low is not None:
            inside &= x.array >= ctx.low
        if ctx.high is not None:
            inside &= x.array <= ctx.high
        return g.masked_fill(wrap(~inside, ctx.device), 0.0)


class LogAddExp(Broadcasting):
    """log(exp(a) + exp(b)); the gradients are the shares of the two, sigmoid(a - b) and sigmoid(b - a)."""

    @quiet
    def forward(ctx, a, b):
        ctx.save(a, b)
        return ctx.xp.logaddexp(a, b)

    def backward(ctx, g):
        a, b = ctx.saved
        return g / (1 + (b - a).exp()), g / (1 + (a - b).exp())


class Where(Broadcasting):
    """a where the condition holds, else b."""

    def forward(ctx, condition, a, b):
        ctx.save(condition)
        return ctx.xp.where(condition, a, b)

    def backward(ctx, g):
        (condition,) = ctx.saved
        zero = scalar(0, g, g.array.dtype)
        _, need_a, need_b = ctx.needs
        return (
            None,
            apply(Where, condition, g, zero) if need_a else None,
            apply(Where, condition, zero, g) if need_b else None,
        )


class ArithmeticMethods:
    """PyTorch's methods and operators of two operands. The other one may be a Tensor, an array or a number; integers
    divide into the default floating dtype."""

    def add(self, other, *, alpha=1):
        """self + alpha * other, broadcast."""
        return binary(Add, self, other if alpha == 1 else other * alpha)

    def sub(self, other, *, alpha=1):
        """self - alpha * other, broadcast."""
        if self.array.dtype == bool or isinstance(other, bool) or dtypes.bool == getattr(other, "dtype", None):
            raise OpTypeError("sub: a bool cannot be subtracted (nor subtracted from); use logical_xor or .int()")
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
        if rounding_mode == "trunc" and a.array.dtype.kind in "iu":
            quotient = apply(FloorDiv, a.abs(), b.abs())  # exact, where a float would round large integers
            return quotient * a.sign() * b.sign()
        result = apply(Div, to_float(a), to_float(b))
        return result if rounding_mode is None else result.trunc()

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

    def logaddexp(self, other):
        """log(exp(self) + exp(other)) without overflow."""
        a, b = operands(self, other)
        if not dtypes.is_floating(a.array.dtype):
            raise OpTypeError(f"logaddexp: needs a floating dtype, got {a.array.dtype}")
        return apply(LogAddExp, to_float(a), to_float(b))

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
            if self.array.dtype.kind in "iub" and isinstance(value, float) and not value.is_integer():
                raise OpTypeError(f"masked_fill: {value} does not fit dtype {self.array.dtype}")
            value = scalar(value, self, self.array.dtype)
        return apply(Where, mask, value, self)

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
