"""Products: matmul, einsum and what is composed of them; diagonals and traces."""

import string

import numpy as np

from ..engine import Op, apply, modes, wrap
from ..errors import OpError, OpTypeError
from ..kernels import routines
from .common import dim_index, is_tensor, to_half


class MatMul(Op):
    """Matrix product over the last two dimensions; leading ones broadcast."""

    name = "matmul"
    symbol = "@"

    def forward(ctx, a, b):
        if ctx.recording:
            need_a, need_b = ctx.needs
            ctx.save(a if need_b else None, b if need_a else None)
            ctx.rows = a.ndim > 2 and b.ndim == 2
        if a.shape[-1] != b.shape[-2]:
            raise ValueError("inner dimensions differ")
        matmul = routines(ctx.device, a.dtype).matmul
        if a.ndim > 2 and b.ndim == 2 and a.size and a.flags.c_contiguous:  # one product, not a loop
            return matmul(ctx.xp, a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[-1])
        return matmul(ctx.xp, a, b)

    def backward(ctx, g):
        a, b = ctx.saved
        ga = gb = None
        if b is not None:
            ga = g @ b.transpose(-2, -1)
        if a is not None:
            if ctx.rows:  # one weight for all rows: (rows, in)^T @ (rows, out)
                gb = a.flatten(0, -2).transpose(0, 1) @ g.flatten(0, -2)
            else:
                gb = a.transpose(-2, -1) @ g
        return ga, gb

    def explain(ctx, arrays, options):
        a, b = arrays
        if a.shape[-1] != b.shape[-2]:
            fits = a.shape[-1] == b.shape[-1]
            return f"inner dimensions {a.shape[-1]} and {b.shape[-2]} differ" + ("; did you mean b.mT?" if fits else "")
        return "the leading dimensions do not broadcast"


class Diagonal(Op):
    view = True

    def forward(ctx, x, offset, dim1, dim2):
        ctx.shape, ctx.place = x.shape, (offset, dim1, dim2)
        y = ctx.xp.diagonal(x, offset, dim1, dim2)
        if isinstance(y, np.ndarray):
            y.flags.writeable = x.flags.writeable  # NumPy protects diagonals for historical reasons
        return y

    def backward(ctx, g):
        return apply(DiagonalScatter, g, shape=ctx.shape, place=ctx.place)


class DiagonalScatter(Op):
    """Zeros with the values on a diagonal."""

    def forward(ctx, values, shape, place):
        ctx.place = place
        offset, dim1, dim2 = place
        out = ctx.xp.zeros(shape, values.dtype)
        n = values.shape[-1]
        rows = ctx.xp.moveaxis(out, (dim1, dim2), (-2, -1))
        i = ctx.xp.arange(n)
        rows[..., i + max(-offset, 0), i + max(offset, 0)] = values
        return out

    def backward(ctx, g):
        return apply(Diagonal, g, offset=ctx.place[0], dim1=ctx.place[1], dim2=ctx.place[2])


def _same_dtype(name, *tensors):
    if len({t.array.dtype for t in tensors}) > 1:
        raise OpTypeError(
            f"{name}: dtypes differ: {', '.join(str(t.array.dtype) for t in tensors)}; cast one with .to(dtype)"
        )


def _require(name, ok, *tensors, what):
    if not ok:
        raise OpError(f"{name}: {', '.join(str(tuple(t.array.shape)) for t in tensors)}: {what}")


