"""One formatter for what goes wrong in an operation: its name, shapes, dtypes, devices, and the remedy."""


class OpError(ValueError, RuntimeError):
    """An operation refused its inputs. Both a ValueError (NumPy's habit) and a RuntimeError (PyTorch's)."""


class OpIndexError(OpError, IndexError):
    """A dimension or index out of range."""


class OpTypeError(OpError, TypeError):
    """A wrong dtype or type of argument."""


def describe(arrays, symbol=","):
    """Shapes of the operands, their dtypes where these differ, and the devices where not the CPU."""
    shapes = f"{'' if symbol == ',' else ' '}{symbol} ".join(str(tuple(a.shape)) for a in arrays)
    dtypes = [str(a.dtype) for a in arrays]
    text = shapes + (f" [{', '.join(dtypes)}]" if len(set(dtypes)) > 1 else "")
    return text


def op_error(ctx, arrays, options, error):
    """The exception to raise when `ctx.forward(*arrays, **options)` failed with `error`."""
    reason = ctx.explain(arrays, options) or str(error)
    given = "".join(
        f", {k}={v!r}" for k, v in options.items() if isinstance(v, int | float | str | tuple | list | None)
    )
    kind = OpIndexError if isinstance(error, IndexError) else OpTypeError if isinstance(error, TypeError) else OpError
    return kind(f"{ctx.name}: {describe(arrays, ctx.symbol)}{given}: {reason}")


def not_a_tensor(op, inputs):
    wrong = next((x for x in inputs if not hasattr(x, "node")), None)
    return f"{op.name}: expected a Tensor, got {type(wrong).__name__}; make one with tg.tensor(...)"


def unify_devices(op, inputs):
    """The device on which an operation with inputs on several runs: 0-d CPU tensors go along, others are an error."""
    devices = {t.device for t in inputs if t.array.ndim or t.device.type != "cpu"}
    if len(devices) != 1:
        where = ", ".join(f"{tuple(t.array.shape)} on {t.device}" for t in inputs)
        raise OpError(f"{getattr(op, 'name', op)}: inputs are on different devices: {where}; move one with .to(device)")
    device = devices.pop()
    return device, [device.asarray(t.array) for t in inputs]


def freed(op):
    where = f" (created at {op.trace.line})" if op.trace else ""
    return (
        f"the graph of `{op.name}`{where} was already freed by a backward pass; pass retain_graph=True to the "
        "first one if you need a second"
    )


def stale(op, array, expected, actual):
    where = f", created at {op.trace.line}," if op.trace else ""
    return (
        f"`{op.name}`{where} needs a value of shape {tuple(array.shape)} for its gradient that was changed by an "
        f"in-place operation: it was saved at version {expected} and is at version {actual} now; "
        "use the out-of-place operation or clone() before changing it"
    )
