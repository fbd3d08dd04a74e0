"""What becomes of the rows ``[*ids, D]`` of a lookup: every way in which they are summed over a sequence, or the largest taken,
and every other reader.

The walk starts at the lookup and follows views and multiplications to sums, means, products with a ``[1, L]`` matrix and maxima;
to maxima also positions that are filled with a number or have one added. Axes carry labels as in :mod:`.position_weights`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node

from .axis_sizes import axis_source, size_source, transposed
from .graph import arguments, aten, is_op, packet_name, value_of
from .lazy import Lazy
from .position_weights import NONE, Ids, Weight, position_weight

_SAME = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.to.dtype, aten._to_copy.default)
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.flatten.using_ints,
)
_TRANSPOSES = (aten.transpose.int, aten.permute.default, aten.mT.default)
_SHAPE_ONLY = (aten.expand_as.default, aten.type_as.default, aten.view_as.default)
_FILLED = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
_MAXIMUM = "it is a maximum over the sequence and something else, or with its places; the values over one axis of the ids are needed"
_CHANGED = "the maximum over the sequence, and not by a mask or one number for each position"
_COMPARISONS = tuple(
    getattr(aten, name).Scalar for name in ("ne", "eq", "gt", "ge", "lt", "le")
)  # fmt: skip


@dataclass(frozen=True)
class Pool:
    """``end`` is the sum of the rows over the axes ``over`` of the ids, weighted; its own axes are ``axes``.

    ``mean``: divided by the number of positions. ``passed``: the nodes from the lookup to ``end``."""

    end: Node
    axes: tuple[int, ...]
    over: tuple[int, ...]
    weights: tuple[Weight, ...]
    mean: bool
    passed: tuple[Node, ...]


@dataclass(frozen=True)
class Maximum:
    """``end`` is the largest of the rows along the axis ``over`` of the ids; its own axes are ``axes``. ``mode`` and ``kind`` as in
    ``kernels/max_pool/plain.py``; ``mask`` and ``fill`` are what ``kind`` needs."""

    end: Node
    axes: tuple[int, ...]
    over: int
    mode: str
    kind: str
    mask: Weight | None
    fill: float
    passed: tuple[Node, ...]


@dataclass
class Readers:
    """``pools``; ``maxima``; ``row_sums``: comparisons of each row's sum with 0, as (sum, its axes); ``sizes``: readers of the shape
    alone; ``others``: who reads the rows themselves, and why a sum over the sequence did not fit, if one did not."""

    pools: list[Pool] = field(default_factory=list)
    maxima: list[Maximum] = field(default_factory=list)
    row_sums: list[tuple[Node, tuple[int, ...]]] = field(default_factory=list)
    sizes: list[Node] = field(default_factory=list)
    others: list[Node] = field(default_factory=list)
    misfit: tuple[str, Node] | None = None


@dataclass(frozen=True)
class _Rows:
    """A value on the way: the rows with ``axes``, times ``weights``; then ``change``: (kind, mask, fill) of a :class:`Maximum`."""

    node: Node
    axes: tuple[int, ...]
    weights: tuple[Weight, ...]
    passed: tuple[Node, ...]
    change: tuple[str, Weight, float] | None = None

    def at(self, node: Node, axes: tuple[int, ...], *weights: Weight) -> _Rows:
        return replace(self, node=node, axes=axes, weights=self.weights + weights, passed=(*self.passed, node))


def read_readers(result: Node, ids: Ids) -> Readers:
    """Follow every reader of ``result``, the rows ``[*ids, D]`` of a lookup."""
    found = Readers()
    stack = [_Rows(result, tuple(range(ids.rank + 1)), (), ())]
    while stack:
        rows = stack.pop()
        for user in rows.node.users:
            if (step := _step(user, rows, ids, found)) is not None:
                stack.append(step)
    return found


def _step(user: Node, rows: _Rows, ids: Ids, found: Readers) -> _Rows | None:
    """The rows after ``user``, or ``None`` where the walk ends and ``found`` says how."""
    step: _Rows | None = None
    if user.target is getattr and user.args[1] in ("dtype", "device"):
        found.sizes.append(user)
        return None
    if is_op(user, *_SHAPE_ONLY) and user.args[0] is not rows.node or is_op(user, aten.sym_size.int, *_FILLED):
        found.sizes.append(user)
        return None
    if _is_maximum(user, rows, ids):
        maximum = _maximum(user, rows, ids)
        if maximum is not None:
            found.maxima.append(maximum)
            return None
        found.misfit = (_MAXIMUM, user)
    if not _reads_once(user, rows.node) or (made := value_of(user)) is None:
        found.others.append(user)
        return None
    if rows.change is None and is_op(user, aten.sum.dim_IntList, aten.mean.dim):
        return _reduced(user, rows, ids, found)
    if rows.change is None and is_op(user, aten.bmm.default, aten.matmul.default, aten.einsum.default):
        pool = _einsum(user, rows, ids) if is_op(user, aten.einsum.default) else _product(user, rows, ids)
        if pool is not None:
            found.pools.append(pool)
            return None
    elif made.dtype == ids.dtype:
        step = _same_rows(user, rows, ids, tuple(made.shape))
    elif is_op(user, aten.mul.Tensor):
        found.misfit = (f"its weights make the rows {made.dtype}; its table is {ids.dtype}", user)
    if step is None:
        found.others.append(user)
        if found.misfit is None and any(_is_maximum(n, rows.at(user, rows.axes), ids) for n in user.users):
            found.misfit = (f"its rows are changed by {packet_name(user)} before {_CHANGED}", user)
    return step


def _is_maximum(node: Node, rows: _Rows, ids: Ids) -> bool:
    """Is ``node`` the largest of values with the axes of ``rows``, along an axis of the ids?"""
    if not is_op(node, aten.max.dim, aten.amax.default) or len(node.args) < 2 or ids.rank < 2:
        return False
    dims: Any = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    known = value_of(rows.node)
    return known is not None and known.dim() == len(rows.axes) and any(rows.axes[d] in range(ids.rank) for d in dims)


def _maximum(user: Node, rows: _Rows, ids: Ids) -> Maximum | None:
    """The maximum that ``user`` takes; ``None`` where it is of more than one axis, or tells where it was found."""
    a = arguments(user)
    dims, mode = ([a["dim"]], "max") if is_op(user, aten.max.dim) else (list(a["dim"]), "amax")
    rank, end = len(rows.axes), user
    if len(dims) != 1 or len(rows.weights) + (rows.change is not None) > 1:
        return None
    if mode == "max":
        parts = {u.args[1]: u for u in user.users if is_op(u, operator.getitem) and u.users}
        if list(parts) != [0] or any(not is_op(u, operator.getitem) for u in user.users):
            return None
        end = parts[0]
    at = dims[0] % rank
    kind, mask, fill = rows.change or (("multiply", rows.weights[0], 0.0) if rows.weights else ("none", None, 0.0))
    axes = tuple(NONE if i == at else label for i, label in enumerate(rows.axes) if a["keepdim"] or i != at)
    return Maximum(end, axes, rows.axes[at], mode, kind, mask, fill, (*rows.passed, user, end))


def _reads_once(user: Node, node: Node) -> bool:
    count = 0
    for arg in [*user.args, *user.kwargs.values()]:
        count += sum(a is node for a in arg) if isinstance(arg, (list, tuple)) else arg is node
    return user.op == "call_function" and count == 1


def _same_rows(user: Node, rows: _Rows, ids: Ids, shape: tuple) -> _Rows | None:
    rank = len(rows.axes)
    if is_op(user, *_SAME):
        return rows.at(user, rows.axes)
    if is_op(user, *_TRANSPOSES):
        return rows.at(user, tuple(rows.axes[i] for i in transposed(user, rank)))
    if is_op(user, *_VIEWS):
        axes = _viewed(user, rows, ids, shape)
        return None if axes is None else rows.at(user, axes)
    if rows.change is not None:
        return None
    other, inverted = None, False
    if is_op(user, aten.mul.Tensor):
        other = user.args[1] if user.args[0] is rows.node else user.args[0]
    elif (filled := _filled(user, rows.node)) is not None:
        other, inverted, fill = filled
        if fill != 0:
            weight = _weight(other, rows, ids, shape, inverted)
            ready = weight is not None and not rows.weights
            return replace(rows.at(user, rows.axes), change=("keep", weight, fill)) if ready else None  # type: ignore[arg-type]
    elif is_op(user, aten.add.Tensor, aten.sub.Tensor) and len(user.args) == 2 and not user.kwargs and not rows.weights:
        first = user.args[0] is rows.node
        weight = _weight(user.args[1] if first else user.args[0], rows, ids, shape, False) if first or is_op(user, aten.add.Tensor) else None
        if weight is None:
            return None
        if is_op(user, aten.sub.Tensor):
            weight = replace(weight, value=Lazy(aten.neg.default, (weight.value,)))
        return replace(rows.at(user, rows.axes), change=("add", weight, 0.0))
    weight = _weight(other, rows, ids, shape, inverted)
    return None if weight is None else rows.at(user, rows.axes, weight)


def _filled(user: Node, node: Node) -> tuple[Any, bool, float] | None:
    """(mask, whether its true positions are those filled, with what), where ``user`` fills positions of ``node``."""
    if is_op(user, aten.masked_fill.Scalar) and user.args[0] is node:
        mask, inverted, fill = user.args[1], True, user.args[2]
    elif is_op(user, aten.where.self) and node in user.args[1:]:
        mask, inverted = user.args[0], user.args[2] is node
        fill = _number(user.args[1 if inverted else 2])
    elif is_op(user, aten.where.ScalarOther) and user.args[1] is node:
        mask, inverted, fill = user.args[0], False, user.args[2]
    else:
        return None
    return (mask, inverted, float(fill)) if isinstance(fill, (int, float)) else None


def _weight(other: Any, rows: _Rows, ids: Ids, shape: tuple, inverted: bool) -> Weight | None:
    """``other``, with which the rows are multiplied, filled or shifted, as one number for each position."""
    known, rank = value_of(other), len(rows.axes)
    if known is None or len(shape) != rank or not 0 < known.dim() <= rank:
        return None
    axes = rows.axes[rank - known.dim() :]
    if any(label == NONE and size != 1 for label, size in zip(axes, known.shape)):
        return None  # the rows are repeated
    return position_weight(other, axes, ids, inverted)


def _width(rows: _Rows, ids: Ids) -> Any:
    """D, or ``None`` where its axis is gone."""
    value = value_of(rows.node)
    return value.shape[rows.axes.index(ids.rank)] if value is not None and ids.rank in rows.axes else None


def _viewed(user: Node, rows: _Rows, ids: Ids, shape: tuple) -> tuple[int, ...] | None:
    """The axes after a view that adds or removes axes of size 1, and does nothing else."""
    before = value_of(rows.node)
    assert before is not None
    if is_op(user, aten.unsqueeze.default):
        at = user.args[1] % len(shape)  # type: ignore[operator]
        return rows.axes[:at] + (NONE,) + rows.axes[at:]
    if ids.static or not is_op(user, aten.view.default, aten.reshape.default):
        return _viewed_on_any_batch(user, rows, ids)
    sizes = [str(size) for size in before.shape]
    if sizes == list(map(str, shape)):
        return rows.axes
    # Where D is 1, its axis is as good as none.
    old = [(label, size) for label, size in zip(rows.axes, sizes) if size != "1" or label not in (NONE, ids.rank)]
    if [size for _, size in old] != [str(size) for size in shape if str(size) != "1"]:
        return None
    labels = iter(label for label, _ in old)
    return tuple(NONE if str(size) == "1" else next(labels) for size in shape)


def _viewed_on_any_batch(user: Node, rows: _Rows, ids: Ids) -> tuple[int, ...] | None:
    """The same by what the view says, whatever the sizes are."""
    axes, rank, width = rows.axes, len(rows.axes), _width(rows, ids)
    ones = (NONE, ids.rank) if width == 1 else (NONE,)
    if is_op(user, aten.squeeze.dim):
        at: Any = user.args[1] % rank  # type: ignore[operator]
        if axes[at] == ids.rank and width != 1:
            return axes
        return axes[:at] + axes[at + 1 :] if axes[at] in ones else None
    if is_op(user, aten.flatten.using_ints):
        a = arguments(user)
        first, last = a["start_dim"] % rank, a["end_dim"] % rank
        merged = axes[first : last + 1]
        held = [label for label in merged if label not in ones] or [max(merged)]
        return axes[:first] + (held[0],) + axes[last + 1 :] if len(held) == 1 else None
    if not is_op(user, aten.view.default, aten.reshape.default):
        return None  # squeeze() of whatever is 1
    left = [label for label in axes if label not in ones]
    found = []
    for asked in list(user.args[1]):  # type: ignore[arg-type]
        label = left[0] if left else NONE
        if asked == 1 and isinstance(asked, int):
            label = NONE
        elif isinstance(asked, int) and asked != -1:
            if label != ids.rank or asked != width:
                return None
        elif not isinstance(asked, int):
            said = _label_of(asked, rows, ids)
            if said is None or said != label and said not in ones:
                return None
            label = said if said == label else NONE
        # Where all others keep their sizes, -1 is the size of the one that is left.
        if label != NONE:
            left.pop(0)
        found.append(label)
    return None if left else tuple(found)


def _label_of(size: Any, rows: _Rows, ids: Ids) -> int | None:
    """The axis whose size ``size`` is, on every batch."""
    if is_op(size, aten.sym_size.int) and size.args[0] is rows.node:
        return rows.axes[size.args[1]]
    source = size_source(size)
    labels = [label for label in range(ids.rank) if source is not None and axis_source(ids.node, label) == source]
    return labels[0] if len(labels) == 1 else None


def _number(node: Any) -> Any:
    """The number that all of a tensor is."""
    if is_op(node, aten.zeros_like.default, aten.zeros.default):
        return 0
    made = is_op(node, aten.scalar_tensor.default, aten.full.default, aten.full_like.default)
    return node.args[-1] if made else None


def _reduced(user: Node, rows: _Rows, ids: Ids, found: Readers) -> _Rows | None:
    a = arguments(user)
    rank, made = len(rows.axes), value_of(user)
    dims = {d % rank for d in a["dim"]} if a["dim"] else set(range(rank))
    gone = [rows.axes[d] for d in sorted(dims)]
    axes = tuple(NONE if i in dims else label for i, label in enumerate(rows.axes) if a["keepdim"] or i not in dims)
    over = tuple(sorted(label for label in gone if label not in (NONE, ids.rank)))
    width = _width(rows, ids) if ids.rank in gone else 1
    if not over:
        if ids.rank not in gone or width == 1:
            return rows.at(user, axes)  # sums of one number each
        if (
            is_op(user, aten.sum.dim_IntList)
            and not rows.weights
            and all(is_op(u, *_COMPARISONS) and u.args[1] == 0 for u in user.users)
        ):
            found.row_sums.append((user, axes))
        else:
            found.others.append(user)
        return None
    if ids.rank == 1 or len(over) == ids.rank:
        found.others.append(user)  # over the batch: no sequence
    elif ids.rank in gone and width != 1:
        found.misfit = ("it is summed over the sequence and its columns at once; a sum over the sequence alone is needed", user)
    elif made is None or made.dtype != ids.dtype:
        found.misfit = (f"it is summed in {a['dtype']}; its table is {ids.dtype}", user)
    else:
        found.pools.append(Pool(user, axes, over, rows.weights, is_op(user, aten.mean.dim), (*rows.passed, user)))
        return None
    if user not in found.others:
        found.others.append(user)
    return None


def _product(user: Node, rows: _Rows, ids: Ids) -> Pool | None:
    """``[.., 1, L] @ [.., L, D]`` or ``[.., D, L] @ [.., L, 1]``."""
    left = user.args[0] is not rows.node
    other = user.args[0] if left else user.args[1]
    known, made = value_of(other), value_of(user)
    rank = len(rows.axes)
    if known is None or made is None or made.dtype != ids.dtype or known.dim() != rank or rank < 3:
        return None
    summed, kept = (rows.axes[-2], rows.axes[-1]) if left else (rows.axes[-1], rows.axes[-2])
    if summed in (NONE, ids.rank) or known.shape[-2 if left else -1] != 1 or len({*rows.axes[:-2]} - {NONE}) != rank - 2:
        return None
    assert isinstance(other, Node)
    weight = position_weight(other, rows.axes[:-2] + ((NONE, summed) if left else (summed, NONE)), ids)
    if weight is None:
        return None
    axes = rows.axes[:-2] + ((NONE, kept) if left else (kept, NONE))
    return Pool(user, axes, (summed,), (*rows.weights, weight), False, (*rows.passed, user))


def _einsum(user: Node, rows: _Rows, ids: Ids) -> Pool | None:
    """``bl,bld->bd``, with any letters and in either order."""
    factors, made = user.args[1], value_of(user)
    if not isinstance(user.args[0], str) or not isinstance(factors, (list, tuple)) or len(factors) != 2 or made is None:
        return None
    terms, arrow, out = user.args[0].replace(" ", "").partition("->")
    letters = terms.split(",")
    mine = 0 if factors[0] is rows.node else 1
    other = factors[1 - mine]
    if not arrow or "." in terms or len(set(letters[mine])) != len(rows.axes) or made.dtype != ids.dtype or NONE in rows.axes:
        return None
    labels = dict(zip(letters[mine], rows.axes))
    over = tuple(sorted(labels[c] for c in labels if c not in out))
    if not set(letters[1 - mine] + out) <= set(labels) or not over or ids.rank in over or len(over) == ids.rank:
        return None
    if len(set(letters[1 - mine])) != len(letters[1 - mine]) or not isinstance(other, Node):
        return None
    weight = position_weight(other, tuple(labels[c] for c in letters[1 - mine]), ids)
    if weight is None:
        return None
    return Pool(user, tuple(labels[c] for c in out), over, (*rows.weights, weight), False, (*rows.passed, user))
