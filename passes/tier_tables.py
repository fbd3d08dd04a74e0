"""Lookups of tables that are larger than memory, or whose ids are any numbers, read a table of slots: ids become slots.

``embedding_bags([item.weight], [ids])``  ->  ``embedding_bags([cache], [tier_slots(ids)])``

The launch stays as it is: it reads and trains the cache, which is a table of ``slots + 1`` rows (``kernels/tiers``), or of ``slots + 2``
(``kernels/dynamic_ids``). What lookups leave out or do not train (``padding_idx``) has the row ``slots`` to itself.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..kernels.embedding.op import OP
from ..kernels.embedding.spec import decode
from ..kernels.tiers.op import OP as SLOTS
from .graph import Editor, packet_name, stored_tensor
from .records import APPLIED, Record
from .rule import Context, Pass


@dataclass(frozen=True)
class Tier:
    """A table whose ids become slots, for the pass: its ``number`` in a graph, its ``slots``, how many ``rows`` they and those beside them
    are. ``dynamic``: any number is an id."""

    number: int
    slots: int
    rows: int
    dynamic: bool = False

    @property
    def kind(self) -> str:
        """What it counts as in the report."""
        return "dynamic ids" if self.dynamic else TierTables.kind

    @property
    def detail(self) -> str:
        """What is said of it there."""
        return f"rows for at most {self.slots:,} ids of any value" if self.dynamic else f"{self.slots:,} slots in memory; ids become slots"


class CannotTier(ValueError):
    """The ids of a table are to become slots, and something that is no fused lookup reads it, or its lookups do not agree."""


@dataclass
class TierTables(Pass):
    """Point the lookups of tables in tiers at their caches, and of tables with dynamic ids at their rows."""

    name: ClassVar[str] = "tier_tables"
    kind: ClassVar[str] = "tiers"
    numerics: ClassVar[str] = "exact"
    alone: ClassVar[bool] = False

    def run(self, context: Context) -> list[Record]:
        tiers: Mapping[str, Tier] = context.tiers or {}
        if not tiers:
            return []
        _refuse_other_readers(context, tiers)
        editor = Editor(context.graph, self.name)
        done: dict[str, Tier] = {}
        looked: set[int] = set()
        for node in [n for n in context.graph.nodes if n.target is OP]:
            spec = decode(node.args[5])  # type: ignore[arg-type]
            mine = {i: tiers[t.name] for i, t in enumerate(spec.tables) if t.name in tiers}
            if not mine or not context.allowed():
                continue
            lookups, ids = list(spec.lookups), list(node.args[1])  # type: ignore[arg-type]
            for i, lookup in enumerate(lookups):
                tier = mine.get(lookup.table)
                if tier is None:
                    continue
                ids[i] = editor.call(SLOTS, ids[i], tier.number, tier.number not in looked, before=node, sources=[node])
                looked.add(tier.number)
                padding = None if lookup.padding_idx is None else tier.slots
                lookups[i] = replace(lookup, padding_idx=padding, wrap_negative=False)
            tables = tuple(replace(t, rows=mine[i].rows) if i in mine else t for i, t in enumerate(spec.tables))
            text = replace(spec, tables=tables, lookups=tuple(lookups)).encode()
            editor.set_argument(node, 1, ids)
            editor.set_argument(node, 5, text)
            done.update((spec.tables[i].name, tier) for i, tier in mine.items())
        editor.remove_dead()
        return [Record(tier.kind, APPLIED, name, self.name, detail=tier.detail) for name, tier in done.items()]


def padding_of(graphs, name: str) -> int | None:
    """The row that all lookups of a table leave untrained. Raises :class:`CannotTier` where they differ."""
    found = {
        lookup.padding_idx
        for graph in graphs for node in graph.nodes if node.target is OP
        for spec in [decode(node.args[5])] for lookup in spec.lookups if spec.tables[lookup.table].name == name
    }  # fmt: skip
    if len(found) > 1:
        raise CannotTier(f"table '{name}' has storage or ids in the plan, but its lookups have different padding_idx ({sorted(map(str, found))}); one was needed")
    return next(iter(found), None)


def _refuse_other_readers(context: Context, tiers: Mapping[str, Tier]) -> None:
    names = {id(p): n for n, p in reversed(list(context.root.named_parameters(remove_duplicate=False)))}
    for node in context.graph.nodes:
        tensor = stored_tensor(node, context.root)
        name = None if tensor is None else names.get(id(tensor))
        if name not in tiers:
            continue
        other = next((u for u in node.users if u.target is not OP), None)
        if other is not None:
            where = other.meta["origin"].where() if "origin" in other.meta else ""
            word, what = ("ids", "have dynamic ids") if tiers[name].dynamic else ("storage", "be in tiers")
            raise CannotTier(
                f"table '{name}' is to {what}, but {packet_name(other) or other.op} reads it as a whole ({where}). Only fused lookups "
                f"can read its slots: take {word} out of the plan for it (the report says why a lookup is not fused)"
            )
