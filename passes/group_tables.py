"""All lookups that may share a launch become one ``tablewright.embedding_bags`` over the model's own tables.

``y1 = E1[ids1]; y2 = bag(E2, ids2); ...; z = cat([x, y1, y2], -1)``  ->  ``z = embedding_bags([E1, E2], [ids1, ids2], [x])``

Lookups of one device and dtype share a launch, whatever their dims, pooling factors and poolings. The op takes the tables'
own parameter tensors: nothing is copied, and names, tied tables and ``load_state_dict`` go on working. Rows that the model
concatenates (or stacks before the last dimension) are written where they end up, and the concatenation goes away.

The launch stands just before the first reader of any of its results. What its ids depend on is moved up to there; if that
would move a random draw or a write, the lookup stays out and the report says so. A lookup whose ids depend on another lookup
is in a later launch.
"""
from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Node

from ..kernels.embedding.op import OP
from ..kernels.embedding.reference import row_dim
from ..kernels.embedding.spec import Extra, GroupSpec, Lookup, Table
from .graph import Editor, Writes, ancestors, aten, base_of, is_pure, packet_name, positions, stored_tensor, value_of
from .joins import Join, Rows, find_joins
from .lookups import LookupNode, read_lookup
from .records import APPLIED, SKIPPED, Record, Skip, record
from .rule import Context, GroupRule
from .stacked_rows import join_stacked_rows
from .written_rows import copy_written_rows


@dataclass
class _Facts:
    context: Context
    lookups: dict[Node, LookupNode | Skip]
    levels: dict[Node, int]
    names: dict[int, str]
    parameters: set[int]  # in a functional_call they are plain tensors
    writes: Writes


@dataclass
class GroupTables(GroupRule):
    """Fuse lookups into table-batched ones. ``max_tables``: the most tables of one launch."""

    max_tables: int = 4096
    name: ClassVar[str] = "group_tables"
    kind: ClassVar[str] = "lookups"
    numerics: ClassVar[str] = "reassociated"

    def __post_init__(self) -> None:
        if type(self.max_tables) is not int or self.max_tables < 1:
            raise ValueError(f"max_tables is {self.max_tables!r}; it must be a whole number above 0")

    def prepare(self, context: Context) -> _Facts:
        copy_written_rows(context, self.name)
        join_stacked_rows(context, self.name)
        writes = Writes(context.graph, context.root)
        lookups: dict[Node, LookupNode | Skip] = {}
        levels: dict[Node, int] = {}
        for node in context.graph.nodes:
            found = read_lookup(node, context.root, writes)
            level = max((levels[n] for n in node.all_input_nodes), default=0)
            if found is not None:
                lookups[node] = found
            levels[node] = level + isinstance(found, LookupNode)
        # A tied table has several names; the plain model's first one is the one it goes by.
        names = {id(t): n for n, t in reversed(list(context.root.named_buffers(remove_duplicate=False)))}
        names.update({id(t): n for n, t in reversed(list(context.root.named_parameters(remove_duplicate=False)))})
        return _Facts(context, lookups, levels, names, {id(p) for p in context.root.parameters()}, writes)

    def key(self, node: Node, facts: _Facts) -> Hashable | Skip | None:
        found = facts.lookups.get(node)
        if not isinstance(found, LookupNode):
            return found
        if found.result is None or not found.result.users:
            return None  # nobody reads it
        table = stored_tensor(found.table, facts.context.root)
        assert table is not None
        return (table.device, table.dtype, facts.levels[node])

    def fuse(self, nodes: Sequence[Node], facts: _Facts) -> list[Record]:
        # Read again: sample weights may come from lookups that have been fused since.
        found = [read_lookup(n, facts.context.root, facts.writes) for n in nodes]
        lookups = [f for f in found if isinstance(f, LookupNode)]
        records: list[Record] = []
        for start in range(0, len(lookups), self.max_tables):
            records += self._fuse(lookups[start : start + self.max_tables], facts)
        return records

    def _fuse(self, lookups: list[LookupNode], facts: _Facts) -> list[Record]:
        graph = facts.context.graph
        place, order = _first_reader(lookups, graph)
        lookups, late = _movable(lookups, order, order[place], facts.writes)
        records = [
            record(
                self.name, self.kind, SKIPPED, found.node,
                f"its ids depend on {packet_name(blocker)}, which may not move ahead of the other lookups' readers",
            )
            for found, blocker in late
        ]  # fmt: skip
        if not lookups:
            return records
        place, order = _first_reader(lookups, graph)
        for needed in sorted(ancestors(_inputs(lookups)), key=order.__getitem__):
            if order[needed] > order[place]:
                place.prepend(needed)
        order = positions(graph)
        editor = Editor(graph, self.name)
        joins = find_joins({f.result: _rows(f, facts) for f in lookups if f.result is not None}, place, order, facts.writes)
        fused, spec = self._launch(editor, lookups, joins, place, facts)
        _hand_out(editor, fused, spec, lookups, joins)
        where = f"{len(lookups)} lookups of {len(spec.tables)} tables in 1 launch"
        joined = sum(len(j.pieces) for j in joins)
        detail = where + (f"; {joined} written straight into their concatenation" if joined else "")
        return records + [record(self.name, self.kind, APPLIED, f.node, detail=detail) for f in lookups]

    def _launch(self, editor: Editor, lookups: list[LookupNode], joins: list[Join], place: Node, facts: _Facts):
        """Make the fused call. Slots: one for each join, then one for each lookup that is in none."""
        root = facts.context.root
        where: dict[Node, tuple[int, int]] = {}
        slots: list[int] = []
        extras: list[tuple[Extra, Node]] = []
        for join in joins:
            column = 0
            for piece in join.pieces:
                if piece.is_lookup:
                    where[piece.node] = (len(slots), column)
                else:
                    extras.append((Extra(len(slots), column, piece.width), piece.node))
                column += piece.width
            slots.append(column)
        tables: dict[str, Table] = {}
        numbers: dict[str, int] = {}
        stored: list[Node] = []
        entries: list[Lookup] = []
        for found in lookups:
            tensor = stored_tensor(found.table, root)
            assert tensor is not None and found.result is not None
            name = facts.names.get(id(tensor), str(found.table.target))  # a tensor that the model keeps as a plain attribute
            trains = isinstance(tensor, torch.nn.Parameter) or id(tensor) in facts.parameters
            grad = "none" if not trains else "sparse" if found.sparse else "dense"
            if name not in tables:
                numbers[name] = len(tables)
                tables[name] = Table(name, tensor.shape[0], row_dim(tensor), grad)
                stored.append(editor.attribute(name, before=place, sources=[found.table, found.node], value=value_of(found.table)))
            elif grad == "dense":  # a dense gradient and a sparse one add up to a dense one
                tables[name] = replace(tables[name], grad=grad)
            if found.result not in where:
                where[found.result] = (len(slots), 0)
                slots.append(row_dim(tensor))
            slot, column = where[found.result]
            entries.append(
                Lookup(
                    numbers[name], _called(found), found.pooling, slot, column,
                    found.padding_idx, found.include_last_offset, found.wrap_negative, found.padding_read,
                )
            )  # fmt: skip
        spec = GroupSpec(tuple(tables.values()), tuple(entries), tuple(slots), tuple(e for e, _ in extras))
        fused = editor.call(
            OP,
            stored, [f.ids for f in lookups], [f.offsets for f in lookups], [f.sample_weights for f in lookups],
            [n for _, n in extras], spec.encode(),
            before=place, sources=[f.node for f in lookups],
        )  # fmt: skip
        return fused, spec


