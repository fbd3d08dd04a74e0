"""Ids that are columns of one matrix are cut out of it all at once: one transposed copy instead of a slice and a cast each.

``X[:, 0].long(), X[:, 1].long(), ..``  ->  ``X.transpose(0, 1).contiguous().long().unbind(0)``

A column of a row-major matrix is strided, and every lookup would copy it again to read it in order. Measured on one thread,
batch 2,048, float ids: 26 of 39 columns 206 -> 123 us, 100 of 100 columns 2.4 -> 0.7 ms, but 8 of 24 columns 59 -> 60 us. So
it is done from :attr:`IdColumns.least` columns on, where they are at least half of the matrix.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from .graph import Editor, Writes, aten, is_op, positions, value_of
from .lookups import LookupNode, read_lookup
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context, Pass

_CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True)
class _Column:
    """``ids`` is column ``number`` of ``matrix``, cast to ``dtype`` (None: not cast)."""

    ids: Node
    matrix: Node
    number: int
    dtype: torch.dtype | None


@dataclass
class IdColumns(Pass):
    """Cut the columns of a matrix of ids at once. ``least``: from how many columns on."""

    least: int = 12
    name: ClassVar[str] = "id_columns"
    kind: ClassVar[str] = "id columns"
    numerics: ClassVar[str] = "exact"

    def run(self, context: Context) -> list[Record]:
        editor = Editor(context.graph, self.name)
        writes = Writes(context.graph, context.root)
        groups: dict[tuple[Node, torch.dtype | None], dict[Node, _Column]] = {}
        for node in context.graph.nodes:
            lookup = read_lookup(node, context.root, writes)
            column = _column(lookup.ids) if isinstance(lookup, LookupNode) and lookup.pooling == "none" else None
            if column is not None and writes.to(column.matrix) is None:
                groups.setdefault((column.matrix, column.dtype), {})[column.ids] = column
        records: list[Record] = []
        for (matrix, dtype), columns in groups.items():
            if len(columns) < 2:
                continue
            value = value_of(matrix)
            assert value is not None
            width = len({c.number for c in columns.values()})
            if width < self.least or 2 * width < value.shape[1]:
                reason = f"{width} of {value.shape[1]} columns; a transposed copy pays from {self.least} on, if they are half of all"
                records += [record(self.name, self.kind, SKIPPED, node, reason) for node in columns]
                continue
            if not context.allowed():
                reason = "beyond the number of rewrites that were asked for"
                records += [record(self.name, self.kind, DISABLED, node, reason) for node in columns]
                continue
            detail = f"{width} columns cut at once"
            records += [record(self.name, self.kind, APPLIED, node, detail=detail) for node in columns]
            _cut(editor, matrix, dtype, list(columns.values()))
        editor.remove_dead()
        return records


def _column(ids: Any) -> _Column | None:
    known = value_of(ids)
    if known is None or known.dim() != 1:
        return None
    node, dtype, squeezed = ids, None, False
    while True:
        if is_op(node, *_CASTS) and dtype is None and not node.kwargs and len(node.args) == 2:
            dtype, node = node.args[1], node.args[0]
        elif is_op(node, aten.squeeze.dim) and not squeezed and node.args[1] in (1, -1):
            squeezed, node = True, node.args[0]
        else:
            break
    matrix, number = node.args[0] if isinstance(node, Node) and node.args else None, None
    if is_op(node, aten.select.int) and not squeezed and node.args[1] in (1, -1):
        number = node.args[2]
    elif is_op(node, aten.slice.Tensor) and squeezed and len(node.args) == 4 and node.args[1] in (1, -1):
        first, end = node.args[2] or 0, node.args[3]
        if isinstance(first, int) and isinstance(end, int) and end - first == 1 and first >= 0:
            number = first
    value = value_of(matrix)
    if not isinstance(number, int) or value is None or value.dim() != 2 or not isinstance(matrix, Node):
        return None
    return _Column(ids, matrix, number, dtype)


def _cut(editor: Editor, matrix: Node, dtype: torch.dtype | None, columns: list[_Column]) -> None:
    order = positions(editor.graph)
    columns = sorted(columns, key=lambda c: order[c.ids])
    place, sources = columns[0].ids, [c.ids for c in columns]
    cut = editor.call(aten.transpose.int, matrix, 0, 1, before=place, sources=sources)
    cut = editor.call(aten.contiguous.default, cut, before=place, sources=sources)
    if dtype is not None:
        cut = editor.call(aten.to.dtype, cut, dtype, before=place, sources=sources)
    cut = editor.call(aten.unbind.int, cut, before=place, sources=sources)
    for column in columns:
        ids = editor.call(operator.getitem, cut, column.number, before=place, sources=[column.ids], value=value_of(column.ids))
        editor.replace(column.ids, ids)
        if place is column.ids:
            place = ids.next
