"""The error function, which NumPy lacks, to double precision; its coefficients are computed here, not tabulated.

|x| < 1: the Taylor series erf(x) = 2/sqrt(pi) sum (-1)^n x^(2n+1) / (n! (2n+1)).
|x| >= 1: erf(x) = 1 - exp(-x^2) f(t), t = 2 / (2 + |x|), with f(t) = erfc(x) exp(x^2) interpolated at Chebyshev nodes
from the standard library's `math.erfc`.
float32 uses the second form alone with fewer terms (error below 4e-7).
"""

import math
from functools import cache

import numpy as np


@cache
def _taylor(terms=22):
    return [2 / math.sqrt(math.pi) * (-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(terms)]


@cache
def _erfc_scaled(degree, low):
    """Power-series coefficients in t, highest first, of erfc(x) exp(x^2) for |x| >= low, t = 2 / (2 + |x|)."""
    high = 2 / (2 + low)

    def f(t):
        x = 2 / t - 2
        if x < 25:  # math.erfc underflows above
            return math.erfc(x) * math.exp(x * x)
        series = sum((-1) ** k * math.prod(range(1, 2 * k, 2)) / (2 * x * x) ** k for k in range(9))
        return series / (x * math.sqrt(math.pi))

    fit = np.polynomial.Chebyshev.interpolate(
        lambda t: np.array([f(v) if v > 0 else 0.0 for v in t]), degree, [0, high]
    )
    return [float(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef[::-1]]


def erf(xp, x):
    """erf of an array of NumPy or CuPy, elementwise; same shape and dtype."""
    if x.ndim == 0:  # NumPy would compute on scalars, which cannot be written in place
        return erf(xp, x.reshape(1)).reshape(())
    if x.dtype == np.float64:
        return _erf64(xp, x)
    y = _complement(xp, x.astype(np.float32, copy=False), 9, 0.0)
    return y.astype(x.dtype, copy=False)


def _complement(xp, x, degree, low):
    """sign(x) (1 - exp(-x^2) f(t)) with as few temporaries as possible."""
    a = xp.abs(x)
    t = 2 / (a + 2)
    coefficients = _erfc_scaled(degree, low)
    y = t * coefficients[0]
    for c in coefficients[1:-1]:
        y += c
        y *= t
    y += coefficients[-1]
    a *= a
    xp.negative(a, out=a)
    xp.exp(a, out=a)
    y *= a
    xp.subtract(1, y, out=y)
    return xp.copysign(y, x, out=y)


def _erf64(xp, x):
    coefficients = _taylor()
    inner = xp.clip(x, -1, 1)
    s = inner * inner
    y = s * coefficients[-1]
    for c in coefficients[-2:0:-1]:
        y += c
        y *= s
    y += coefficients[0]
    y *= inner
    return xp.where(xp.abs(x) < 1, y, _complement(xp, x, 20, 1.0))
