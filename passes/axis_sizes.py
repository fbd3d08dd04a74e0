"""Where a size comes from. In a graph that was traced, sizes are the sample's: two that are equal there may differ on another batch,
so what a size means is read from the ops that made its tensor, never from the number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .graph import aten, is_op, value_of

_SAME = (
    aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten.contiguous.default,
    aten.clone.default, aten.lift_fresh_copy.default, aten.alias.default, aten.detach.default,
)  # fmt: skip
_TRANSPOSES = (aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default)


def axis_source(node: Node, axis: int) -> tuple[Node, int]:
    """The first tensor, and its axis, whose size is that of ``axis`` of ``node`` on every batch."""
    while (value := value_of(node)) is not None and value.dim():
        axis %= value.dim()
        step = _step(node, axis, value.dim())
        if step is None:
            break
        node, axis = step
    return node, axis


def size_source(size: Any) -> tuple[Node, int] | None:
    """Of which tensor and axis ``size`` is the size; ``None`` if it is not one."""
    return axis_source(size.args[0], size.args[1]) if is_op(size, aten.sym_size.int) else None


def transposed(node: Node, rank: int) -> list[int]:
    """The axes of the input in the order in which ``node``, a transposition, has them."""
    order = list(range(rank))
    if is_op(node, aten.permute.default):
        return [d % rank for d in node.args[1]]  # type: ignore[operator, union-attr]
    a, b = (node.args[1], node.args[2]) if is_op(node, aten.transpose.int) else (-1, -2)
    if rank > 1:
        order[a % rank], order[b % rank] = order[b % rank], order[a % rank]  # type: ignore[operator]
    return order


def _step(node: Node, axis: int, rank: int) -> tuple[Node, int] | None:
    if node.op != "call_function" or not node.args:
        return None
    source: Any = node.args[0]
    if is_op(node, *_SAME):
        return source, axis
    if is_op(node, *_TRANSPOSES):
        return source, transposed(node, rank)[axis]
    if is_op(node, aten.slice.Tensor):
        return (source, axis) if (node.args[1] if len(node.args) > 1 else 0) % rank != axis else None  # type: ignore[operator]
    if is_op(node, aten.select.int):
        return source, axis + (axis >= node.args[1] % (rank + 1))  # type: ignore[operator]
    if is_op(node, aten.unsqueeze.default):
        at: Any = node.args[1] % rank  # type: ignore[operator]
        return (source, axis - (axis > at)) if axis != at else None
    if is_op(node, aten.embedding.default, aten.index_select.default, aten.index.Tensor):
        return _rows(node, axis, rank)
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        wide = [n for n in node.all_input_nodes if (v := value_of(n)) is not None and v.dim() >= rank - axis]
        # Along an axis that only one of them has, nothing is broadcast; one that is 1 there has it as good as not.
        held = [n for n in wide if not _is_one(n, axis - rank)]
        if len(held) == 1 and all(value_of(n) is not None for n in node.all_input_nodes):
            held_value = value_of(held[0])
            assert held_value is not None
            return held[0], axis - rank + held_value.dim()
    return None


def _rows(node: Node, axis: int, rank: int) -> tuple[Node, int] | None:
    """Of a lookup's result, axes of its ids."""
    given: Any = node.args[2] if is_op(node, aten.index_select.default) else node.args[1]
    if isinstance(given, (list, tuple)):
        given = given[0] if len(given) == 1 else None
    if is_op(node, aten.index_select.default) and node.args[1] != 0:
        return None
    known = value_of(given)
    return (given, axis) if known is not None and known.dim() == rank - 1 and axis < rank - 1 else None


def _is_one(node: Node, axis: int) -> bool:
    """Has ``node`` size 1 along ``axis`` (from the end) on every batch: put there, or of a stored tensor?"""
    source, at = axis_source(node, axis)
    known = value_of(source)
    if known is None or known.shape[at] != 1:
        return False
    return source.op == "get_attr" or is_op(source, aten.unsqueeze.default) and source.args[1] % known.dim() == at  # type: ignore[operator]
