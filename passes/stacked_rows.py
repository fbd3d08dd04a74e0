"""Lookups that are stacked, and then joined with dense vectors as more rows, are joined at once:
``cat([x.unsqueeze(1), stack([y1, y2], 1)], 1)``  ->  ``cat([x, y1, y2], -1).unflatten(-1, [3, D])``

All are ``[batch, D]``. A fused launch writes such a concatenation itself, dense vectors and all, where the stack would be copied into it
once more. Only data moves, so no number changes.
"""
from __future__ import annotations

from torch.fx import Node

from .graph import Editor, Writes, aten, is_op, value_of
from .lookups import LookupNode, read_lookup
from .rule import Context


def join_stacked_rows(context: Context, made_by: str) -> None:
    """Rewrite each such concatenation that nothing is written to."""
    writes = Writes(context.graph, context.root)
    editor = Editor(context.graph, made_by)
    found = (read_lookup(n, context.root, writes) for n in context.graph.nodes)
    results = {f.result for f in found if isinstance(f, LookupNode)}
    for node in list(context.graph.nodes):
        pieces = _pieces(node)
        if pieces is None or not results.intersection(pieces) or any(map(writes.to, (node, *node.all_input_nodes, *pieces))):
            continue
        value = value_of(node)
        assert value is not None
        flat = editor.call(
            aten.cat.default, pieces, -1, before=node, sources=[node, *node.all_input_nodes], value=value.new_empty(value.shape[0], len(pieces) * value.shape[2])
        )  # fmt: skip
        rows = editor.call(aten.unflatten.int, flat, -1, [len(pieces), value.shape[2]], before=node, sources=[node], value=value)
        editor.replace(node, rows)
    editor.remove_dead()


def _pieces(node: Node) -> list[Node] | None:
    """The ``[batch, D]`` tensors whose rows ``node`` concatenates, some of them stacked by nobody else; ``None`` if it is anything else."""
    value = value_of(node)
    if not is_op(node, aten.cat.default) or value is None or value.dim() != 3 or not isinstance(value.shape[2], int):
        return None
    if len(node.args) < 2 or node.args[1] not in (1, -2):
        return None
    pieces: list[Node] = []
    for given in node.args[0]:  # type: ignore[union-attr]
        if is_op(given, aten.unsqueeze.default) and given.args[1] in (1, -2):
            pieces.append(given.args[0])
        elif is_op(given, aten.stack.default) and given.args[1:] in ((1,), (-2,)) and len(given.users) == 1:
            pieces += given.args[0]
        else:
            return None
    values = [value_of(p) for p in pieces]
    return pieces if all(v is not None and v.dim() == 2 and v.dtype == value.dtype for v in values) else None
