"""A tensor that multiplies the rows of a sequence, ``[B, L, D]`` or broadcast to it, as one weight for each position, ``[B, L]``.

Masks come as ``mask.unsqueeze(2)``, expanded or repeated over D, transposed, cast, inverted. Axes have labels: 0, 1, ... for
those of the ids, the rank of the ids for D, :data:`NONE` for one along which nothing changes. Walking back through views with
labels leads to the tensor that the user's code began with, and that is the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .axis_sizes import transposed
from .graph import aten, is_op, is_pure, value_of
from .lazy import Lazy, same_value

NONE = -1
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default, aten.to.other)
_COPIES = (aten.contiguous.default, aten.clone.default, aten.lift_fresh_copy.default, aten.alias.default)
_NOT = (aten.logical_not.default, aten.bitwise_not.default)
_REPEATS = (aten.repeat.default, aten.tile.default)
_TRANSPOSES = (aten.transpose.int, aten.permute.default, aten.mT.default)


@dataclass(frozen=True)
class Ids:
    """The ids of a lookup, which give axes 0 to ``rank - 1`` their labels, and the dtype of its table."""

    node: Node
    dtype: torch.dtype

    @property
    def shape(self) -> tuple:
        value = value_of(self.node)
        assert value is not None
        return tuple(value.shape)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def static(self) -> bool:
        """Sizes are the sample's (the graph was traced, not exported): another batch may have others, also where it has 1."""
        return all(isinstance(size, int) for size in self.shape)


@dataclass(frozen=True)
class Weight:
    """``value`` (a node or a lazy call) has axes ``labels``; as a mask it keeps exactly the ids other than ``leaves_out``."""

    value: Any
    labels: tuple[int, ...]
    leaves_out: int | None = None

    def by_position(self, ids: Ids) -> Any:
        """The weight with exactly the shape of the ids, in the table's dtype."""
        value = _aligned(self.value, self.labels, ids)
        known = value_of(self.value)
        sizes = {label: str(size) for label, size in zip(self.labels, known.shape)} if known is not None else {}
        if any(_is_one(size) or sizes.get(label) != str(size) for label, size in enumerate(ids.shape)):
            value = Lazy(aten.expand_as.default, (value, ids.node))
        known = value_of(value)
        return value if known is not None and known.dtype == ids.dtype else Lazy(aten.to.dtype, (value, ids.dtype))


def position_weight(node: Node, labels: tuple[int, ...], ids: Ids, inverted: bool = False) -> Weight | None:
    """``node``, whose axes are ``labels``, as a :class:`Weight`; ``None`` where it is not one number for each position.

    ``inverted``: positions where ``node`` is true are those left out."""
    known, sizes = value_of(node), (*ids.shape, None, None)
    if known is not None and any(_is_one(sizes[label]) and not _is_one(size) for size, label in zip(known.shape, labels)):
        return None  # the rows are repeated
    found = _peel(node, labels, ids)
    if found is None or ids.rank in found[1]:
        return None
    value, labels = found
    leaves_out = None
    if labels == tuple(range(ids.rank)):
        leaves_out = _kept_but(value, ids.node, inverted)
    return Weight(Lazy(aten.logical_not.default, (value,)) if inverted else value, labels, leaves_out)


def _peel(node: Any, labels: tuple[int, ...], ids: Ids) -> tuple[Any, tuple[int, ...]] | None:
    value = value_of(node)
    if value is None or value.dim() != len(labels):
        return None
    # Axes of the ids keep their labels where they have size 1: that of x[:, :1] is 0 if x has no columns.
    labels = tuple(NONE if _is_one(size) and label == ids.rank else label for size, label in zip(value.shape, labels))
    if not isinstance(node, Node) or node.op != "call_function" or not node.args:
        return node, labels
    source, rank = node.args[0], len(labels)
    if is_op(node, aten.cat.default) and len(source) == 1:  # type: ignore[arg-type]
        return _peel(source[0], labels, ids)  # type: ignore[index]
    before = _before(node, labels)
    if before is not None:
        return _peel(source, before, ids)
    if is_op(node, *_CASTS) and _keeps_values(value_of(source), value, ids):
        return _peel(source, labels, ids)
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags and is_pure(node)
    if pointwise and (ids.rank in labels or is_op(node, *_NOT)):
        parts = [_peel(a, labels[rank - _rank(a) :], ids) if isinstance(a, Node) else (a, ()) for a in node.args]
        if any(p is None or ids.rank in p[1] for p in parts) or node.kwargs:
            return None
        aligned = [
            _aligned(v if is_op(node, *_NOT) else _as_before(v, a), kept, ids) if isinstance(a, Node) else a
            for a, (v, kept) in zip(node.args, parts)  # type: ignore[misc]
        ]
        present = {label for _, kept in parts for label in kept}  # type: ignore[misc]
        return Lazy(node.target, tuple(aligned)), tuple(i if i in present else NONE for i in range(ids.rank))
    return node, labels


def _as_before(value: Any, node: Node) -> Any:
    """``value`` in the dtype of ``node``, from which it was peeled: casts go away, and what computes with it must not see that."""
    known, was = value_of(value), value_of(node)
    assert was is not None
    return value if known is not None and known.dtype == was.dtype else Lazy(aten.to.dtype, (value, was.dtype))