def _rows(found: LookupNode, facts: _Facts) -> Rows:
    table = stored_tensor(found.table, facts.context.root)
    assert table is not None
    if found.pooling != "none":
        return Rows(row_dim(table), 2)
    ids = value_of(found.ids)
    return Rows(row_dim(table), None if ids is None else ids.dim() + 1)


def _called(found: LookupNode) -> str:
    """What an error message calls this lookup."""
    origin = found.node.meta["origin"]
    return origin.module_path or packet_name(found.node) + (f" at {origin.location}" if origin.location else "")


def _inputs(lookups: list[LookupNode]) -> list[Node]:
    return [n for f in lookups for n in (f.ids, f.offsets, f.sample_weights) if n is not None]


def _first_reader(lookups: list[LookupNode], graph) -> tuple[Node, dict[Node, int]]:
    order = positions(graph)
    readers = [u for f in lookups if f.result is not None for u in f.result.users]
    return min(readers, key=order.__getitem__), order


def _movable(lookups: list[LookupNode], order: dict[Node, int], place: int, writes: Writes):
    """Split into lookups that can be made at ``place`` and those that cannot, each of these with the node in the way."""
    ready, late = [], []
    for found in lookups:
        needed = ancestors(_inputs([found]))
        moved = [n for n in needed if order[n] > place]
        blocker = next((n for n in moved if not is_pure(n) or any(map(writes.to, (n, *n.all_input_nodes)))), None)
        if blocker is None:
            ready.append(found)
        else:
            late.append((found, blocker))
    return ready, late


def _hand_out(editor: Editor, fused: Node, spec: GroupSpec, lookups: list[LookupNode], joins: list[Join]) -> None:
    """Give each reader of the plain lookups its part of the fused call's results."""
    place = fused.next
    likes = [join.node for join in joins] + [place] * (len(spec.slots) - len(joins))
    values = [join.slot_value() for join in joins] + [None] * (len(spec.slots) - len(joins))
    for found, entry in zip(lookups, spec.lookups):
        if entry.slot >= len(joins) and found.result is not None:
            likes[entry.slot], values[entry.slot] = found.result, value_of(found.result)
    if all(v is not None for v in values):
        fused.meta["val"] = values
    results = [
        editor.call(operator.getitem, fused, number, before=place, sources=[like], value=value)
        for number, (like, value) in enumerate(zip(likes, values))
    ]
    pieces = {join.node: {piece.node for piece in join.pieces} for join in joins}
    (output,) = place.graph.find_nodes(op="output")
    returned = {base_of(n) for n in output.all_input_nodes}
    for found, entry in zip(lookups, spec.lookups):
        result = found.result
        assert result is not None
        others = [u for u in result.users if result not in pieces.get(u, ())]
        if not others:
            continue
        part, dim = results[entry.slot], spec.tables[entry.table].dim
        if entry.slot < len(joins):
            part = editor.call(
                aten.narrow.default, part, -1, entry.column, dim, before=place, sources=[result], value=value_of(result)
            )  # fmt: skip
            if result in returned or joins[entry.slot].node in returned:  # the caller may write to it, and to it alone
                part = editor.call(aten.clone.default, part, before=place, sources=[result], value=value_of(result))
        for user in others:
            user.replace_input_with(result, part)
    for join, whole in zip(joins, results):
        join.replace(editor, whole)
