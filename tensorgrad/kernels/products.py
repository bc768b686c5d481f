"""Matrix products on the CPU, split over the pool: each thread computes a part with single-threaded BLAS."""

import math

import numpy as np

from . import bfloat16, blas
from .memory import empty
from .pool import pool

GRAIN = 1 << 21  # multiply-adds below which a second thread costs more than it saves
HALVES = 1 << 29  # multiply-adds from which two threads take half of each of two products instead of one each
WEIGHTS = 1 << 17  # elements of a matrix from which two threads read it faster than one


def gemm(a, b, out, accumulate=False):
    """out = a @ b, or += with `accumulate`, in the calling thread; bfloat16 matrices (uint16) give float32."""
    (bfloat16.gemm if a.dtype == np.uint16 else blas.gemm)(a, b, out, accumulate)


def product(a, b, out=None, accumulate=False):
    """a (n, k) @ b (k, m) -> (n, m), into `out` where given, added to it with `accumulate`."""
    if out is None:
        out = empty((a.shape[0], b.shape[1]), np.result_type(a, b))
    if bfloat16.rounds(a, b):
        a, b = bfloat16.rounded(a), bfloat16.rounded(b)
    run(split_product(a, b, out, accumulate))
    return out


def split_product(a, b, out, accumulate=False, parts=None):
    """The product as a list of independent products of parts of the result."""
    (n, k), m = a.shape, b.shape[1]
    few = n < 16  # then reading the weights takes the time, so their size decides
    parts = parts or min(pool().threads, max(n * k * m // GRAIN, k * m // WEIGHTS if few else 0))
    if parts < 2:
        return [(a, b, out, accumulate)]
    lead = 0 if few else GRAIN // k  # elements more in the calling thread's part, the last: see Pool.split
    if n >= m:
        edges = [max(0, n - lead // m) * i // parts // 16 * 16 for i in range(parts)] + [n]
        return [(a[i:j], b, out[i:j], accumulate) for i, j in zip(edges, edges[1:], strict=False)]
    edges = [max(0, m - lead // n) * i // parts // 16 * 16 for i in range(parts)] + [m]
    return [(a, b[:, i:j], out[:, i:j], accumulate) for i, j in zip(edges, edges[1:], strict=False)]


def run(products):
    """Compute several independent products (a, b, out, accumulate), in parallel where there are several."""
    if len(products) == 1:
        gemm(*products[0])
    elif products:
        pool().run([(gemm, task) for task in products])


def run_pair(first, second):
    """Two independent products of like size at the same time: with two threads one each, where they are large half of
    each (the two layouts differ in speed), else one after the other, split."""
    size = min(a.shape[0] * a.shape[1] * b.shape[1] for a, b, _, _ in (first, second))
    if pool().threads != 2 or size < GRAIN // 2:
        run(split_product(*first))
        run(split_product(*second))
    elif size < HALVES:
        _run_one_each(first, second)
    else:
        halves = zip(split_product(*first, parts=2), split_product(*second, parts=2), strict=True)
        pool().run([(_both, pair) for pair in halves])


def _run_one_each(first, second):
    """`first` in a worker but for a few rows, which the calling thread computes before `second` while that wakes up."""
    a, b, out, accumulate = first
    rest = max(0, len(a) - GRAIN // 2 // b.size // 16 * 16)
    if rest == len(a):
        run([first, second])
    else:
        head, tail = ((a[part], b, out[part], accumulate) for part in (slice(rest), slice(rest, None)))
        pool().run([(gemm, head), (_both, (tail, second))])


def _both(first, second):
    gemm(*first)
    gemm(*second)


def batched(a, b):
    """a (..., n, k) @ b (..., k, m) with broadcast leading sizes; the leading dimension is split over the pool."""
    if a.ndim == b.ndim == 2:
        return product(a, b)
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    out = empty((*lead, a.shape[-2], b.shape[-1]), np.result_type(a, b))
    if not lead or out.size * a.shape[-1] < 2 * GRAIN or lead[0] < 2 or math.prod(lead) < 2:
        return np.matmul(a, b, out=out)

    def part(start, stop, a, b):
        take = [x if x.ndim < len(lead) + 2 or x.shape[0] == 1 else x[start:stop] for x in (a, b)]
        np.matmul(*take, out=out[start:stop])

    pool().split(part, lead[0], a, b)
    return out
