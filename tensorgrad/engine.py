"""The autograd engine: records operations as a graph of nodes, through which `walk.py` goes backward. Knows no
operation by name.

How it works, in five sentences. `apply(op, *tensors)` runs `op.forward` on raw arrays and, where an input requires a
gradient, keeps the Op instance as the *node* of the result. A node holds its parents (nodes, never Tensors) and what
the op saved, so a Tensor that nobody uses any more gives its memory back at once. Nodes are numbered in the order of
their creation, which is a topological order: the walk always takes the highest number left, iteratively, so depth does
not matter. An op's `backward` is written with Tensor methods; with `create_graph` these are recorded as well, and
gradients of any order follow from one text. The engine, not the op, sums each gradient down to its input's shape, casts
it to the input's dtype and adds up several contributions.

Ownership: the first contribution to a gradient is borrowed (it may be anybody's array), the second allocates the sum,
later ones add in place; a leaf's `.grad` is copied unless the array is known to be nobody else's. This is what makes
`x + x` and shared intermediates right. See `docs/engine.md`.
"""

import threading
from itertools import count
from weakref import ref

from . import errors

LARGE = 1 << 16  # elements from which a sum is worth several threads
next_seq = count(1).__next__


class _Modes(threading.local):
    grad = True  # are operations recorded?
    inference = False  # are results marked as never to be recorded?
    autocast = None  # {device type: 16-bit dtype of products, or None} inside amp.autocast
    direct = False  # may operations add to leaves' gradients themselves? (only in a plain backward)
    module_path = None  # a list of module names while somebody traces (detect_anomaly, profile), else None


modes = _Modes()
hooks = []  # active OpHooks, innermost last; empty (and free of cost) normally


class OpHook:
    """Sees every operation of the process; a profiler, tracer or drawer overrides what it needs.

    `op` is the Op instance (also the graph node where one is recorded), arrays are raw, gradients are Tensors, those
    of the inputs as the op returned them, before they are summed to the inputs' shapes and cast to their dtypes."""

    def before_forward(self, op, arrays): ...
    def after_forward(self, op, arrays, outputs): ...
    def before_backward(self, op, gradients): ...
    def after_backward(self, op, gradients, input_gradients): ...


class TensorBase:
    """What the engine knows of a Tensor. Class attributes are the defaults of what few tensors have."""

    array = None  # the NumPy or CuPy array
    device = None
    node = None  # the graph node that produced it; a Leaf where the user asked for a gradient; else None
    grad = None
    _version = None  # [writes, graph rebases], shared by all views of a storage; made when first needed
    _view = None  # (base Tensor, rebases when made) of a view
    _grad_buffer = None  # array into which a leaf's gradient is accumulated (flat optimizer storage)
    _inference = False
    _half = None  # (array, writes when made, its 16-bit copy), for products under autocast

    def version(self):
        if self._version is None:
            self._version = [0, 0]
        return self._version

    def _current_node(self):
        """The node, after any write through another view of the same memory."""
        view = self._view
        return self._refresh_view() if view is not None and view[0]._version[1] != view[1] else self.node

    def _bump(self):
        """Record that the values were changed in place."""
        self.version()[0] += 1


_tensor_class = TensorBase


def bind(tensor_class):
    """Tell the engine which class results have (tensor.py does so, once)."""
    global _tensor_class
    _tensor_class = tensor_class


def wrap(array, device, node=None):
    """A Tensor around `array`, which it shares. NumPy's scalars become 0-d arrays."""
    tensor = _tensor_class.__new__(_tensor_class)
    tensor.array = array if array.__class__ is device.ndarray else device.xp.asarray(array)
    tensor.device = device
    if node is not None:
        tensor.node = node
    return tensor


