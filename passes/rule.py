"""The three shapes of a rewrite.

* :class:`Rule`: ``pattern`` (a few calls), ``check`` (may it be rewritten here, and if not why), ``rewrite``.
* :class:`GroupRule`: ``key(node)``; all nodes with equal keys become one through ``fuse(nodes)``.
* :class:`Pass`: ``run(context)``, for whatever looks at the whole graph.

A pass is a dataclass: its fields are its options, and a plan sets them by name. Nothing is silent: whatever a pass finds ends
in a :class:`~.records.Record`.
"""
from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from torch.fx import Graph, Node

from .graph import Editor, arguments, packet_name
from .records import APPLIED, DISABLED, SKIPPED, Record, Skip, record


@dataclass
class Context:
    """What a pass works on. ``root`` holds the parameters that ``get_attr`` nodes name. ``tables`` says how each table is to be
    updated (see ``table_gradients.py``). ``budget`` limits how many rewrites may still be made (bisection); ``None`` is no limit.
    ``timings``: what ``measure.py`` has timed. ``sharding``: where tables live (``shard_tables.py``), over several ranks;
    ``tiers``: by name, tables whose ids become slots in the end; for ``tier_tables.py`` their caches."""

    graph: Graph
    root: nn.Module
    tables: dict[str, Any] = field(default_factory=dict)
    budget: int | None = None
    made: int = 0
    timings: dict[Any, Any] = field(default_factory=dict)
    sharding: Any = None
    tiers: Any = None

    def allowed(self) -> bool:
        """Take one rewrite from the budget."""
        if self.budget is not None and self.made >= self.budget:
            return False
        self.made += 1
        return True


@dataclass
class Pass:
    """Base of all rewrites. ``name`` is what a plan calls it, ``kind`` what it counts as in the report, ``numerics`` what it
    does to the numbers (``records.NUMERICS``)."""

    name: ClassVar[str]
    kind: ClassVar[str]
    numerics: ClassVar[str] = "reassociated"
    alone: ClassVar[bool] = True  # the graph that it makes runs on one rank by itself

    def run(self, context: Context) -> list[Record]:
        """Change ``context.graph`` and say what was done to what."""
        raise TypeError(f"{type(self).__name__} must define run()")


def _over_budget(rule: Pass, node: Node) -> Record:
    return record(rule.name, rule.kind, DISABLED, node, "beyond the number of rewrites that were asked for")


# --- Rule --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Var:
    name: str


@dataclass(frozen=True)
class _Call:
    name: str
    args: tuple


class _Patterns:
    """``op.relu(x)`` in a ``pattern`` method: any overload of that name, first arguments as given, the rest free."""

    def __getattr__(self, name: str):
        return lambda *args: _Call(name, args)


@dataclass
class Match:
    """Where a pattern was found: ``anchor`` is its last node, ``nodes`` all of them, ``bound`` the values of its variables."""

    anchor: Node
    nodes: list[Node]
    bound: dict[str, Any]

    def read_elsewhere(self) -> Node | None:
        """A node inside the pattern (not its last) whose value something outside also reads."""
        inside = set(self.nodes)
        return next((n for n in self.nodes if n is not self.anchor and any(u not in inside for u in n.users)), None)


class Rule(Pass):
    """Rewrites one pattern wherever it stands. ``pattern``'s parameters (after ``op``) bind by name in ``check`` and ``rewrite``,
    which may take any of them, ``match`` among them."""

    def pattern(self, op: Any) -> Any:
        """Build the pattern by calling ``op.<aten name>(...)``."""
        raise TypeError(f"{type(self).__name__} must define pattern()")

    def check(self, match: Match) -> Skip | None:
        """``None`` to go on, or ``skip(reason, at=node)``."""
        return None

    def rewrite(self, op: Editor, match: Match) -> Node:
        """Make the replacement of ``match.anchor`` with ``op`` and return it."""
        raise TypeError(f"{type(self).__name__} must define rewrite()")

    def run(self, context: Context) -> list[Record]:
        names = [p for p in inspect.signature(self.pattern).parameters if p != "op"]
        shape = self.pattern(_Patterns(), *map(_Var, names))
        editor = Editor(context.graph, self.name)
        records: list[Record] = []
        for node in list(context.graph.nodes):
            match = Match(node, [], {})
            if not _matches(shape, node, match):
                continue
            refusal = _call(self.check, match)
            if isinstance(refusal, Skip):
                records.append(record(self.name, self.kind, SKIPPED, refusal.node or node, refusal.reason, subject=_path(node)))
            elif not context.allowed():
                records.append(_over_budget(self, node))
            else:
                records.append(record(self.name, self.kind, APPLIED, node))
                editor.replace(node, _call(self.rewrite, match, op=editor))
        editor.remove_dead()
        return records


def _path(node: Node) -> str:
    return node.meta["origin"].module_path


def _call(method: Any, match: Match, **more: Any) -> Any:
    wanted = inspect.signature(method).parameters
    given = {"match": match, **match.bound, **more}
    return method(**{name: given[name] for name in wanted})


def _matches(shape: Any, value: Any, match: Match) -> bool:
    if isinstance(shape, _Var):
        if shape.name in match.bound:
            return match.bound[shape.name] is value or match.bound[shape.name] == value
        match.bound[shape.name] = value
        return True
    if not isinstance(shape, _Call):
        return shape == value and type(shape) is type(value)
    if not isinstance(value, Node) or packet_name(value) != shape.name:
        return False
    match.nodes.append(value)
    actual = list(arguments(value).values()) if hasattr(value.target, "_schema") else list(value.args)
    return len(actual) >= len(shape.args) and all(_matches(s, a, match) for s, a in zip(shape.args, actual))


# --- GroupRule ---------------------------------------------------------------------------------------------------------------


class GroupRule(Pass):
    """All nodes with equal ``key`` become one. ``prepare`` gathers what ``key`` and ``fuse`` need to know of the whole graph."""

    def prepare(self, context: Context) -> Any:
        """Facts handed to ``key`` and ``fuse``; by default the context itself."""
        return context

    def key(self, node: Node, facts: Any) -> Hashable | Skip | None:
        """``None``: not what this rule is about. ``Skip``: it is, but it may not join. Else: with whom it may be fused."""
        raise TypeError(f"{type(self).__name__} must define key()")

    def fuse(self, nodes: Sequence[Node], facts: Any) -> list[Record]:
        """Make one of ``nodes``; a record for each of them."""
        raise TypeError(f"{type(self).__name__} must define fuse()")

    def run(self, context: Context) -> list[Record]:
        facts = self.prepare(context)
        groups: dict[Hashable, list[Node]] = {}
        records: list[Record] = []
        for node in list(context.graph.nodes):
            key = self.key(node, facts)
            if isinstance(key, Skip):
                records.append(record(self.name, self.kind, SKIPPED, key.node or node, key.reason, subject=_path(node)))
            elif key is not None:
                groups.setdefault(key, []).append(node)
        for nodes in groups.values():
            if context.allowed():
                records.extend(self.fuse(nodes, facts))
            else:
                records.extend(_over_budget(self, node) for node in nodes)
        Editor(context.graph, self.name).remove_dead()
        return records
