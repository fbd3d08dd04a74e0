"""Collectives start early and are waited for late: what does not need them runs meanwhile (the bottom MLP, while ids and rows travel).

A list schedule of the graph's calls. The dependency graph (networkx) holds what a call reads, what is written in place, the order of
random draws, and the order of the collectives themselves, which must be the same on all ranks and stays as it is. Of the calls that are
ready, what a collective still waits for comes first, then the one with the longest way to the end; a wait is ready when its collective is
expected to be through, and while a later collective hangs on it only what fits into that time is begun, and only of what is left over when
rows travel. The backward runs in the reverse order: what ran while rows travelled runs while their gradients do, and what ran while ids did runs last,
when the last gradients of dense parameters should be on their way.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import torch
from torch.fx import Node

from ..kernels.collectives import exchange_ids, exchange_rows
from .cost import Rates, node_cost
from .graph import Editor, is_op, is_pure, memory
from .records import APPLIED, Record
from .rule import Context, Pass
from .shard_tables import exchanges

# Of a CPU core and gloo on one machine. Only ratios matter, and they must be the same on all ranks.
_RATES = Rates(memory=1e10, flops=1e11, wire=1e9, call=5e-6, message=1e-4)
_WAITS = (exchange_ids.RECEIVED, exchange_rows.WAIT)


@dataclass
class OverlapCommunication(Pass):
    """Order the calls so that communication and computation overlap."""

    name: ClassVar[str] = "overlap_communication"
    kind: ClassVar[str] = "overlaps"
    numerics: ClassVar[str] = "exact"
    alone: ClassVar[bool] = False

    def run(self, context: Context) -> list[Record]:
        starts = exchanges(context.graph)
        if not starts or not context.allowed():
            return []
        before = [n for n in context.graph.nodes if n.op == "call_function"]
        order = _schedule(_dependencies(context, before), context)
        end = context.graph.output_node()
        for node in order:
            end.prepend(node)
        Editor(context.graph, self.name).remove_dead()
        places = {node: i for i, node in enumerate(order)}
        records = []
        for start in starts:
            wait = next((n for n in order[places[start] :] if is_op(n, *_WAITS) and _waits_for(n, start)), None)
            between = 0 if wait is None else places[wait] - places[start] - 1
            records.append(Record(self.kind, APPLIED, "", self.name, detail=f"{between} calls between {start.name} and its wait"))
        return records


def _waits_for(wait: Node, start: Node) -> bool:
    return start in wait.all_input_nodes or any(start in n.all_input_nodes for n in wait.all_input_nodes)


def _dependencies(context: Context, nodes: list[Node]) -> nx.DiGraph:
    """Edges from what must run earlier; each node with its ``seconds``, and ``flight``: how long what it starts is under way."""
    found = nx.DiGraph()
    inside = set(nodes)
    for place, node in enumerate(nodes):
        cost = node_cost(node, context.root)
        seconds = _RATES.call if cost is None else cost.seconds(_RATES)
        starts = is_op(node, exchange_ids.EXCHANGE, exchange_rows.SEND)
        found.add_node(node, place=place, seconds=_RATES.call if starts else seconds, flight=seconds if starts else 0.0)
        found.add_edges_from((other, node) for other in node.all_input_nodes if other in inside)
    _chain(found, [n for n in nodes if not is_pure(n)])
    _chain(found, exchanges(context.graph))
    for place, node in enumerate(nodes):
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            written = {memory(n, context.root) for n in node.all_input_nodes}
            for other_place, other in enumerate(nodes):
                if other is not node and not written.isdisjoint(memory(n, context.root) for n in (other, *other.all_input_nodes)):
                    found.add_edge(*((other, node) if other_place < place else (node, other)))
    return found


def _chain(found: nx.DiGraph, nodes: list[Node]) -> None:
    found.add_edges_from(zip(nodes, nodes[1:]))


def _schedule(found: nx.DiGraph, context: Context) -> list[Node]:
    facts = found.nodes
    way: dict[Node, float] = {}  # seconds from the start of a call to the end, along the longest path
    for node in reversed(list(nx.topological_sort(found))):
        way[node] = facts[node]["seconds"] + facts[node]["flight"] + max((way[n] for n in found.successors(node)), default=0.0)
    urgent = {other for start in exchanges(context.graph) for other in (start, *nx.ancestors(found, start))}  # a collective waits for it
    after = {other for node in found if is_op(node, exchange_rows.WAIT) for other in (node, *nx.descendants(found, node))}
    spare = sum(facts[n]["seconds"] for n in found if n not in urgent and n not in after)
    spare -= sum(facts[n]["flight"] for n in found if is_op(n, exchange_rows.SEND))
    missing = {node: found.in_degree(node) for node in found}
    arrives = dict.fromkeys(found, 0.0)  # when what a wait needs is expected
    ready = [node for node in found if not missing[node]]
    order: list[Node] = []
    now = 0.0
    while ready:
        awaited = min((arrives[n] for n in ready if n in urgent and arrives[n] > now), default=None)
        fits = min(spare, 0.0 if awaited is None else awaited - now)
        there = [n for n in ready if arrives[n] <= now and (awaited is None or n in urgent or facts[n]["seconds"] <= fits)]
        there = there or [min(ready, key=lambda n: (n not in urgent, arrives[n], facts[n]["place"]))]
        node = max(there, key=lambda n: (n in urgent, way[n], -facts[n]["place"]))
        ready.remove(node)
        spare -= facts[node]["seconds"] if awaited is not None and node not in urgent else 0.0
        order.append(node)
        now = max(now, arrives[node]) + facts[node]["seconds"]
        for reader in found.successors(node):
            missing[reader] -= 1
            if not missing[reader]:
                ready.append(reader)
        if facts[node]["flight"]:
            for wait in found:
                if is_op(wait, *_WAITS) and _waits_for(wait, node):
                    arrives[wait] = now + facts[node]["flight"]
    return order