class LinearAlgebraMethods:
    """PyTorch's products."""

    def matmul(self, other):
        """self @ other: 1-D with 1-D is the dot product, 1-D operands gain a dimension that the result drops,
        leading dimensions broadcast."""
        if not is_tensor(other):
            raise OpTypeError(f"matmul: expected a Tensor, got {type(other).__name__}")
        a, b = to_half((self, other)) if modes.autocast else (self, other)
        return _product(a, b)

    __matmul__ = matmul

    def __rmatmul__(self, other):
        if not is_tensor(other):
            other = wrap(self.device.asarray(np.asarray(other)), self.device)
        return other.matmul(self)

    def mm(self, mat2):
        """Product of two matrices, no broadcasting."""
        _require("mm", self.array.ndim == mat2.array.ndim == 2, self, mat2, what="both must be 2-D; use matmul")
        return self.matmul(mat2)

    def bmm(self, mat2):
        """Products of two batches of matrices (b, n, m) and (b, m, p)."""
        ok = self.array.ndim == mat2.array.ndim == 3 and self.array.shape[0] == mat2.array.shape[0]
        _require("bmm", ok, self, mat2, what="both must be 3-D with equal first size; use matmul")
        return self.matmul(mat2)

    def mv(self, vec):
        """Matrix (n, m) times vector (m)."""
        ok = self.array.ndim == 2 and vec.array.ndim == 1 and self.array.shape[1] == vec.array.shape[0]
        _require("mv", ok, self, vec, what="needs a matrix (n, m) and a vector (m)")
        return _product(self, vec)

    def dot(self, other):
        """Dot product of two vectors of equal length."""
        ok = self.array.ndim == other.array.ndim == 1 and self.array.shape == other.array.shape
        _require("dot", ok, self, other, what="needs two 1-D tensors of equal length")
        return _product(self, other)

    def addmm(self, mat1, mat2, *, beta=1, alpha=1):
        """beta * self + alpha * mat1 @ mat2."""
        return _scaled_sum("addmm", self, mat1.mm(mat2), beta, alpha)

    def addmv(self, mat, vec, *, beta=1, alpha=1):
        """beta * self + alpha * mat @ vec."""
        return _scaled_sum("addmv", self, mat.mv(vec), beta, alpha)

    def baddbmm(self, batch1, batch2, *, beta=1, alpha=1):
        """beta * self + alpha * batch1 @ batch2, for batches of matrices."""
        return _scaled_sum("baddbmm", self, batch1.bmm(batch2), beta, alpha)

    def outer(self, vec2):
        """Outer product of two vectors."""
        _require("outer", self.array.ndim == vec2.array.ndim == 1, self, vec2, what="needs two 1-D tensors")
        return self.unsqueeze(1) * vec2

    def kron(self, other):
        """Kronecker product: every element of self times the whole of other."""
        n = max(self.array.ndim, other.array.ndim)
        a = (1,) * (n - self.array.ndim) + self.array.shape
        b = (1,) * (n - other.array.ndim) + other.array.shape
        product = self.reshape([s for size in a for s in (size, 1)]) * other.reshape(
            [s for size in b for s in (1, size)]
        )
        return product.reshape([x * y for x, y in zip(a, b, strict=True)])

    # ---- diagonals
    def diagonal(self, offset=0, dim1=0, dim2=1):
        """A diagonal of each matrix in dimensions dim1, dim2, as the last dimension (a view)."""
        d1, d2 = dim_index(dim1, self.array.ndim), dim_index(dim2, self.array.ndim)
        if d1 == d2 or self.array.ndim < 2:
            raise OpError(
                f"diagonal: {tuple(self.array.shape)}: dim1 {dim1} and dim2 {dim2} must be different dimensions"
            )
        rows, columns = self.array.shape[d1], self.array.shape[d2]
        offset = max(-rows, min(offset, columns))  # beyond the corner a diagonal is empty
        return apply(Diagonal, self, offset=offset, dim1=d1, dim2=d2)

    def diag(self, diagonal=0):
        """The diagonal of a matrix, or the matrix with a vector on its diagonal."""
        if self.array.ndim == 1:
            n = self.array.shape[0] + abs(diagonal)
            return apply(DiagonalScatter, self, shape=(n, n), place=(diagonal, 0, 1))
        _require("diag", self.array.ndim == 2, self, what="needs 1 or 2 dimensions; use diagonal()")
        return self.diagonal(diagonal).clone()

    def trace(self):
        """Sum of the main diagonal of a matrix."""
        _require("trace", self.array.ndim == 2, self, what="needs a 2-D tensor")
        return self.diagonal().sum()


