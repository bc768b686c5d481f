"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): time for memory."""


from ..engine import Leaf, Op, TensorBase, apply, modes
from ..modes import enable_grad
from ..ops.nn import Alias
from ..random import get_rng_state, set_rng_state
from ..walk import parents_of, run_backward


def checkpoint(fn, *args):
    """fn(*args) whose intermediate values are computed again in backward instead of being kept.

    fn must be a function of its arguments and of parameters (leaves); random numbers such as dropout's are drawn again
    from the same state. args may be Tensors and anything else. Returns what fn returns: a Tensor or a tuple of them."""
    places = [i for i, a in enumerate(args) if isinstance(a, TensorBase)]
    tensors = [args[i] for i in places]
    if not modes.grad or not places:
        return fn(*args)
    state = get_rng_state(tensors[0].device)
    aliases = [apply(Alias, t.detach().requires_grad_() if t.requires_grad else t) for t in tensors]
    inputs = {a.node for a in aliases}
    with enable_grad():
        result = fn(*_put(args, places, aliases))
    outputs = result if isinstance(result, tuple) else (result,)
    parameters = [p for p in _leaves([o.node for o in outputs], inputs) if p is not None]
    arrays = [o.array for o in outputs]
    del result, outputs, aliases  # the graph of this first run ends here
    out = apply(
        _Checkpoint,
        *tensors,
        *parameters,
        run=(fn, _put(args, places, [None] * len(places)), places),
        state=state,
        arrays=arrays,
    )
    return out if len(arrays) > 1 else out[0]


def _put(args, places, tensors):
    args = list(args)
    for i, t in zip(places, tensors, strict=True):
        args[i] = t
    return args


def _leaves(nodes, stop):
    """The leaf tensors that lead to `nodes` without passing through `stop`."""
    seen, stack, found = set(), list(nodes), []
    while stack:
        node = stack.pop()
        if node is None or node in seen or node in stop:
            continue
        seen.add(node)
        if isinstance(node, Leaf):
            found.append(node.tensor())
        stack.extend(parents_of(node))
    return found


class _Checkpoint(Op):
    name = "checkpoint"

    def forward(ctx, *inputs, run, state, arrays):
        ctx.run, ctx.state = run, state
        ctx.save(*inputs)
        return tuple(arrays)

    def backward(ctx, *gradients):
        fn, rest, places = ctx.run
        saved = ctx.saved
        with enable_grad():
            aliases = [apply(Alias, t) for t in saved[: len(places)]]
            now = get_rng_state(ctx.device)
            set_rng_state(ctx.state, ctx.device)
            try:
                result = fn(*_put(rest, places, aliases))
            finally:
                set_rng_state(now, ctx.device)
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
