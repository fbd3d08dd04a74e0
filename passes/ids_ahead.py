"""The part of a rewritten graph that says which rows a batch will look up in tiered tables: what a prefetch runs ahead of the model.

``ids -> ... -> tier_slots(ids, table) -> embedding_bags ...``  ->  ``ids -> ... -> (ids of each tier_slots)``
"""
from __future__ import annotations

from torch.fx import Graph, Node

from ..kernels.tiers.op import OP as SLOTS
from .graph import ancestors, is_op, is_pure


def ids_ahead(graph: Graph) -> tuple[Graph, list[int], str]:
    """A graph that returns the ids of each ``tier_slots`` call in their order, the tables' numbers, and "" or why there is none: what
    draws random numbers or writes to something may not run twice."""
    calls = [n for n in graph.nodes if is_op(n, SLOTS)]
    wanted: list[Node] = [n.args[0] for n in calls]  # type: ignore[misc]
    needed = ancestors(wanted)
    impure = next((n for n in graph.nodes if n in needed and not is_pure(n)), None)
    if impure is not None:
        return Graph(), [], f"the ids come from {impure.name}, which may not run twice"
    made = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(tuple(copies[n] for n in wanted))
    return made, [int(n.args[1]) for n in calls], ""  # type: ignore[arg-type]