def _before(node: Node, labels: tuple[int, ...]) -> tuple[int, ...] | None:
    """Labels of the first argument of a view or repetition; ``None`` for what is neither."""
    source, rank = value_of(node.args[0]), len(labels)
    if source is None:
        return None
    if is_op(node, *_COPIES):
        return labels
    if is_op(node, *_TRANSPOSES):
        order = transposed(node, rank)
        return tuple(label for _, label in sorted(zip(order, labels)))
    if is_op(node, aten.unsqueeze.default):
        at: Any = node.args[1] % rank  # type: ignore[operator]
        return labels[:at] + labels[at + 1 :]
    if is_op(node, aten.squeeze.dim) and source.dim() == rank + 1:
        at = node.args[1] % (rank + 1)  # type: ignore[operator]
        return labels[:at] + (NONE,) + labels[at:]
    if is_op(node, aten.expand.default, aten.expand_as.default):
        return labels[rank - source.dim() :]
    if is_op(node, aten.repeat_interleave.self_int) and len(node.args) > 2 and isinstance(node.args[2], int):
        at = int(node.args[2]) % rank
        return labels[:at] + (NONE,) + labels[at + 1 :] if _is_one(source.shape[at]) else None
    if is_op(node, *_REPEATS):
        repeats = list(node.args[1])  # type: ignore[arg-type]
        if len(repeats) != rank:
            return None
        kept = range(rank - source.dim(), rank)
        if all(_is_one(repeats[i]) or _is_one(source.shape[i - rank + source.dim()]) for i in kept):
            return tuple(labels[i] for i in kept)
    return None


def _aligned(value: Any, labels: tuple[int, ...], ids: Ids) -> Any:
    """``value`` with the axes of the ids in order, of size 1 where it does not have them."""
    for at in reversed(range(len(labels))):
        if labels[at] == NONE:
            value = Lazy(aten.squeeze.dim, (value, at))
    held = [label for label in labels if label != NONE]
    if held != sorted(held):
        value = Lazy(aten.permute.default, (value, sorted(range(len(held)), key=held.__getitem__)))
    for label in range(ids.rank):
        if label not in held:
            value = Lazy(aten.unsqueeze.default, (value, label))
    return value


def _kept_but(mask: Any, ids: Node, inverted: bool) -> int | None:
    """The row ``p`` where ``mask`` (of the shape of the ids) is one wherever the id is not ``p``, and zero where it is."""
    while isinstance(mask, (Node, Lazy)):
        if is_op(mask, *_CASTS) or isinstance(mask, Lazy) and mask.target is aten.to.dtype:
            if not _is_zero_one(mask.args[0]):
                break
            mask = mask.args[0]
        elif mask.target in _NOT and _is_bool(mask.args[0]):
            mask, inverted = mask.args[0], not inverted
        elif _is_one_minus(mask) and _is_zero_one(mask.args[0]):
            mask, inverted = mask.args[0], not inverted
        else:
            break
    if not isinstance(mask, Node) or mask.op != "call_function" or len(mask.args) < 2 or not _same_ids(mask.args[0], ids):
        return None
    number = mask.args[1]
    if not isinstance(number, (int, float)) or not float(number).is_integer():
        return None
    if is_op(mask, aten.ne.Scalar) and not inverted or is_op(mask, aten.eq.Scalar) and inverted:
        return int(number) if number >= 0 else None
    # Ids of nn.Embedding are never negative: it refuses them. (For weight[ids], nobody asks which row is left out.)
    above = (aten.gt.Scalar, 0), (aten.ge.Scalar, 1)
    below = (aten.le.Scalar, 0), (aten.lt.Scalar, 1)
    return 0 if any(mask.target is t and number == n for t, n in (below if inverted else above)) else None


def _is_one_minus(mask: Node | Lazy) -> bool:
    return mask.target is aten.rsub.Scalar and mask.args[1:] in ((1,), (1, 1)) and not getattr(mask, "kwargs", None)


def _same_ids(a: Any, b: Any) -> bool:
    """Equal up to casts between integer types."""

    def bare(node: Any) -> Any:
        while is_op(node, *_CASTS) and all(_is_integer(value_of(n)) for n in (node, node.args[0])):
            node = node.args[0]
        return node

    return same_value(bare(a), bare(b))


def _is_integer(value: Tensor | None) -> bool:
    return value is not None and value.dtype in (torch.int32, torch.int64)


def _is_bool(mask: Any) -> bool:
    known = value_of(mask)
    return known is not None and known.dtype == torch.bool


def _is_zero_one(node: Any) -> bool:
    """A truth value, or one cast to a number."""
    while (is_op(node, *_CASTS) or isinstance(node, Lazy) and node.target is aten.to.dtype) and not _is_bool(node):
        node = node.args[0]
    return _is_bool(node)


def _keeps_values(source: Tensor | None, result: Tensor, ids: Ids) -> bool:
    if source is None or source.device != result.device:
        return False
    return source.dtype in (torch.bool, result.dtype) or result.dtype == ids.dtype


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _rank(node: Any) -> int:
    value = value_of(node)
    return 0 if value is None else value.dim()
