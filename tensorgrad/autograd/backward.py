"""backward and grad: what users call to walk the graph."""

from ..engine import wrap
from ..walk import run_backward


def backward(tensors, grad_tensors=None, retain_graph=None, create_graph=False, inputs=None):
    """Accumulate the gradients of the sum of `tensors` (each weighted by its grad_tensor) into the .grad of the leaves.

    grad_tensors: same shapes as the tensors; may be None for single elements. retain_graph: keep saved values for
    another backward (default: create_graph). create_graph: record the backward pass itself. inputs: accumulate only
    into these leaves."""
    roots = _roots(tensors, grad_tensors)
    retain_graph = create_graph if retain_graph is None else retain_graph
    if inputs is None:
        run_backward(roots, retain_graph, create_graph)
        return
    inputs = _sequence(inputs)
    found = run_backward(roots, retain_graph, create_graph, {_node(t, "backward") for t in inputs})
    for tensor in dict.fromkeys(inputs):
        gradient = found.get(tensor.node)
        if gradient is not None:
            if tensor.is_leaf:
                tensor.node.accumulate(gradient, False, create_graph)
            else:
                tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient


def grad(
    outputs,
    inputs,
    grad_outputs=None,
    retain_graph=None,
    create_graph=False,
    allow_unused=None,
    materialize_grads=False,
):
    """The gradients of the sum of `outputs` with respect to `inputs`, as a tuple; no .grad is touched.

    allow_unused: None for an input that the outputs do not depend on, instead of an error. materialize_grads: zeros
    for it. Other arguments as in `backward`."""
    inputs = _sequence(inputs)
    nodes = [_node(t, "grad") for t in inputs]
    retain_graph = create_graph if retain_graph is None else retain_graph
    found = run_backward(_roots(outputs, grad_outputs), retain_graph, create_graph, set(nodes))
    gradients = []
    for i, (tensor, node) in enumerate(zip(inputs, nodes, strict=True)):
        gradient = found.get(node)
        if gradient is None:
            if materialize_grads:
                gradient = tensor.new_zeros(tensor.shape)
            elif not allow_unused:
                raise RuntimeError(
                    f"grad: the outputs do not depend on input {i} of shape {tensor.shape}; pass "
                    "allow_unused=True to get None for it"
                )
        gradients.append(gradient)
    return tuple(gradients)


def _sequence(value):
    return list(value) if isinstance(value, tuple | list) else [value]


def _node(tensor, name):
    if not tensor.requires_grad:
        raise RuntimeError(
            f"{name}: an input of shape {tensor.shape} does not require a gradient; set "
            "requires_grad=True before using it"
        )
    return tensor._current_node()


def _roots(tensors, gradients):
    tensors = _sequence(tensors)
    gradients = [None] * len(tensors) if gradients is None else _sequence(gradients)
    if len(gradients) != len(tensors):
        raise RuntimeError(f"backward: {len(gradients)} gradients given for {len(tensors)} tensors")
    roots = []
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if not tensor.requires_grad:
            raise RuntimeError(
                "backward: the tensor does not require a gradient and nothing recorded leads to it; "
                "was it made under no_grad, detached, or from inputs without requires_grad?"
            )
        if gradient is None:
            if tensor.array.size != 1:
                raise RuntimeError(
                    f"backward: a gradient is made up only for a single element; this tensor has shape "
                    f"{tensor.shape}: reduce it first (.sum(), .mean()) or pass gradient="
                )
            gradient = wrap(tensor.device.xp.ones(tensor.array.shape, tensor.array.dtype), tensor.device)
        elif gradient.array.shape != tensor.array.shape:
            raise RuntimeError(f"backward: the gradient has shape {gradient.shape}, the tensor {tensor.shape}")
        elif gradient.array.dtype != tensor.array.dtype:
            gradient = gradient.to(tensor.array.dtype)
        roots.append((tensor._current_node(), gradient))
    return roots