class Leaf:
    """The end of the graph at a tensor that requires a gradient; holds it weakly."""

    __slots__ = ("seq", "tensor", "hooks", "__weakref__")
    name = "leaf"

    def __init__(self, tensor):
        self.seq, self.tensor, self.hooks = next_seq(), ref(tensor), None

    def _wanting(self):
        """The tensor, where it is still there and its gradient still wanted: parameters may be frozen meanwhile."""
        tensor = self.tensor()
        return tensor if tensor is not None and tensor.node is self else None

    def direct(self):
        """(array, add?): where an operation may put its contribution itself, added to what is there or in its place,
        instead of returning an array to be copied; None where that is not possible."""
        tensor = self._wanting()
        if tensor is None or self.hooks:
            return None
        old = tensor.grad
        if old is None:
            buffer, tensor._grad_buffer = tensor._grad_buffer, None
            if buffer is None:
                return None
            tensor.grad = wrap(buffer, tensor.device)
            return buffer, False
        if old.node is not None or not old.array.flags.c_contiguous:
            return None
        old._bump()
        return old.array, True

    def accumulate(self, gradient, owned, create_graph):
        """Add into the tensor's .grad, which never shares memory with anything else."""
        tensor = self._wanting()
        if tensor is None:
            return
        old, buffer = tensor.grad, tensor._grad_buffer
        if create_graph:
            tensor.grad = gradient if old is None else old + gradient
        elif old is not None:
            if old.node is None:
                old.array += gradient.array
                old._bump()
            else:
                tensor.grad = wrap(old.array + gradient.array, tensor.device)
        elif buffer is not None:
            buffer[...] = gradient.array
            tensor.grad = wrap(buffer, tensor.device)
            tensor._grad_buffer = None  # lent once, until the optimizer lends again
        else:
            tensor.grad = wrap(gradient.array if owned else gradient.array.copy(), tensor.device)


class Output:
    """One output of an operation with several; hands its gradient to the operation's node."""

    __slots__ = ("seq", "op", "index", "hooks", "__weakref__")

    def __init__(self, op, index):
        self.seq, self.op, self.index, self.hooks = next_seq(), op, index, None

    @property
    def name(self):
        return self.op.name


