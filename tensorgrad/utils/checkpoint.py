"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): time for memory."""

from functools import partial

from ..engine import Leaf, Op, Output, TensorBase, apply, modes, next_seq, wrap
from ..modes import enable_grad
from ..ops.nn import Alias
from ..random import get_rng_state, set_rng_state
from ..walk import parents_of, run_backward


def checkpoint(fn, *args, use_reentrant=False, **kwargs):
    """fn(*args, **kwargs) whose intermediate values are computed again in backward instead of being kept.

    fn must do the same again: random numbers such as dropout's are drawn from the same state, products take the same
    autocast. Gradients also reach what fn uses besides its arguments. args may be Tensors and anything else. Returns
    what fn returns: a Tensor or a tuple of them. use_reentrant is PyTorch's and changes nothing: there is one way."""
    fn = partial(fn, **kwargs) if kwargs else fn
    places = [i for i, a in enumerate(args) if isinstance(a, TensorBase)]
    tensors = [args[i] for i in places]
    if not modes.grad or not places:
        return fn(*args)
    state, start = get_rng_state(tensors[0].device), next_seq()
    aliases = [apply(Alias, t.detach().requires_grad_() if t.requires_grad else t) for t in tensors]
    with enable_grad():
        result = fn(*_put(args, places, aliases))
    outputs = result if isinstance(result, tuple) else (result,)
    leaves, results = _used_besides(outputs, start)
    arrays, recorded = [o.array for o in outputs], [o.requires_grad for o in outputs]
    several = isinstance(result, tuple)
    del result, outputs, aliases  # the graph of this first run ends here
    out = apply(
        _Checkpoint,
        *tensors,
        *leaves,
        *results,
        run=(fn, _put(args, places, [None] * len(places)), places),
        keep=len(tensors) + len(leaves),
        state=state,
        arrays=arrays,
    )
    for tensor, has_gradient in zip(out, recorded, strict=True):
        if not has_gradient:
            tensor.node = None
    return out if several else out[0]


def _put(args, places, tensors):
    args = list(args)
    for i, t in zip(places, tensors, strict=True):
        args[i] = t
    return args


def _used_besides(outputs, start):
    """What leads to `outputs` and was there before the number `start`: leaves, and for results of operations stand-ins
    without memory."""
    seen, leaves, results = set(), [], []
    stack = [(o._current_node(), o.array.shape, o.array.dtype, o.device) for o in outputs]
    while stack:
        node, shape, dtype, device = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.seq > start:
            op = node.op if isinstance(node, Output) else node
            given = op.inputs if isinstance(op, Op) else ()
            parents = parents_of(op)
            stack += [(p, *like, op.source or op.device) for p, like in zip(parents, given, strict=True)]
        elif not isinstance(node, Leaf):
            results.append(wrap(device.xp.broadcast_to(device.xp.zeros((), dtype), shape), device, node))
        elif (leaf := node.tensor()) is not None:
            leaves.append(leaf)
    return leaves, results


class _Checkpoint(Op):
    name = "checkpoint"

    def forward(ctx, *inputs, run, keep, state, arrays):
        ctx.run, ctx.state, ctx.autocast = run, state, modes.autocast
        ctx.save(*inputs[:keep])
        return tuple(arrays)

    def backward(ctx, *gradients):
        fn, rest, places = ctx.run
        saved = ctx.saved
        with enable_grad():
            aliases = [apply(Alias, t) for t in saved[: len(places)]]
            now = get_rng_state(ctx.device), modes.autocast
            set_rng_state(ctx.state, ctx.device)
            modes.autocast = ctx.autocast
            try:
                result = fn(*_put(rest, places, aliases))
            finally:
                set_rng_state(now[0], ctx.device)
                modes.autocast = now[1]
        outputs = result if isinstance(result, tuple) else (result,)
        if [(o.shape, o.dtype) for o in outputs] != ctx._outputs:
            raise RuntimeError(
                "checkpoint: the function gave other shapes or dtypes when it ran again: it must depend "
                "on its arguments and parameters alone"
            )
        nodes = [a.node for a in aliases] + list(ctx.parents[len(places) :])
        roots = [(o.node, g) for o, g in zip(outputs, gradients, strict=True) if o.node is not None and g is not None]
        found = run_backward(roots, modes.grad, modes.grad, {n for n in nodes if n is not None}, stop=True)
        return tuple(found.get(n) for n in nodes)