def _product(a, b):
    _same_dtype("matmul", a, b)
    if a.array.ndim == 0 or b.array.ndim == 0:
        raise OpError("matmul: 0-d tensors have no matrix product; use *")
    if a.array.ndim > 1 and b.array.ndim > 1:
        return apply(MatMul, a, b)
    left, right = a.array.ndim == 1, b.array.ndim == 1
    product = apply(MatMul, a.unsqueeze(0) if left else a, b.unsqueeze(1) if right else b)
    if left:
        product = product.squeeze(-2)
    return product.squeeze(-1) if right else product


def _scaled_sum(name, base, product, beta, alpha):
    if modes.autocast:
        base, product = to_half((base, product))
    _same_dtype(name, base, product)
    try:
        np.broadcast_to(np.empty(base.array.shape, bool), product.array.shape)
    except ValueError:
        raise OpError(
            f"{name}: {tuple(base.array.shape)} does not broadcast to the product's shape {tuple(product.array.shape)}"
        ) from None
    if base.array.dtype.kind in "iu":
        alpha, beta = int(alpha), int(beta)
    if alpha != 1:
        product = product * alpha
    if beta == 0:
        return product  # not even a nan of `base` counts
    return product + (base if beta == 1 else base * beta)


def tensordot(a, b, dims=2):
    """Sum of products over the last `dims` dimensions of a and the first of b, or over (dims of a, dims of b)."""
    if is_tensor(dims):
        dims = dims.tolist()
    if isinstance(dims, int):
        if dims < 0:
            raise OpError(f"tensordot: dims must not be negative, got {dims}")
        da, db = list(range(a.array.ndim - dims, a.array.ndim)), list(range(dims))
    else:
        da, db = (
            [dim_index(d, t.array.ndim) for d in ([ds] if isinstance(ds, int) else ds)]
            for t, ds in zip((a, b), dims, strict=True)
        )
    sa, sb = a.array.shape, b.array.shape
    if len(da) != len(db) or any(sa[i] != sb[j] and 1 not in (sa[i], sb[j]) for i, j in zip(da, db, strict=True)):
        raise OpError(f"tensordot: {sa} and {sb}: sizes of dims {da} and {db} differ")
    for i, j in zip(da, db, strict=True):  # a size of 1 is summed against the other's sum, as in PyTorch
        if sa[i] == 1 != sb[j]:
            b = b.sum(j, keepdim=True)
        elif sb[j] == 1 != sa[i]:
            a = a.sum(i, keepdim=True)
    fa, fb = [d for d in range(a.array.ndim) if d not in da], [d for d in range(b.array.ndim) if d not in db]
    inner = int(np.prod([a.array.shape[d] for d in da], dtype=int))
    left = a.permute(fa + da).reshape(int(np.prod([sa[d] for d in fa], dtype=int)), inner)
    right = b.permute(db + fb).reshape(inner, int(np.prod([sb[d] for d in fb], dtype=int)))
    return left.matmul(right).reshape([sa[d] for d in fa] + [sb[d] for d in fb])


