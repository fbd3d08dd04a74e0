"""Concatenations of looked-up rows in one form, each made once: ``cat(rows, -1)`` of ``[batch, dim]`` rows, and views of it.

Many models keep a row as ``[batch, 1, dim]`` and join the same rows twice: along axis 1 for interactions, along the last axis
for a network. With ``e_i = E_i[ids_i]``, ids ``[batch, 1]``::

    cat([e_1, .., e_n], 1)   ->  j.unflatten(-1, [n, dim])       where  j = cat([r_1, .., r_n], -1)
    cat([e_1, .., e_n], -1)  ->  j.unsqueeze(1)                  and    r_i = E_i[ids_i.squeeze(1)]

``stack([r_1, .., r_n], 1)`` and a concatenation of a run of the same rows are views of ``j`` too. One ``j`` is what GroupTables
writes in place: the rows are never copied, and gradients arrive in one piece. Only data moves, so no number changes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from .graph import Editor, Writes, aten, base_of, is_op, positions, value_of
from .lookups import LookupNode, read_lookup
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context, Pass

_JOINS = (aten.cat.default, aten.stack.default)
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default)


@dataclass(frozen=True)
class _Join:
    """Inputs ``first, first + 1, ..`` of ``node`` are ``rows``, each ``[batch, width]``. ``form``: what their join is as a view of
    ``cat(rows, -1)``."""

    node: Node
    first: int
    rows: tuple[Node, ...]
    form: str  # "flat" [batch, sum of widths], "kept" [batch, 1, sum of widths], "stacked" [batch, n, width]

    @property
    def whole(self) -> bool:
        return len(self.rows) == len(self.node.args[0])  # type: ignore[arg-type]


@dataclass
class ConcatenatedLookups(Pass):
    """Bring concatenations of rows into one form and make each once."""

    name: ClassVar[str] = "concatenated_lookups"
    kind: ClassVar[str] = "concatenations"
    numerics: ClassVar[str] = "exact"

    def run(self, context: Context) -> list[Record]:
        editor = Editor(context.graph, self.name)
        writes = Writes(context.graph, context.root)
        rows = _rows_looked_up(context, writes)
        joins = [j for node in context.graph.nodes if (j := _read_join(node, rows)) is not None]
        order = positions(context.graph)
        wanted, records = self._wanted(joins, rows, writes, order)
        if not wanted:
            return records + self._splice(context, editor, rows, writes)
        if not context.allowed():
            reason = "beyond the number of rewrites that were asked for"
            return records + [record(self.name, self.kind, DISABLED, join.node, reason) for join in wanted]
        homes = {join.node: _home(join, wanted, rows, order) for join in wanted}
        readers = Counter(whole for whole, _ in homes.values())
        flat = {row: _flat(editor, row) for row in dict.fromkeys(r for join in wanted for r in join.rows)}
        made: dict[tuple[Node, ...], Node] = {}
        for join in sorted(wanted, key=lambda j: order[j.node]):
            whole, start = homes[join.node]
            if whole not in made:
                sources = [j.node for j in wanted if homes[j.node][0] == whole]
                parts = [flat[r] for r in whole]
                made[whole] = editor.call(aten.cat.default, parts, -1, before=join.node, sources=sources, value=_cat_value(parts))
            others = f", the same as of {readers[whole] - 1} more" if readers[whole] > 1 else ""
            detail = f"{len(join.rows)} rows in one cat{others}"
            records.append(record(self.name, self.kind, APPLIED, join.node, detail=detail))
            _view(editor, join, made[whole], start, len(join.rows) < len(whole))
        rows.update({row: rows[old] for old, row in flat.items() if old in rows})
        editor.remove_dead()
        return records + self._splice(context, editor, rows, writes)

    def _wanted(self, joins: list[_Join], rows: dict[Node, int], writes: Writes, order: dict[Node, int]):
        """The joins that change (all but those in the right form that are part of no other), and records of those that may not."""
        wanted: list[_Join] = []
        records: list[Record] = []
        readers = Counter(_home(join, joins, rows, order)[0] for join in joins)
        returned = {base_of(n) for join in joins[:1] for n in join.node.graph.output_node().all_input_nodes}
        given_out = Counter(_home(join, joins, rows, order)[0] for join in joins if join.node in returned)
        for join in joins:
            # A stack of lookups alone is written in place as it is; one with other rows is, if it is a cat.
            stacked = is_op(join.node, aten.stack.default) and all(row in rows for row in join.rows)
            right = join.form == "flat" or stacked
            if right and readers[_home(join, joins, rows, order)[0]] == 1:
                continue
            reason = ""
            if any(map(writes.to, (join.node, *join.rows))):
                reason = "the rows or their concatenation are written to in place"
            elif join.node in returned and given_out[_home(join, joins, rows, order)[0]] > 1:
                reason = "the concatenation is returned, and so is another of its rows: they may not share memory"
            if not reason:
                wanted.append(join)
            else:
                records.append(record(self.name, self.kind, SKIPPED, join.node, reason))
        return wanted, records

    def _splice(self, context: Context, editor: Editor, rows: dict[Node, int], writes: Writes) -> list[Record]:
        """``cat([cat(rows, -1), x], -1)`` -> ``cat([*rows, x], -1)``, where nobody else reads the inner one."""
        records = []
        for outer in list(context.graph.nodes):
            if not _is_flat_cat(outer):
                continue
            parts: list[Any] = list(outer.args[0])  # type: ignore[arg-type]
            inner = [n for n in parts if _is_flat_cat(n) and list(n.users) == [outer] and any(r in rows for r in n.args[0])]
            inner = [n for n in inner if not any(map(writes.to, (n, *n.all_input_nodes))) and parts.count(n) == 1]
            if not inner or not context.allowed():
                continue
            spliced = [part for n in parts for part in (n.args[0] if n in inner else [n])]
            editor.set_argument(outer, 0, spliced)
            for node in inner:
                context.graph.erase_node(node)
            detail = f"{len(inner) + 1} concatenations in one cat of {len(spliced)} parts"
            records.append(record(self.name, self.kind, APPLIED, outer, detail=detail))
        return records


def _is_flat_cat(node: Node) -> bool:
    """Does ``node`` join tensors ``[batch, width]`` by their columns?"""
    value = value_of(node)
    return is_op(node, aten.cat.default) and value is not None and value.dim() == 2 and node.args[1:] in ((1,), (-1,))


def _rows_looked_up(context: Context, writes: Writes) -> dict[Node, int]:
    """The rows ``[batch, dim]`` or ``[batch, 1, dim]`` of lookups (where ids are ``[batch, 1]``), and what dim is."""
    found = {}
    for node in context.graph.nodes:
        lookup = read_lookup(node, context.root, writes)
        value = value_of(lookup.result) if isinstance(lookup, LookupNode) and lookup.result is not None else None
        if value is None or not isinstance(lookup, LookupNode) or not isinstance(value.shape[-1], int):
            continue
        assert lookup.result is not None
        if value.dim() == 2 or value.dim() == 3 and _is_one(lookup.ids, 1):
            found[lookup.result] = value.shape[-1]
    return found


def _is_one(node: Any, axis: int) -> bool:
    """Has ``node`` size 1 along ``axis`` on every batch, not only on the sample?"""
    value = value_of(node)
    if value is None or value.shape[axis] != 1 or not isinstance(value.shape[axis], int):
        return False
    if any(not isinstance(size, int) for size in value.shape):
        return True  # exported: what is a number there is one on every batch, or the graph is not used
    while is_op(node, *_CASTS):
        node = node.args[0]
    if is_op(node, aten.slice.Tensor) and len(node.args) >= 4 and node.args[1] == axis:
        first, end = node.args[2] or 0, node.args[3]
        return isinstance(first, int) and isinstance(end, int) and end - first == 1 and (first >= 0 or end != 0)
    return is_op(node, aten.unsqueeze.default) and node.args[1] % value.dim() == axis


def _row(node: Node, rows: dict[Node, int], rank: int) -> Node | None:
    """The row that ``node`` shows as ``[batch, dim]`` (rank 2) or ``[batch, 1, dim]`` (rank 3)."""
    value = value_of(node)
    if value is None or value.dim() != rank:
        return None
    if rank == 2 and (is_op(node, aten.squeeze.dim) or is_op(node, aten.flatten.using_ints)):
        shown: Any = node.args[0]
        if shown in rows and value_of(shown).dim() == 3 and node.args[1] in (1, -2):  # type: ignore[union-attr]
            return shown
    if node in rows or rank == 2:
        return node
    if is_op(node, aten.unsqueeze.default) and node.args[1] in (1, -2):
        return node.args[0]  # type: ignore[return-value]
    return None


def _read_join(node: Node, rows: dict[Node, int]) -> _Join | None:
    if not is_op(node, *_JOINS) or not isinstance(node.args[0], (list, tuple)) or len(node.args[0]) < 2:
        return None
    value = value_of(node)
    if value is None:
        return None
    stacked = is_op(node, aten.stack.default)
    parts: list[Any] = list(node.args[0])
    axis = (node.args[1] if len(node.args) > 1 else 0) % value.dim()  # type: ignore[operator]
    rank = value.dim() - stacked
    if rank not in (2, 3) or rank == 3 and stacked or axis not in ((1,) if stacked or rank == 2 else (1, 2)):
        return None
    read = [_row(part, rows, rank) for part in parts]
    first, found = _longest_run(read)
    if len(set(found)) != len(found) or sum(r in rows for r in found) < 2 or (rank == 2 and len(found) < len(parts)):
        return None
    form = "flat" if rank == 2 and not stacked else "kept" if axis == 2 else "stacked"
    widths = [_width(r) for r in found]
    if not all(isinstance(w, int) for w in widths) or form == "stacked" and len(set(widths)) != 1:
        return None
    return _Join(node, first, tuple(found), form)


def _longest_run(read: list[Node | None]) -> tuple[int, list[Node]]:
    first, best, run = 0, [], []
    for at, row in enumerate([*read, None]):
        if row is not None:
            run = [*run, row]
            continue
        if len(run) > len(best):
            first, best = at - len(run), run
        run = []
    return first, best


def _width(row: Node) -> Any:
    value = value_of(row)
    assert value is not None
    return value.shape[-1]


def _home(join: _Join, joins: list[_Join], rows: dict[Node, int], order: dict[Node, int]) -> tuple[tuple[Node, ...], int]:
    """The longest concatenation that holds all rows of ``join`` in a run, and the column where they begin."""
    best, column = join.rows, 0
    for other in joins:
        starts = range(len(other.rows) - len(join.rows) + 1)
        start = next((s for s in starts if other.rows[s : s + len(join.rows)] == join.rows), None)
        if start is None or len(other.rows) <= len(best) or any(order[r] > order[join.node] for r in other.rows):
            continue
        # Columns are counted: of lookups, and of what is stacked with some, they are as many on every batch.
        counted = other.rows[:start] if join.form == "stacked" else other.rows[: start + len(join.rows)]
        if all(r in rows for r in counted):
            best, column = other.rows, sum(rows[r] for r in other.rows[:start])
    return best, column


def _flat(editor: Editor, row: Node) -> Node:
    """``row`` if it is ``[batch, dim]``; of a lookup ``[batch, 1, dim]``, the same with ids ``[batch]``, which takes its place."""
    value = value_of(row)
    assert value is not None
    if value.dim() == 2:
        return row
    place = 2 if is_op(row, aten.index_select.default) else 1
    given: Any = row.args[place]
    is_list = isinstance(given, (list, tuple))
    ids = editor.call(aten.squeeze.dim, given[0] if is_list else given, 1, before=row, sources=[row])
    args = [*row.args[:place], [ids] if is_list else ids, *row.args[place + 1 :]]
    flat = editor.call(row.target, *args, before=row, sources=[row], value=value.squeeze(1), **row.kwargs)
    editor.replace(row, editor.call(aten.unsqueeze.default, flat, 1, before=row, sources=[row], value=value))
    return flat


def _cat_value(parts: list[Node]) -> Any:
    value = value_of(parts[0])
    assert value is not None
    return value.new_empty(value.shape[0], sum(map(_width, parts)))


def _view(editor: Editor, join: _Join, whole: Node, start: int, is_part: bool) -> None:
    """Replace what ``join`` joins by a view of ``whole``, in which its rows begin at column ``start``."""
    node, value = join.node, value_of(join.node) if join.whole else None
    widths = [_width(row) for row in join.rows]
    if is_part:
        whole = editor.call(aten.narrow.default, whole, -1, start, sum(widths), before=node, sources=[node])
    result = whole
    if join.form == "stacked":
        sizes = [len(widths), widths[0]]
        result = editor.call(aten.unflatten.int, whole, -1, sizes, before=node, sources=[node], value=value)
    elif join.form == "kept":
        result = editor.call(aten.unsqueeze.default, whole, 1, before=node, sources=[node], value=value)
        for user in list(node.users) if join.whole else ():
            if is_op(user, aten.flatten.using_ints) and list(user.args[1:]) in ([1], [1, -1], [1, 2], [-2], [-2, -1]):
                editor.replace(user, whole)
    if join.whole:
        editor.replace(node, result)
    else:
        inputs: list[Any] = list(node.args[0])  # type: ignore[arg-type]
        inputs[join.first : join.first + len(join.rows)] = [result]
        editor.set_argument(node, 0, inputs)
