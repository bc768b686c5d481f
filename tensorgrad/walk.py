"""The walk backward through the graph: hands gradients from node to node and adds them up.

`run_backward` always takes the node created last of those that have received a gradient, so a node comes up only after
everything that used its result: no recursion, no sorting beforehand. Who owns a gradient: see `docs/engine.md`.
"""

from heapq import heappop, heappush

from .engine import LARGE, Leaf, Output, hooks, modes, wrap
from .kernels import routines


def run_backward(roots, retain_graph, create_graph, targets=None, stop=False):
    """Walk the graph from `roots` = [(node, gradient Tensor)].

    Without `targets`, gradients accumulate in the leaves' .grad. With `targets` (a set of nodes) only paths to them are
    walked, nothing is accumulated, and a dict node -> gradient is returned; `stop` ends a path at its first target."""
    needed = None if targets is None else _leading_to([node for node, _ in roots], targets, stop)
    pending, heap, captured = {}, [], {}
    for node, gradient in roots:
        if needed is None or node in needed:
            _add(pending, heap, node, gradient, False, create_graph)
    before = modes.grad, modes.direct
    modes.grad, modes.direct = create_graph, targets is None and not create_graph and not hooks
    try:
        while heap:
            node = heappop(heap)[1]
            gradient, owned = pending.pop(node)
            if node.hooks:
                for hook in list(node.hooks.values()):
                    changed = hook(gradient)
                    owned = False  # a hook may keep what it sees
                    if changed is not None:
                        gradient = _checked(node, gradient, changed)
            if targets is not None and node in targets:
                captured[node] = gradient
                if stop:
                    continue
            if node.__class__ is Leaf:
                if targets is None:
                    node.accumulate(gradient, owned, create_graph)
            elif node.__class__ is Output:
                op = node.op
                slots = pending.get(op)
                if slots is None:
                    slots = pending[op] = ([None] * len(op._outputs), True)
                    heappush(heap, (-op.seq, op))
                before_it = slots[0][node.index]  # a saved output has an Output of its own
                slots[0][node.index] = gradient if before_it is None else before_it + gradient
            else:
                gradients = (gradient,) if node._outputs is None else gradient
                results = node._backward(gradients, retain_graph)
                fresh = node.fresh
                for parent, result in zip(node.parents, results, strict=True):
                    if result is not None and parent is not None and (needed is None or parent in needed):
                        _add(pending, heap, parent, result, fresh, create_graph)
    finally:
        modes.grad, modes.direct = before
    return captured


def _checked(node, before, after):
    """What a hook made of a gradient, which must fit where the gradient did."""
    if after.array.shape != before.array.shape or after.array.dtype != before.array.dtype:
        raise RuntimeError(
            f"register_hook: a hook on `{node.name}` was given a gradient of shape {before.shape} and dtype "
            f"{before.dtype} and returned one of shape {after.shape} and dtype {after.dtype}"
        )
    return after


def _add(pending, heap, node, gradient, fresh, create_graph):
    """Add to the gradient waiting for `node`: borrow the first contribution, allocate on the second, then in place."""
    entry = pending.get(node)
    if entry is None:
        pending[node] = (gradient, fresh)
        heappush(heap, (-node.seq, node))
    elif create_graph:
        pending[node] = (entry[0] + gradient, False)
    else:
        old, device = entry[0].array, gradient.device
        plus = routines(device).add if old.size >= LARGE else device.xp.add
        total = plus(old, gradient.array, out=old if entry[1] else None)
        pending[node] = (wrap(total, device), True)  # another Tensor: what is known of the first does not hold for it


def _leading_to(roots, targets, stop):
    """The nodes reachable from `roots` from which a target is reachable, without recursion: collect what is reachable,
    then mark in order of creation (parents always come first)."""
    reachable, stack = set(), list(roots)
    while stack:
        node = stack.pop()
        if node is not None and node not in reachable:
            reachable.add(node)
            if not (stop and node in targets):
                stack.extend(parents_of(node))
    needed = set()
    for node in sorted(reachable, key=lambda node: node.seq):
        if node in targets or any(parent in needed for parent in parents_of(node)):
            needed.add(node)
    return needed


def parents_of(node):
    """The nodes that a node hands its gradient to (None where none is wanted)."""
    if node.__class__ is Leaf:
        return ()
    return (node.op,) if node.__class__ is Output else node.parents