def einsum(equation, *operands):
    """Sums of products in Einstein's notation: einsum("bhqd,bhkd->bhqk", q, k). Composed of permute, sum and matmul, so
    products run in BLAS and gradients of every order follow."""
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    if not isinstance(equation, str):
        raise OpTypeError("einsum: the first argument must be an equation such as 'ij,jk->ik'")
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        raise OpError(f"einsum: {equation!r} names {len(terms)} operands, {len(operands)} given")
    spare = [c for c in string.ascii_letters if c not in equation]
    depth = max(
        (t.array.ndim - len(term.replace("...", "")) for term, t in zip(terms, operands, strict=True) if "..." in term),
        default=0,
    )
    dots = "".join(spare[:depth])
    parts, size = [], {}
    for term, t in zip(terms, operands, strict=True):
        own = t.array.ndim - len(term.replace("...", ""))
        letters = term.replace("...", dots[depth - own :] if own > 0 else "")
        if len(letters) != t.array.ndim or not letters.replace(".", "").isalpha() and letters:
            raise OpError(f"einsum: {equation!r}: term {term!r} does not fit shape {tuple(t.array.shape)}")
        for c, n in zip(letters, t.array.shape, strict=True):
            if size.get(c, 1) not in (1, n) and n != 1:
                raise OpError(f"einsum: {equation!r}: index {c!r} has sizes {size[c]} and {n}")
            size[c] = max(size.get(c, 1), n) if n and size.get(c, 1) else 0
        parts.append(_diagonals(t, letters))
    if arrow:
        result = right.replace("...", dots)
        if len(set(result)) != len(result) or any(c not in size for c in result):
            raise OpError(f"einsum: {equation!r}: the output must name each of its indices once, all from the inputs")
    else:
        counts = "".join(letters for _, letters in parts)
        every = left.replace("...", "").replace(",", "")
        result = dots + "".join(sorted(c for c in set(counts) if every.count(c) == 1))
    tensor, letters = parts[0]
    for k, (other, more) in enumerate(parts[1:], 2):
        later = set(result).union(*(set(p[1]) for p in parts[k:]))
        tensor, letters = _contract(tensor, letters, other, more, later, size)
    drop = tuple(i for i, c in enumerate(letters) if c not in result)
    if drop:
        tensor = tensor.sum(drop)
        letters = "".join(c for c in letters if c in result)
    return tensor.permute([letters.index(c) for c in result])


def _diagonals(tensor, letters):
    """Replace a letter that a term repeats by the diagonal."""
    for c in dict.fromkeys(letters):
        while letters.count(c) > 1:
            i = letters.index(c)
            j = letters.index(c, i + 1)
            if tensor.array.shape[i] != tensor.array.shape[j]:
                raise OpError(
                    f"einsum: repeated index {c!r} has sizes {tensor.array.shape[i]} and {tensor.array.shape[j]}"
                )
            tensor = tensor.diagonal(0, i, j)
            letters = letters[:i] + letters[i + 1 : j] + letters[j + 1 :] + c
    return tensor, letters


def _contract(a, la, b, lb, later, size):
    """Product of two terms, summed over letters that nobody needs later, as one batched matmul."""
    _same_dtype("einsum", a, b)
    for _ in range(2):  # letters of only one operand that are summed: sum them first
        drop = tuple(i for i, c in enumerate(la) if c not in lb and c not in later)
        if drop:
            a, la = a.sum(drop), "".join(c for c in la if c in lb or c in later)
        a, la, b, lb = b, lb, a, la
    both = [c for c in la if c in lb]
    batch, inner = [c for c in both if c in later], [c for c in both if c not in later]
    fa, fb = [c for c in la if c not in lb], [c for c in lb if c not in la]
    a = a.expand([size[c] if c in both else n for c, n in zip(la, a.array.shape, strict=True)])
    b = b.expand([size[c] if c in both else n for c, n in zip(lb, b.array.shape, strict=True)])

    def count(letters):
        return int(np.prod([size[c] for c in letters], dtype=int))

    lead = [size[c] for c in batch]
    x = a.permute([la.index(c) for c in batch + fa + inner]).reshape(lead + [count(fa), count(inner)])
    y = b.permute([lb.index(c) for c in batch + inner + fb]).reshape(lead + [count(inner), count(fb)])
    product = x.matmul(y).reshape(lead + [size[c] for c in fa + fb])
    return product, "".join(batch + fa + fb)
