"""A lookup whose rows are only summed over a sequence, or the largest taken, becomes a bag: ``[batch, length, dim]`` is never made.

``sum(E[ids] * mask.unsqueeze(2), 1)``  ->  ``embedding_pool(E, ids, mask)``  (and from there into a shared launch)
``max(E[ids].masked_fill(ids == 0, -inf), 1)``  ->  ``embedding_max(E, ids, mask)``  (``pooled_maxima.py``)

Found are sums and means over any axis of the ids, plain, multiplied by a mask or by weights for each position, filled with
zeros, or written as a product with a ``[1, L]`` matrix, in every spelling :mod:`.sequence_readers` and :mod:`.position_weights`
list. What follows the sum (a division by the count, with or without epsilon) stays: it is cheap on ``[batch, dim]``.

A mask becomes the bag's weights. It goes away where it provably says no more than ``ids != p`` and the bag leaves row ``p`` out
by itself; where the model's own ``padding_idx`` is another row, that cannot be said in one bag and the weights stay. Without a
mask the row of ``padding_idx`` is read (it need not be zero) and gets no gradient, as in ``nn.Embedding``.

Some models compute the mask from the values, ``E[ids].sum(-1) != 0``: these sums come from ``embedding_row_sums``.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

from torch.fx import Node

from ..kernels.embedding.int8_rows import OP as INT8
from ..kernels.embedding.pooled import POOL, ROW_SUMS
from ..kernels.embedding.reference import row_dtype
from .graph import Editor, Writes, ancestors, arguments, aten, fetch, is_op, is_pure, packet_name, stored_tensor, value_of
from .lazy import Lazy, make
from .lookups import BAG_OPS, LookupNode, read_lookup
from .pooled_maxima import ALONE, take_bag, take_maximum
from .position_weights import NONE, Ids
from .records import APPLIED, DISABLED, SKIPPED, Record, Skip, record, skip
from .rule import Context, Pass
from .sequence_axes import arranged, as_matrix, size_of
from .sequence_readers import Pool, Readers, read_readers

_READS = (aten.embedding.default, aten.index_select.default, aten.index.Tensor, INT8)


@dataclass
class PoolSequences(Pass):
    """Make bags of lookups that are summed over a sequence."""

    name: ClassVar[str] = "pool_sequences"
    kind: ClassVar[str] = "pooled"
    numerics: ClassVar[str] = "reassociated"

    def run(self, context: Context) -> list[Record]:
        editor = Editor(context.graph, self.name)
        writes = Writes(context.graph, context.root)
        records: list[Record] = []
        for node in list(context.graph.nodes):
            if is_op(node, *BAG_OPS) and (made := take_bag(editor, node, context, writes, self.name)) is not None:
                records.append(made)
            if not is_op(node, *_READS) or (node.target is INT8 and arguments(node)["pooling"] != "none"):
                continue
            lookup = read_lookup(node, context.root, writes)
            ids = _ids_of(lookup, node, context)
            if ids is None:
                records += self._unknown(node)
                continue
            readers = read_readers(node, ids)
            if not readers.pools and not readers.maxima and readers.misfit is None:
                continue
            refusal = _refusal(lookup, readers, writes)
            ends = [pool.end for pool in (*readers.pools, *readers.maxima)] or [readers.others[0]]
            if refusal is not None:
                records += [record(self.name, self.kind, SKIPPED, end, refusal.reason, subject=_path(node)) for end in ends]
                continue
            if not context.allowed():
                reason = "beyond the number of rewrites that were asked for"
                records += [record(self.name, self.kind, DISABLED, end, reason, subject=_path(node)) for end in ends]
                continue
            assert isinstance(lookup, LookupNode)
            for axes in readers.row_sums:
                _take_row_sums(editor, lookup, ids, *axes)
            for pool in readers.pools:
                detail = _take(editor, lookup, ids, pool, _zeros_are_seen(lookup, context))
                records.append(record(self.name, self.kind, APPLIED, pool.end, detail=detail, subject=_path(node)))
                editor.graph.erase_node(pool.end)
            for maximum in readers.maxima:
                detail = take_maximum(editor, lookup, ids, maximum)
                records.append(record(self.name, self.kind, APPLIED, maximum.end, detail=detail, subject=_path(node)))
                records.append(record(self.name, "lookups", APPLIED, node, detail=ALONE))
                editor.graph.erase_node(maximum.end)
            _take_sizes(editor, readers.sizes, lookup, ids)
        editor.remove_dead()
        return records

    def _unknown(self, node: Node) -> list[Record]:
        """Without sample inputs a sum may be over the batch, the sequence or the columns."""
        sums = [u for u in node.users if is_op(u, aten.sum.dim_IntList, aten.mean.dim)]
        reason = "whether it sums over a sequence is known only with sample_inputs, which give the shape of the ids"
        known = value_of(node) is not None
        return [] if known else [record(self.name, self.kind, SKIPPED, u, reason, subject=_path(node)) for u in sums]


def _path(node: Node) -> str:
    return node.meta["origin"].module_path


def _ids_of(lookup: LookupNode | Skip | None, node: Node, context: Context) -> Ids | None:
    """The ids of a lookup, or of one that may not be rewritten, so that what is pooled there is reported."""
    found: Any = lookup.ids if isinstance(lookup, LookupNode) else node.args[1] if is_op(node, aten.embedding.default, INT8) else None
    table, rows = stored_tensor(node.args[0], context.root), value_of(node)
    if not isinstance(found, Node) or value_of(found) is None or rows is None:
        return None
    return Ids(found, rows.dtype if table is None else row_dtype(table))


def _refusal(lookup: LookupNode | Skip | None, readers: Readers, writes: Writes) -> Skip | None:
    if isinstance(lookup, Skip):
        return lookup
    if lookup is not None and lookup.node.target is INT8 and (readers.row_sums or readers.maxima):
        what = "their maxima" if readers.maxima else "the sums of single rows"
        return skip(f"its table has int8 rows, of which {what} are read; bags of int8 rows are summed or averaged", at=lookup.node)
    if readers.misfit is not None:
        return skip(readers.misfit[0], at=readers.misfit[1])
    if readers.others:
        other = readers.others[0]
        return skip(f"its rows are also read by {packet_name(other) or other.op}, so the unpooled rows are made anyway", at=other)
    for pool in (*readers.pools, *readers.maxima):
        # Weights are walked through as well, down to the ids: none of it may change on the way.
        walked = ancestors([pool.end], stop={lookup.node}) if lookup is not None else ()
        written = next((n for n in walked if writes.to(n) is not None), None)
        if written is not None:
            return skip(f"{packet_name(written)} is written to in place", at=written)
    dead = _dying({n for pool in (*readers.pools, *readers.maxima) for n in pool.passed})
    for size in readers.sizes:
        if size not in dead and not is_op(size, aten.sym_size.int, getattr):
            return skip(f"{packet_name(size)} needs the shape of its rows for more than a mask", at=size)
    return None


def _dying(nodes: set[Node]) -> set[Node]:
    """``nodes`` and everything that only they read."""
    dead = set(nodes)
    for node in reversed(list(next(iter(nodes)).graph.nodes)):
        if node.users and node.op == "call_function" and is_pure(node) and all(u in dead for u in node.users):
            dead.add(node)
    return dead


# --- making the replacement --------------------------------------------------------------------------------------------------


def _zeros_are_seen(lookup: LookupNode, context: Context) -> bool:
    """Are rows whose gradient is zero seen: named in a sparse gradient, or moved by their optimizer?"""
    table = stored_tensor(lookup.table, context.root)
    return lookup.sparse or any(c.moves_by_zero and fetch(context.root, name) is table for name, c in context.tables.items())


def _take(editor: Editor, lookup: LookupNode, ids: Ids, pool: Pool, zeros_are_seen: bool) -> str:
    """Replace ``pool.end`` and say how."""
    end = pool.end
    padding, read, weights, detail = _padding_and_weights(lookup, ids, pool, zeros_are_seen)
    kept = [axis for axis in range(ids.rank) if axis not in pool.over]
    matrix = [as_matrix(x, kept, pool.over) for x in (ids.node, *weights)]
    scale = reduce(lambda a, b: Lazy(aten.mul.Tensor, (a, b)), matrix[1:]) if weights else None
    value: Any = Lazy(
        POOL, (lookup.table, matrix[0], scale, -1 if padding is None else padding, read, lookup.wrap_negative, lookup.sparse)
    )
    if pool.mean:
        value = Lazy(aten.div.Tensor, (value, reduce(_times, [size_of(ids, axis) for axis in pool.over])))
    made = make(arranged(value, kept, pool.axes, ids), editor, end, [lookup.node, end])
    if (known := value_of(end)) is not None:
        made.meta["val"] = known
    end.replace_all_uses_with(made)
    return detail


def _padding_and_weights(lookup: LookupNode, ids: Ids, pool: Pool, zeros_are_seen: bool) -> tuple[int | None, bool, list, str]:
    """(padding_idx of the bag, whether its row is read, weights of each position, what to tell)."""
    # weight[ids] takes negative ids, which a mask of ids and a row to leave out see differently.
    masked = set() if lookup.wrap_negative else {w.leaves_out for w in pool.weights} - {None}
    row = masked.pop() if len(masked) == 1 else None
    if row is not None and (lookup.padding_idx == row or lookup.padding_idx is None and not zeros_are_seen):
        weights = [w.by_position(ids) for w in pool.weights if w.leaves_out is None]
        return row, False, weights, f"a bag that leaves out id {row}, as its mask did"
    weights = [w.by_position(ids) for w in pool.weights]
    return lookup.padding_idx, True, weights, "a bag with its mask as weights" if weights else "a bag"


def _times(a: Any, b: Any) -> Any:
    return Lazy(operator.mul, (a, b))


def _take_row_sums(editor: Editor, lookup: LookupNode, ids: Ids, total: Node, axes: tuple[int, ...]) -> None:
    sums: Any = Lazy(ROW_SUMS, (lookup.table, ids.node))
    if list(axes) != list(range(ids.rank)):
        labels = [label for label in axes if label != NONE]
        if labels != sorted(labels):
            sums = Lazy(aten.permute.default, (sums, labels))
        for at, label in enumerate(axes):
            if label == NONE:
                sums = Lazy(aten.unsqueeze.default, (sums, at))
    editor.replace(total, make(sums, editor, total, [lookup.node, total]))


def _take_sizes(editor: Editor, sizes: list[Node], lookup: LookupNode, ids: Ids) -> None:
    for node in sizes:
        if is_op(node, getattr):
            editor.set_argument(node, 0, lookup.table)  # its dtype and device are the rows'
        elif is_op(node, aten.sym_size.int) and node.args[1] < ids.rank:  # type: ignore[operator]
            editor.replace(node, make(Lazy(aten.sym_size.int, (ids.node, node.args[1])), editor, node, [node]))
