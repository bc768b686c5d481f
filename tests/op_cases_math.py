"""Rows of the operation table: elementwise functions, comparisons, operators. In a call `t` is tensorgrad or torch."""

from __future__ import annotations

from op_samples import binary, bools, case, infix, ints, positive, real, unary, values, weights

NAN, INF = float("nan"), float("inf")


def by_scalar(name):
    """Python's operator `name` of a tensor and 2.5."""
    call = infix(name)
    return lambda t, x: call(t, x, 2.5)


def abs_of(t, x):
    return abs(x)


UNARY = [
    unary("abs", others="i"), unary("neg", others="i"), unary("square"), unary("sign"), unary("reciprocal", positive),
    unary("exp"), unary("exp2"), unary("expm1"), unary("sqrt", positive), unary("rsqrt", positive),
    unary("log", positive), unary("log10", positive), unary("log1p", positive), unary("log2", positive),
    unary("sin"), unary("cos"), unary("tan", lambda *s: real(*s, low=-1.2, high=1.2)), unary("sinh"), unary("cosh"),
    unary("tanh"), unary("sigmoid"), unary("erf"),
    unary("floor", others="i", special=[-2.0, -1.0, 0.0, 0.5, INF]),
    unary("ceil", others="i", special=[-2.0, -1.0, 0.0, 0.5, INF]),
    unary("trunc", others="i", special=[-1.5, 1.5, 2.0, INF]),
    unary("round", others="i", special=[0.5, 1.5, 2.5, -0.5, -1.5, INF]),
    unary("isnan", grad=False), unary("isinf", grad=False), unary("isfinite", grad=False),
    unary("logical_not", grad=False),
    case("__pos__", (infix("pos"), real(2, 3)), (infix("pos"), real(0)), (infix("pos"), ints(3)), view=None),
    case("positive", (lambda t, x: t.positive(x), real(2, 3)), (lambda t, x: x.positive(), ints(0)), view=None),
    case("__neg__", (infix("neg"), real(2, 3)), (infix("neg"), ints(0))),
    case("__abs__", (abs_of, real(2, 3)), (abs_of, real(0)), (abs_of, ints(3, low=-2))),
    case("__invert__", (infix("invert"), bools(2, 3)), (infix("invert"), bools(0)), (infix("invert"), ints(3)),
         grad=False),
    *(case(name, (lambda t, x, n=name: getattr(t, n)(x, -0.5, 1.0), real(2, 3)),
           (lambda t, x, n=name: getattr(x, n)(min=0.25), real(4)),
           (lambda t, x, n=name: getattr(x, n)(max=0.25), real()),
           (lambda t, x, n=name: getattr(t, n)(x, max=0.5), real(0, 2)),
           (lambda t, x, n=name: getattr(t, n)(x, 1, 2), ints(5, high=5)),
           (lambda t, x, n=name: getattr(t, n)(x, 0.5, 1.5), ints(5, high=5)),
           (lambda t, x, a, b, n=name: getattr(t, n)(x, a, b), real(2, 3), real(3, low=-1.4, high=-0.6),
            real(low=0.6, high=1.4)), (lambda t, x, a, n=name: getattr(x, n)(min=a), real(2, 3), real(2, 1)),
           (lambda t, x, n=name: getattr(t, n)(x, 0.0, 1.0), values([NAN, -INF, 0.0, 1.0, 2.0])),
           (lambda t, x, n=name: getattr(t, n)(x, 1.0, 0.0), values([-1.0, 0.5, 2.0]))) for name in ("clamp", "clip")),
]

