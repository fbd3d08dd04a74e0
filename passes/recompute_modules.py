"""Activation checkpointing of modules that the plan names: what they compute is not kept for the backward but computed again there.

The pass marks the calls of these modules; :func:`folded` makes one call of each part, under ``torch.utils.checkpoint`` (Chen et al. 2016, *Training
Deep Nets with Sublinear Memory Cost*), when a graph is made ready to run in eager mode. Dropout draws the same values the second time. The
calls in a part are those between two things that may not move or run twice: lookups, writes in place, random draws of other modules.
Under ``torch.compile`` the compiler itself chooses what to keep, and nothing is folded.
"""
from __future__ import annotations

import fnmatch
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

from ..kernels.embedding import given
from ..kernels.embedding.op import OP as LOOKUPS
from ..kernels.lookup_dots.op import OP as LOOKUP_DOTS
from ..kernels.tiers.op import OP as SLOTS
from .graph import Writes, is_pure, packet_name
from .origin import KEY
from .records import APPLIED, SKIPPED, Record
from .rule import Context, Pass

_MARK = "recompute"  # in a node's meta: the module that it is recomputed with
_PART = "recompute_part"  # and the number of the part, while its module is folded
_STAY = (LOOKUPS, LOOKUP_DOTS, SLOTS, given.given_bags)
_COUNTING = ("batch_norm", "instance_norm")  # they update running statistics, which their schemas do not say


class CannotRecompute(ValueError):
    """The plan names a module to checkpoint that the model does not have."""


@dataclass
class RecomputeModules(Pass):
    """Mark what the modules that match ``modules`` (globs on module paths; the outermost match counts) compute."""

    name: ClassVar[str] = "recompute_modules"
    kind: ClassVar[str] = "checkpoints"
    numerics: ClassVar[str] = "exact"
    modules: tuple[str, ...] = field(default=())

    def run(self, context: Context) -> list[Record]:
        named = [path for path, _ in context.root.named_modules() if path]
        found: dict[str, list[Node]] = {}
        for glob in self.modules:
            matches = fnmatch.filter(named, glob)
            if not matches:
                raise CannotRecompute(f"training.checkpoint: no module matches '{glob}'. The model's modules: {', '.join(named[:20]) or 'none'}{', ...' if len(named) > 20 else ''}")
            found.update((path, []) for path in matches if _outermost(path, self.modules) == path)
        for node in context.graph.nodes if found else ():
            path = _outermost(node.meta[KEY].module_path, self.modules) if KEY in node.meta else None
            if path is not None and node.op == "call_function":
                found.setdefault(path, []).append(node)
        writes = Writes(context.graph, context.root) if found else None
        records = []
        for path, nodes in found.items():
            members = [n for n in nodes if _may_run_twice(n)]
            written = next((w for n in members for each in (n, *n.all_input_nodes) if (w := writes.to(each)) is not None), None)  # type: ignore[union-attr]
            location = next((n.meta[KEY].location for n in nodes), "")
            if written is not None:
                reason = f"{packet_name(written)} writes in place to what it computes or reads; values that a second run finds again were needed"
            elif not members:
                reason = "no call of the graph is its own: its lookups run once, and what was fused with other modules' calls has their common path"
            elif not context.allowed():
                reason = "beyond the number of rewrites that were asked for"
            else:
                for node in members:
                    node.meta[_MARK] = path
                detail = f"{len(members)} calls, computed again in the backward"
                records.append(Record(self.kind, APPLIED, path, self.name, detail=detail, location=location))
                continue
            records.append(Record(self.kind, SKIPPED, path, self.name, reason, location=location))
        return records


def folded(graph: Graph, prepare: Callable[[Graph], None]) -> Graph:
    """``graph`` with one call for each part of a marked module; ``graph`` itself where nothing is marked. ``prepare`` is called with the graph
    of each part, before it is made to run."""
    for path in dict.fromkeys(n.meta[_MARK] for n in graph.nodes if _MARK in n.meta):
        for number, part in enumerate(_parts(graph, path)):
            for node in part:
                node.meta[_PART] = path, number  # what a fold puts in may take the names of nodes to come
        for number in range(len({n.meta[_PART] for n in graph.nodes if n.meta.get(_MARK) == path})):
            graph = _fold(graph, (path, number), f"recomputed_{path.replace('.', '_')}_{number}", prepare)
    return graph


