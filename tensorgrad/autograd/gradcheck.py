"""gradcheck: compare gradients with central differences, entry by entry, in float64.

The full Jacobian is compared by default, because a random direction with a scaled tolerance lets real bugs pass; a
random, non-uniform cotangent is used besides, because a sum hides transposed and permuted gradients. Also checked: the
gradient's dtype and shape, and that a second backward gives the same bits.
"""

import numpy as np

from ..engine import OpHook, TensorBase, wrap
from ..modes import enable_grad
from .backward import grad
from .hooks import op_hook


class GradcheckError(RuntimeError):
    """The gradient is wrong; the message shows where and by how much."""


def gradcheck(func, inputs, *, eps=1e-6, atol=1e-5, rtol=1e-3, raise_exception=True, seed=0):
    """Check the gradients of `func(*inputs)` against (f(x + eps) - f(x - eps)) / (2 eps).

    inputs: Tensors (float64 where they require a gradient) and other arguments. Returns True, or raises GradcheckError
    (returns False with raise_exception=False) where |numeric - analytic| > atol + rtol |numeric|."""
    try:
        with op_hook(_DtypeCheck()):
            _check(func, _tuple(inputs), eps, atol, rtol, seed)
    except GradcheckError:
        if raise_exception:
            raise
        return False
    return True


def gradgradcheck(func, inputs, grad_outputs=None, *, eps=1e-6, atol=1e-5, rtol=1e-3, raise_exception=True, seed=0):
    """gradcheck of the gradient itself: second derivatives. grad_outputs are random unless given."""
    inputs = _tuple(inputs)
    outputs = [o for o in _tuple(func(*inputs)) if o.requires_grad]
    if grad_outputs is None:
        rng = np.random.default_rng(seed)
        grad_outputs = [
            wrap(o.device.asarray(rng.uniform(0.5, 1.5, o.shape)), o.device).requires_grad_() for o in outputs
        ]
    grad_outputs = _tuple(grad_outputs)
    count = len(inputs)

    def first_order(*everything):
        xs, gs = everything[:count], everything[count:]
        found = [o for o in _tuple(func(*xs)) if o.requires_grad]
        wanted = [x for x in xs if _wanted(x)]
        gradients = grad(found, wanted, list(gs), create_graph=True, allow_unused=True)
        return tuple(g for g in gradients if g is not None and g.requires_grad)

    return gradcheck(
        first_order, inputs + grad_outputs, eps=eps, atol=atol, rtol=rtol, raise_exception=raise_exception, seed=seed
    )


def _check(func, inputs, eps, atol, rtol, seed):
    wanted = [(i, x) for i, x in enumerate(inputs) if _wanted(x)]
    if not wanted:
        raise ValueError("gradcheck: no input requires a gradient")
    for i, x in wanted:
        if x.dtype != np.float64:
            raise ValueError(f"gradcheck: input {i} is {x.dtype}; differences need float64")
        if 0 in x.array.strides and x.array.size > 1:
            raise ValueError(f"gradcheck: input {i} shares memory with itself (expand); clone() it first")
    rng = np.random.default_rng(seed)
    with enable_grad():
        outputs = _tuple(func(*inputs))
    leaves = [x for _, x in wanted]
    for k, out in enumerate(outputs):
        if not isinstance(out, TensorBase) or out.dtype.kind != "f":
            continue
        numeric = _numeric(func, inputs, wanted, k, eps)
        if not out.requires_grad:
            if any((n != 0).any() for n in numeric):
                raise GradcheckError(f"gradcheck: output {k} does not require a gradient but changes with the inputs")
            continue
        analytic = _analytic(out, leaves, wanted)
        for (i, x), n, a in zip(wanted, numeric, analytic, strict=True):
            _compare(f"Jacobian of output {k} {out.shape} by input {i} {x.shape}", n, a, atol, rtol, out.shape, x.shape)
        # all outputs at once against a random cotangent; and again: the bits must not change
        cotangent = wrap(out.device.asarray(rng.uniform(-1, 1, out.shape)), out.device)
        first = grad(out, leaves, cotangent, retain_graph=True, allow_unused=True)
        second = grad(out, leaves, cotangent, retain_graph=True, allow_unused=True)
        v = out.device.to_numpy(cotangent.array).reshape(-1)
        for (i, x), n, g, again in zip(wanted, numeric, first, second, strict=True):
            got = np.zeros(x.shape) if g is None else x.device.to_numpy(g.array)
            _compare(
                f"gradient of input {i} {x.shape} for a random cotangent of output {k}",
                (n @ v).reshape(-1, 1),
                got.reshape(-1, 1),
                atol,
                rtol,
                (),
                x.shape,
            )
            if g is not None and not np.array_equal(got, x.device.to_numpy(again.array), equal_nan=True):
                raise GradcheckError(
                    f"gradcheck: input {i}: a second backward gave another gradient (not deterministic)"
                )