BINARY = [
    binary("add", symbol="add"), binary("sub", symbol="sub", others="is"), binary("mul", symbol="mul"),
    binary("div", positive, symbol="truediv", literal=([1.0, 0.0, -1.0], [0.0, 0.0, INF]), others="is"),
    binary("pow", positive, symbol="pow", literal=([0.0, 0.0, -2.0, -2.0, 2.0], [0.0, 2.0, 2.0, 3.0, -1.0]),
           others="is"),
    binary("maximum", literal=([1.0, NAN, 2.0, 0.0], [1.0, 0.0, NAN, 1.0]), others="ib"),
    binary("minimum", literal=([1.0, NAN, 2.0, 0.0], [1.0, 0.0, NAN, 1.0]), others="ib"),
    binary("logaddexp", literal=([0.0, INF, -INF], [0.0, 1.0, 1.0]), others=""),
    binary("floor_divide", weights, symbol="floordiv", literal=([1.0, -7.0, 7.0], [0.0, 2.0, -2.0]), others="is",
           grad=False),
    binary("remainder", positive, symbol="mod", literal=([5.0, -7.0, 7.0], [1.5, 2.0, -2.0]), others="is"),
    *(binary(name, symbol=name, literal=([1.0, NAN, 2.0], [1.0, 1.0, INF]),
             grad=False) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *(binary(f"logical_{name}", literal=([0.0, 2.0, NAN], [0.0, 0.0, 1.0]), others="ib",
             grad=False) for name in ("and", "or", "xor")),
    *(case(f"__{name}__", (infix(name), bools(2, 3), bools(3)), (infix(name), ints(3), ints(3)),
           (infix(name), bools(0), bools(1)), grad=False) for name in ("and", "or", "xor")),
    *(case(f"__{name}__", (infix(name), positive(2, 3), positive(3)), (infix(name), positive(2), positive()),
           (infix(name), real(0, 3), positive(3)), (by_scalar(name), positive(4)),
           *([] if name in ("itruediv", "ipow") else [(infix(name), ints(3), ints(3))]))
      for name in ("iadd", "isub", "imul", "itruediv", "ipow")),
    case("__radd__", (lambda t, x: 2 + x, real(2, 3)), (lambda t, x: 2.5 + x, ints(3)), (lambda t, x: 1 + x, real(0))),
    case("__rsub__", (lambda t, x: 2 - x, real(2, 3)), (lambda t, x: 2.5 - x, ints(3)), (lambda t, x: 1 - x, real(0))),
    case("__rmul__", (lambda t, x: 2 * x, real(2, 3)), (lambda t, x: 2.5 * x, ints(3)), (lambda t, x: 3 * x, real(0))),
    case("__rtruediv__", (lambda t, x: 2 / x, positive(2, 3)), (lambda t, x: 2 / x, ints(3, low=1)),
         (lambda t, x: 1 / x, real(0))),
    case("__rfloordiv__", (lambda t, x: 7 // x, weights(2, 3)), (lambda t, x: 7 // x, ints(3, low=1)),
         (lambda t, x: 1 // x, weights(0)), grad=False),
    case("__rmod__", (lambda t, x: 7 % x, weights(2, 3)), (lambda t, x: 7 % x, ints(3, low=1)),
         (lambda t, x: 1 % x, weights(0))),
    case("__rpow__", (lambda t, x: 2**x, real(2, 3)), (lambda t, x: 2.5**x, real()), (lambda t, x: 2**x, real(0)),
         (lambda t, x: 2**x, ints(3)), (lambda t, x: 0**x, values([0.0, 1.0, 2.0]))),
    case("isclose",
         (lambda t, x, y: t.isclose(x, y), values([1.0, NAN, INF, 0.0]), values([1.0 + 1e-7, NAN, INF, 1.0])),
         (lambda t, x, y: x.isclose(y, rtol=0.5, atol=0.1, equal_nan=True), values([1.0, NAN]), values([1.4, NAN])),
         (lambda t, x, y: t.isclose(x, y), real(2, 0), real(2, 1)), (lambda t, x, y: t.isclose(x, y), ints(3), ints(3)),
         grad=False),
    case("allclose", (lambda t, x, y: t.allclose(x, y), real(2, 3), real(3)), (lambda t, x: x.allclose(x), real(2, 3)),
         (lambda t, x, y: t.allclose(x, y), real(0), real(0)),
         (lambda t, x: t.allclose(x, x, equal_nan=True), values([NAN, 1.0])), grad=False),
    case("equal", (lambda t, x, y: t.equal(x, y), real(2, 3), real(3)), (lambda t, x: x.equal(x.clone()), real(2, 3)),
         (lambda t, x, y: t.equal(x, y), real(0), real(0)), (lambda t, x: t.equal(x, x), values([NAN])), grad=False),
    *(case(name, (lambda t, x, a, b, n=name: getattr(t, n)(x, a, b), real(2, 3), real(2, 3), positive(3)),
           (lambda t, x, a, b, n=name: getattr(x, n)(a, b, value=0.5), real(3), real(2, 1), positive()),
           (lambda t, x, a, b, n=name: getattr(t, n)(x, a, b), real(0, 3), real(3), positive(0, 1)))
      for name in ("addcmul", "addcdiv")),
    case("lerp", (lambda t, x, y: t.lerp(x, y, 0.3), real(2, 3), real(2, 3)),
         (lambda t, x, y, w: x.lerp(y, w), real(2, 3), real(3), real(2, 1)),
         (lambda t, x, y: t.lerp(x, y, 0.7), real(), real()), (lambda t, x, y: t.lerp(x, y, 0.3), real(0, 3), real(3))),
    case("where", (lambda t, c, x, y: t.where(c, x, y), bools(2, 3), real(2, 3), real(3)),
         (lambda t, c, x, y: x.where(c, y), bools(2, 1), real(3), real()),
         (lambda t, c, x: t.where(c, x, 0.0), bools(3), real(3)), (lambda t, c, x: t.where(c, 2, x), bools(3), real(3)),
         (lambda t, c, x, y: t.where(c, x, y), bools(0), real(1), real(0)),
         (lambda t, c, x, y: t.where(c, x, y), bools(3), ints(3), real(3)), (lambda t, c: t.where(c), bools(2, 3)),
         (lambda t, c, x: t.where(c > 0, x, -x), values([1.0, -1.0]), real(2))),
]