class Op:
    """An operation; an instance is one application of it, and its node in the graph.

    Subclasses define `forward(ctx, *arrays, **options)` on raw arrays of the module `ctx.xp`, returning an array or a
    tuple of arrays, and `backward(ctx, *gradients)` on Tensors, returning a gradient or None per input (a tuple where
    there are several inputs). `view = True` says that the output shares the first input's memory; `fresh = True` that
    gradients returned by backward are newly allocated and unshared; `symbol` and `explain` shape error messages."""

    view = False
    fresh = False
    source = None  # the inputs' device where it differs from the output's (a copy between devices)
    parents = ()  # nodes of the inputs (None: no gradient wanted); filled in when recorded
    recording = False
    hooks = None
    retain = False  # in backward: will what was saved be needed again?
    trace = None  # where it was created, while somebody traces
    _saved = ()
    _outputs = None  # several outputs: their (shape, dtype)

    def __init_subclass__(cls):
        cls.name = cls.__dict__.get("name") or _snake(cls.__name__)

    symbol = ","  # stands between the operands in error messages

    def explain(ctx, arrays, options):
        """A better reason than NumPy's for the failure of forward on these inputs, or None."""

    def forward(ctx, *arrays, **options):
        raise TypeError(f"{type(ctx).__name__} defines no forward")

    def backward(ctx, *gradients):
        raise RuntimeError(f"{ctx.name} is not differentiable")

    @property
    def needs(ctx):
        """For each input: is its gradient wanted?"""
        return [parent is not None for parent in ctx.parents]

    def direct(ctx, i):
        """Where backward may put the gradient of input i itself, and return None for it: see `Leaf.direct`."""
        parent = ctx.parents[i]
        return parent.direct() if modes.direct and parent.__class__ is Leaf else None

    def save(ctx, *arrays):
        """Keep arrays (inputs, outputs, intermediates or None) for backward; only what it needs."""
        ctx._saved = arrays

    def _link_saved(ctx, inputs, out, tensor):
        """Turn what was saved into (array, its node, version list, version): inputs and the output are found by
        identity, so that backward of backward reaches them. For the output the node is True, meaning this one,
        because a node that held itself would be freed only by the cyclic garbage collector; for one of several outputs
        (`out` and `tensor` are tuples then) its number."""
        entries = []
        for array in ctx._saved:
            entry = (array, None, None, 0)
            if array is not None:
                if array is out:
                    version = tensor.version()
                    entry = (tensor.array, True, version, version[0])
                elif out.__class__ is tuple and any(array is each for each in out):
                    i = next(i for i, each in enumerate(out) if each is array)
                    version = tensor[i].version()
                    entry = (tensor[i].array, i, version, version[0])
                else:
                    for i, source in enumerate(inputs):
                        if source.array is array:
                            if source._inference:
                                raise RuntimeError(
                                    f"{ctx.name}: a tensor made under inference_mode cannot be saved "
                                    "for backward; clone() it outside inference_mode first"
                                )
                            version = source.version()
                            entry = (array, ctx.parents[i], version, version[0])
                            break
            entries.append(entry)
        ctx._saved = entries

    @property
    def saved(ctx):
        """What `save` kept, as Tensors connected to the graph (None stays None)."""
        if ctx._saved is None:
            raise RuntimeError(errors.freed(ctx))
        out = []
        for array, node, version, number in ctx._saved:
            if version is not None and version[0] != number:
                raise RuntimeError(errors.stale(ctx, array, number, version[0]))
            if node is True:
                node = ctx
            elif node.__class__ is int:
                node = Output(ctx, node)
            out.append(None if array is None else wrap(array, ctx.device, node))
        return out

    def _backward(ctx, gradients, retain):
        """Input gradients, matched to the inputs' shapes and dtypes."""
        if ctx.device.switch:
            ctx.device.use()
        if ctx.retain is not retain:
            ctx.retain = retain
        for hook in hooks:
            hook.before_backward(ctx, gradients)
        result = ctx.backward(*gradients)
        if result.__class__ is not tuple:
            result = (result,)
        for hook in reversed(hooks):
            hook.after_backward(ctx, gradients, result)
        if len(result) != len(ctx.parents):
            raise RuntimeError(f"{ctx.name}: backward returned {len(result)} gradients for {len(ctx.parents)} inputs")
        matched = []
        for gradient, parent, (shape, dtype) in zip(result, ctx.parents, ctx.inputs, strict=True):
            if gradient is not None and parent is not None:
                array = gradient.array
                if array.shape != shape:
                    gradient = _unbroadcast(ctx, gradient, shape)
                if array.dtype != dtype:
                    gradient = gradient.to(dtype)
                if gradient.device is not (ctx.source or ctx.device):
                    raise RuntimeError(
                        f"{ctx.name}: backward returned a gradient on {gradient.device}, its input is "
                        f"on {ctx.source or ctx.device}"
                    )
            matched.append(gradient)
        if not retain and ctx._saved:
            ctx._saved = None
        return matched


def _snake(name):
    return "".join(
        "_" + c.lower() if c.isupper() and i and not name[i - 1].isupper() else c.lower() for i, c in enumerate(name)
    )


def _unbroadcast(op, gradient, shape):
    """Sum a gradient over the axes along which the input was broadcast: the one place where this happens."""
    lead = gradient.array.ndim - len(shape)
    given = gradient.array.shape[lead:] if lead >= 0 else None
    if given is None or any(s not in (1, g) for s, g in zip(shape, given, strict=True)):
        raise RuntimeError(
            f"{op.name}: backward returned a gradient of shape {gradient.array.shape} for an input of shape {shape}"
        )
    axes = tuple(range(lead)) + tuple(lead + i for i, s in enumerate(shape) if s == 1 != given[i])
    return gradient.sum(axes, keepdim=True).reshape(shape)


