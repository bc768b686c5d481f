"""The recorded graph of a tensor, as text and as Graphviz dot."""

from ..engine import Leaf, Output
from ..walk import parents_of


def _walk(tensor):
    """(node, label, parents) of all nodes that lead to `tensor`, latest first."""
    nodes, stack = set(), [tensor.node]
    while stack:
        node = stack.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        stack.extend(parents_of(node))
    return sorted(nodes, key=lambda n: -n.seq)


def _label(node, names):
    if isinstance(node, Leaf):
        leaf = node.tensor()
        shape = "gone" if leaf is None else tuple(leaf.shape)
        return f"{names.get(id(leaf), 'leaf')} {shape}"
    if isinstance(node, Output):
        return f"output {node.index}"
    shapes = ", ".join(str(shape) for shape, _ in node.inputs)
    return f"{node.name} ({shapes})" + (f" at {node.trace.line}" if node.trace else "")


def _names(parameters):
    return {id(p): name for name, p in (dict(parameters) if parameters is not None else {}).items()}


def graph_text(tensor, parameters=None):
    """One line per node, latest first: its number, operation, input shapes, and the numbers of its parents.
    `parameters`: named_parameters() or a dict, to name the leaves."""
    nodes, names = _walk(tensor), _names(parameters)
    number = {node: i for i, node in enumerate(reversed(nodes))}
    return "\n".join(
        f"{number[n]:4d} {_label(n, names)}"
        + (f" <- {', '.join(str(number[p]) for p in parents_of(n) if p is not None)}" if parents_of(n) else "")
        for n in nodes
    )


def graph_dot(tensor, parameters=None):
    """The graph in Graphviz's dot language; render it with `dot -Tsvg`."""
    nodes, names = _walk(tensor), _names(parameters)
    number = {node: i for i, node in enumerate(reversed(nodes))}
    lines = ["digraph graph_of_tensor {", "  rankdir=BT; node [fontname=monospace, shape=box, style=rounded];"]
    for node in reversed(nodes):
        label = _label(node, names).replace("\\", "\\\\").replace('"', '\\"')
        style = ', style=filled, fillcolor="#dfefff"' if isinstance(node, Leaf) else ""
        lines.append(f'  n{number[node]} [label="{label}"{style}];')
        lines += [f"  n{number[p]} -> n{number[node]};" for p in parents_of(node) if p is not None]
    return "\n".join([*lines, "}"])


def draw_graph(tensor, path, parameters=None):
    """Write the graph to `path`: .dot for Graphviz, anything else as text."""
    text = (graph_dot if str(path).endswith(".dot") else graph_text)(tensor, parameters)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")
