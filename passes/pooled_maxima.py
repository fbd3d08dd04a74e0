"""Maxima over the rows of a bag become ``tablewright.embedding_max``: those of ``nn.EmbeddingBag(mode="max")``, and those taken of a lookup's
rows over a sequence. Which of several equal values takes the gradient stays as the plain op has it.

They are not part of the shared launch: a launch of their own each, at the place of the plain op.
"""
from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from ..kernels.max_pool.op import OP
from .graph import Editor, Writes, arguments, aten, is_op, value_of
from .lazy import Lazy, make
from .lookups import LookupNode, read_lookup
from .position_weights import Ids
from .records import APPLIED, DISABLED, Record, record
from .rule import Context
from .sequence_axes import arranged, as_matrix
from .sequence_readers import Maximum

ALONE = "the largest of each bag, in a launch of its own"
_LARGEST = 2  # mode of aten.embedding_bag


def take_maximum(editor: Editor, lookup: LookupNode, ids: Ids, maximum: Maximum) -> str:
    """Let a bag take the place of ``maximum.end``, and say how."""
    kept, end = [axis for axis in range(ids.rank) if axis != maximum.over], maximum.end
    number: Any = ids.node
    if lookup.wrap_negative:  # weight[ids] takes negative ids
        below, wrapped = Lazy(aten.lt.Scalar, (number, 0)), Lazy(aten.add.Tensor, (number, Lazy(aten.sym_size.int, (lookup.table, 0))))
        number = Lazy(aten.where.self, (below, wrapped, number))
    mask = None if maximum.mask is None else as_matrix(maximum.mask.by_position(ids), kept, (maximum.over,))
    padding = -1 if lookup.padding_idx is None else lookup.padding_idx
    value: Any = Lazy(
        OP,
        (lookup.table, as_matrix(number, kept, (maximum.over,)), None, mask, maximum.kind, maximum.fill, maximum.mode, padding, False, _grad(lookup)),
    )
    made = make(arranged(value, kept, maximum.axes, ids), editor, end, [lookup.node, end])
    if (known := value_of(end)) is not None:
        made.meta["val"] = known
    end.replace_all_uses_with(made)
    return "the largest of a bag" + (", masked" if mask is not None else "")


def take_bag(editor: Editor, node: Node, context: Context, writes: Writes, name: str) -> Record | None:
    """Replace ``nn.EmbeddingBag(mode="max")``; ``None`` for other modes, and for what cannot be read in place."""
    if arguments(node)["mode"] != _LARGEST:
        return None
    found = read_lookup(node, context.root, writes, largest=True)
    if not isinstance(found, LookupNode) or found.result is None:
        return None
    if not context.allowed():
        return record(name, "lookups", DISABLED, node, "beyond the number of rewrites that were asked for")
    done = record(name, "lookups", APPLIED, node, detail=ALONE)
    padding = -1 if found.padding_idx is None else found.padding_idx
    made = editor.call(
        OP, found.table, found.ids, found.offsets, None, "none", 0.0, "bag", padding, found.include_last_offset, _grad(found),
        before=node, sources=[node], value=value_of(found.result),
    )  # fmt: skip
    editor.replace(found.result, made)
    for reader in [u for u in node.users if is_op(u, operator.getitem) and not u.users]:
        editor.graph.erase_node(reader)
    return done


def _grad(lookup: LookupNode) -> str:
    return "sparse" if lookup.sparse else "dense"