def apply(op, *inputs, **options):
    """Run an operation on Tensors; record it where a gradient is wanted. Returns a Tensor or a tuple of Tensors."""
    ctx = op()
    try:
        arrays = [t.array for t in inputs]
        parents = [t.node for t in inputs]
        device = inputs[0].device
    except AttributeError:
        raise TypeError(errors.not_a_tensor(op, inputs)) from None
    ctx.xp, ctx.device = device.xp, device
    if device.switch:
        device.use()
    for i, tensor in enumerate(inputs):
        if tensor.device is not device:
            device, arrays = errors.unify_devices(op, inputs)
            ctx.xp, ctx.device = device.xp, device
            break
        if tensor._view is not None:
            parents[i] = tensor._current_node()
    if modes.grad:
        for parent in parents:
            if parent is not None:
                ctx.recording, ctx.parents = True, parents
                break
    if hooks:
        for hook in hooks:
            hook.before_forward(ctx, arrays)
    try:
        out = ctx.forward(*arrays, **options)
    except errors.OpError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise errors.op_error(ctx, arrays, options, error) from error
    if out.__class__ is tuple:
        return _finish_several(ctx, inputs, arrays, out)
    # the body of wrap(), in place: this is the hottest path of the package
    tensor = _tensor_class.__new__(_tensor_class)
    tensor.device = device = ctx.device
    tensor.array = out if out.__class__ is device.ndarray else device.xp.asarray(out)
    if ctx.recording:
        if len(arrays) == 2:
            a, b = arrays
            ctx.inputs = ((a.shape, a.dtype), (b.shape, b.dtype))
        else:
            ctx.inputs = [(a.shape, a.dtype) for a in arrays]
        ctx.seq = next_seq()
        tensor.node = ctx
        if ctx._saved:
            ctx._link_saved(inputs, out, tensor)
    if ctx.view:
        _share_storage(tensor, inputs[0])
    if modes.inference:
        tensor._inference = True
    if hooks:
        for hook in reversed(hooks):
            hook.after_forward(ctx, arrays, (tensor,))
    return tensor


def _finish_several(ctx, inputs, arrays, out):
    """The end of `apply` for an operation with several outputs: each gets an Output node of its own."""
    tensors = tuple(wrap(array, ctx.device) for array in out)
    if ctx.recording:
        ctx.inputs = [(a.shape, a.dtype) for a in arrays]
        ctx._outputs = [(t.array.shape, t.array.dtype) for t in tensors]
        ctx.seq = next_seq()
        for i, tensor in enumerate(tensors):
            tensor.node = Output(ctx, i)
        if ctx._saved:
            ctx._link_saved(inputs, out, tensors)
    for tensor in tensors:
        if ctx.view:
            _share_storage(tensor, inputs[0])
        tensor._inference = modes.inference
    for hook in reversed(hooks):
        hook.after_forward(ctx, arrays, tensors)
    return tensors


def _share_storage(tensor, source):
    """A view shares its base's version counter and remembers the base, for in-place writes through it."""
    tensor._version = version = source.version()
    base = source if source._view is None else source._view[0]
    tensor._view = (base, version[1])


LAST = "last"  # key of the hook that sees what all others have made of a gradient: that of retain_grad


def add_hook(tensor, hook, key=None):
    """Call `hook(gradient)` when the gradient of `tensor` is complete; what it returns (unless None) replaces it.
    Returns a function that removes the hook."""
    node = tensor._current_node()
    if node is None:
        raise RuntimeError("register_hook: the tensor does not require a gradient")
    if node.hooks is None:
        node.hooks = {}
    key = key or next_seq()
    table = node.hooks
    table[key] = hook
    if LAST in table:
        table[LAST] = table.pop(LAST)
    return lambda: table.pop(key, None)
