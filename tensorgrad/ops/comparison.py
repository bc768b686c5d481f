"""Comparisons, predicates and logic: results are bool and have no gradient."""

import numpy as np

from ..engine import wrap
from ..errors import OpError, OpTypeError, describe, unify_devices
from .common import is_tensor, operands


def compare(a, b, function):
    """A comparison or predicate: a bool Tensor, never recorded."""
    if not (is_tensor(b) and a.array.dtype == b.array.dtype):
        a, b = operands(a, b)
    if a.device is not b.device:
        device, (x, y) = unify_devices(function, (a, b))
        return wrap(getattr(device.xp, function)(x, y), device)
    try:
        return wrap(getattr(a.device.xp, function)(a.array, b.array), a.device)
    except ValueError:
        raise OpError(
            f"{function}: {describe((a.array, b.array))}: these shapes do not broadcast: from the right, "
            "sizes must be equal or 1"
        ) from None


def predicate(x, function):
    return wrap(getattr(x.device.xp, function)(x.array), x.device)


class ComparisonMethods:
    """PyTorch's comparing methods and operators."""

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
        with np.errstate(all="ignore"):
            return wrap(xp.isclose(self.array, other.array, rtol=rtol, atol=atol, equal_nan=equal_nan), self.device)

    def allclose(self, other, rtol=1e-5, atol=1e-8, equal_nan=False):
        """True where all elements are close; a Python bool."""
        return bool(self.isclose(other, rtol, atol, equal_nan).array.all())

    def equal(self, other):
        """True where shape and all elements are the same; a Python bool."""
        return self.array.shape == other.array.shape and bool((self.array == other.array).all())

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
