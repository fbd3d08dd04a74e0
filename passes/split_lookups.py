"""Cut a rewritten graph at its lookups: what reads tables, to be run ahead, and the rest, which takes what was read.

``ids -> embedding_bags(tables, ids) -> dense part``  ->  ``ids -> read(tables, ids)`` and ``given, ids -> given_bags(given, tables, ids) -> dense part``

A launch can be read ahead where its ids, offsets and sample weights come from the model's inputs and fixed buffers alone. Dense tensors that
are copied beside its rows (``extras``) are left to the second graph.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import Graph, Node

from ..kernels.embedding import given
from ..kernels.embedding.op import OP
from ..kernels.embedding.spec import decode
from ..kernels.tiers.ahead import slots_ahead
from ..kernels.tiers.op import OP as SLOTS
from .graph import Writes, ancestors, is_op, is_pure, stored_tensor


@dataclass
class Split:
    """``ahead``: the inputs, and the number of the batch, to one list of slots for each launch. ``rest``: the inputs, and a
    :class:`~..kernels.embedding.given.Given` for each of these launches, to the outputs. ``launches``: how many there are;
    ``left``: why others are not among them."""

    ahead: Graph
    rest: Graph
    launches: int
    left: list[str]


def split_lookups(graph: Graph, root: nn.Module) -> Split:
    """See the module; ``graph`` stays as it is."""
    writes, left = Writes(graph, root), []
    chosen: dict[Node, set[Node]] = {}
    for node in [n for n in graph.nodes if is_op(n, OP)]:
        needed = ancestors([n for part in (node.args[1], node.args[2], node.args[3]) for n in part if isinstance(n, Node)])  # type: ignore[union-attr]
        reason = _not_ahead(node, needed, writes, root)
        if reason:
            left.append(f"{', '.join(t.name for t in decode(node.args[5]).tables)}: {reason}")  # type: ignore[arg-type]
        else:
            chosen[node] = needed | set(node.args[0])  # type: ignore[arg-type]
    return Split(_ahead(graph, chosen), _rest(graph, chosen), len(chosen), left)


def _not_ahead(node: Node, needed: set[Node], writes: Writes, root: nn.Module) -> str:
    if decode(node.args[5]).unmade:  # type: ignore[arg-type]
        return "its rows are looked up inside the interaction"
    for each in needed:
        if each.op == "get_attr" and isinstance(stored_tensor(each, root), nn.Parameter):
            return f"its ids or weights depend on the parameter {each.target}"
        if each.op != "placeholder" and not is_pure(each) and not is_op(each, SLOTS):
            return f"its ids come from {each.name}, which may not run twice"
        if writes.to(each) is not None:
            return f"{each.name}, which its ids come from, is written in place"
    return ""


def _ahead(graph: Graph, chosen: dict[Node, set[Node]]) -> Graph:
    made, copies = Graph(), {}
    needed = set().union(*chosen.values()) if chosen else set()
    results = []
    number = None
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = made.node_copy(node, copies.__getitem__)
            continue
        number = number or made.placeholder("batch_number")
        if is_op(node, SLOTS) and node in needed:
            copies[node] = made.call_function(slots_ahead, (copies[node.args[0]], node.args[1], number))  # type: ignore[index]
        elif node in chosen:
            copied = made.node_copy(node, lambda n: copies.get(n, None))  # its extras may be made by what is not here
            tables, indices, offsets, weights, _, spec = copied.args[:6]
            made.erase_node(copied)
            results.append(made.call_function(given.read, (tables, indices, offsets, weights, spec)))
        elif node in needed:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(tuple(results))
    return made


def _rest(graph: Graph, chosen: dict[Node, set[Node]]) -> Graph:
    made, copies = Graph(), {}
    rows: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op != "placeholder" and not rows:
            rows = {each: made.placeholder(f"given_{i}") for i, each in enumerate(chosen)}
        copies[node] = made.node_copy(node, copies.__getitem__)
        if node in chosen:
            copies[node].target = given.given_bags
            copies[node].args = (rows[node], *copies[node].args)
    return made