def _outermost(path: str, globs: tuple[str, ...]) -> str | None:
    pieces = path.split(".")
    tries = (".".join(pieces[:i]) for i in range(1, len(pieces) + 1))
    return next((each for each in tries if any(fnmatch.fnmatchcase(each, glob) for glob in globs)), None) if path else None


def _random(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def _may_run_twice(node: Node) -> bool:
    if node.target is operator.getitem and not _may_run_twice(node.args[0]):  # type: ignore[arg-type]
        return False
    if node.target in _STAY or packet_name(node) in _COUNTING:
        return False
    return is_pure(node) or (_random(node) and not node.target._schema.is_mutable)  # type: ignore[union-attr]


def _parts(graph: Graph, path: str) -> list[list[Node]]:
    """The marked calls of a module, by parts: no way leads out of a part and back in, and nothing that may not move lies between
    the calls of one."""
    levels: dict[Node, int] = {}  # of members; of others, the least level that a member after them has
    parts: dict[int, list[Node]] = {}
    floor = 0
    for node in graph.nodes:
        member = node.meta.get(_MARK) == path
        before = [(levels[n], n.meta.get(_MARK) == path) for n in node.all_input_nodes]
        if member:
            levels[node] = max([floor, *(level for level, _ in before)])
            parts.setdefault(levels[node], []).append(node)
        else:
            levels[node] = max([0, *(level + inside for level, inside in before)])
            if node.op == "call_function" and not is_pure(node):
                floor = max([floor, *(level + 1 for level in parts)])
    return list(parts.values())


def _fold(graph: Graph, part: tuple[str, int], name: str, prepare: Callable[[Graph], None]) -> Graph:
    members = [n for n in graph.nodes if n.meta.get(_PART) == part]
    inside = set(members)
    given_in = list(dict.fromkeys(i for n in members for i in n.all_input_nodes if i not in inside))
    results = [n for n in members if any(u not in inside for u in n.users)]
    inner, copies = Graph(), {}
    for node in given_in:
        copies[node] = inner.placeholder(node.name)
    for node in members:
        copies[node] = inner.node_copy(node, copies.__getitem__)
    inner.output(tuple(copies[n] for n in results))
    prepare(inner)
    call = _recomputed(GraphModule({}, inner).forward, name, any(_random(n) for n in members))

    made, new = Graph(), {}
    late: list[Node] = []  # what reads the part and stands before its last call
    last, needs = members[-1], set(members)
    for node in graph.nodes:
        if node in inside:
            if node is last:
                whole = made.call_function(call, tuple(new[n] for n in given_in))
                whole.meta = {k: v for k, v in members[0].meta.items() if k not in (_MARK, _PART)}
                for place, result in enumerate(results):
                    new[result] = made.call_function(operator.getitem, (whole, place))
                    new[result].meta = {k: v for k, v in result.meta.items() if k not in (_MARK, _PART)}
                for each in late:
                    new[each] = made.node_copy(each, new.__getitem__)
        elif any(i in needs and i not in new for i in node.all_input_nodes):
            needs.add(node)
            late.append(node)
        else:
            new[node] = made.node_copy(node, new.__getitem__)
    return made


def _recomputed(run: Callable[..., tuple], name: str, random: bool) -> Callable[..., tuple]:
    def call(*args: Any) -> tuple:
        if not torch.is_grad_enabled():
            return run(*args)
        versions: list[int] = []

        def forward(*given: Any) -> tuple:
            seen = [x._version for x in given if isinstance(x, Tensor)]
            if versions and seen != versions:
                raise RuntimeError(
                    f"{name}: what it reads was written between the forward and the backward, which computes it again: step optimizers after "
                    "the backward, or take the module out of training.checkpoint"
                )
            versions[:] = seen
            return run(*given)

        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random)

    call.__name__ = name
    return call