class _DtypeCheck(OpHook):
    """An op must return gradients in the dtype of its input or of what it got: the engine casts the rest away, which
    would hide lost digits."""

    def after_backward(self, op, gradients, input_gradients):
        given = {g.dtype for g in gradients if g is not None}
        for i, g in enumerate(input_gradients):
            if g is not None and g.dtype not in given and g.dtype != op.inputs[i][1]:
                raise GradcheckError(
                    f"gradcheck: backward of {op.name} returned a {g.dtype} gradient for input {i}, "
                    f"which is {op.inputs[i][1]}"
                )


def _numeric(func, inputs, wanted, k, eps):
    """For each wanted input: d output_k / d input as an (input size, output size) array."""
    tables = []
    for _, x in wanted:
        flat_index = np.ndindex(*x.shape)
        rows = []
        for index in flat_index:
            keep = x.array[index].copy()
            values = []
            for step in (eps, -eps):
                x.array[index] = keep + step
                out = _tuple(func(*inputs))[k]
                values.append(out.device.to_numpy(out.array).astype(np.float64).reshape(-1).copy())
            x.array[index] = keep
            rows.append((values[0] - values[1]) / (2 * eps))
        size = _size(func, inputs, k) if not rows else len(rows[0])
        tables.append(np.array(rows).reshape(x.array.size, size))
    return tables


def _size(func, inputs, k):
    return _tuple(func(*inputs))[k].array.size


def _analytic(out, leaves, wanted):
    """The same tables from backward, one output element at a time; dtype and shape are checked on the way."""
    tables = [np.zeros((x.array.size, out.array.size)) for x in leaves]
    for j in range(out.array.size):
        unit = np.zeros(out.array.size)
        unit[j] = 1
        cotangent = wrap(out.device.asarray(unit.reshape(out.shape)), out.device)
        for table, (i, x), g in zip(
            tables, wanted, grad(out, leaves, cotangent, retain_graph=True, allow_unused=True), strict=True
        ):
            if g is None:
                continue
            if g.shape != x.shape or g.dtype != x.dtype:
                raise GradcheckError(
                    f"gradcheck: the gradient of input {i} is {g.dtype} {g.shape}, the input {x.dtype} {x.shape}"
                )
            table[:, j] = x.device.to_numpy(g.array).reshape(-1)
    return tables


def _compare(what, numeric, analytic, atol, rtol, out_shape, in_shape):
    wrong = ~np.isclose(analytic, numeric, rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return
    places = np.argwhere(wrong)
    lines = [f"gradcheck: {what}: {len(places)} of {wrong.size} entries differ"]
    worst = sorted(places.tolist(), key=lambda p: -abs(numeric[tuple(p)] - analytic[tuple(p)]))
    for row, column in worst[:5]:
        place = f"input{np.unravel_index(row, in_shape or (1,))}"
        if out_shape != ():
            place += f" output{np.unravel_index(column, out_shape)}"
        place = place.replace("np.int64(", "").replace("),", ",").replace("))", ")")
        lines.append(f"  {place}: numeric {numeric[row, column]:.8g}, analytic {analytic[row, column]:.8g}")
    raise GradcheckError("\n".join(lines))


def _wanted(x):
    return isinstance(x, TensorBase) and x.requires_grad


def _tuple(value):
    return tuple(value) if isinstance(value, tuple | list) else (value,)
