"""Looked-up rows of which the model changes a part in place are copied first:
``y = E[ids]; y[:, :k] = shared``  ->  ``y = E[ids].clone(); y[:, :k] = shared``.

(What is changed as a whole, ``y *= c``, capture makes a new value of.) The rows of a fused launch may lie beside those of others, which
such a write would have to spare; the copy is the model's alone, and only data moves, so no number changes. It costs little beside what
it makes possible: a fused lookup, and an update of the looked-up rows only.
"""
from __future__ import annotations

from .graph import Editor, Writes, aten, value_of
from .lookups import LookupNode, read_lookup
from .rule import Context


def copy_written_rows(context: Context, made_by: str) -> None:
    """Put the copy behind each lookup that nothing but a write to its result keeps from being fused."""
    writes = Writes(context.graph, context.root)
    editor = Editor(context.graph, made_by)
    for node in list(context.graph.nodes):
        found = read_lookup(node, context.root, None)
        if not isinstance(found, LookupNode) or found.result is None or writes.to(found.result) is None:
            continue
        if any(writes.to(part) is not None for part in (found.table, found.ids, found.offsets, found.sample_weights)):
            continue
        result, readers = found.result, list(found.result.users)
        copied = editor.call(aten.clone.default, result, before=result.next, sources=[result], value=value_of(result))
        for reader in readers:
            reader.replace_input_with(result, copied)
