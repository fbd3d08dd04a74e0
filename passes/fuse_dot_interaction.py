"""Dot interactions: the products of each feature with some others, taken from ``X X^T``, become one op.

X is ``[batch, features, dim]``. In every spelling - bmm, matmul, einsum or a sum of broadcast products; then index lists,
``tril_indices``, a mask or an index into the flat matrix - a fixed list of pairs is selected (DLRM, Naumov et al. 2019; PNN, Qu et
al. 2016). The op computes one triangle, writes the pairs in the order of the plain model, beside the tensors it concatenates them
with, and its backward needs X alone, where the plain selection scatters into a matrix for each sample.

A product X X^T that is read as a matrix (attention, a projection of it) is not an interaction in this sense: it is recorded as
skipped.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ..kernels.interaction.op import DOT_INTERACTION
from ..kernels.interaction.pairs import Pairs
from .feature_pairs import (
    Constant,
    Facts,
    Found,
    InteractionPass,
    Table,
    dim_of,
    integers,
    join_of,
    only_user,
    rank_of,
    shape_of,
)
from .graph import Editor, aten, is_op, packet_name
from .lazy import same_value
from .records import Skip, skip

_TRANSPOSES = (aten.transpose.int, aten.permute.default, aten.mT.default, aten.adjoint.default)
_FLAT = (aten.flatten.using_ints, aten.view.default, aten.reshape.default)
_CHECKS = (aten.sym_size.int, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default, aten.sym_constrain_range.default)
_TRIANGLES = (aten.tril.default, aten.triu.default)


@dataclass
class FuseDotInteraction(InteractionPass):
    """Rewrite selections of pairs from X times its own transpose, where that is measured faster."""

    name: ClassVar[str] = "fuse_dot_interaction"
    kind: ClassVar[str] = "interactions"
    numerics: ClassVar[str] = "reassociated"

    def find(self, node: Node, facts: Facts) -> Found | Skip | None:
        gram = _gram(node, facts)
        if gram is None:
            return None
        x, nodes = gram
        shape = shape_of(x)
        if shape is None or len(shape) != 3:
            what = "of unknown shape (no sample_inputs)" if shape is None else f"of rank {len(shape)}"
            return skip(f"X times its own transpose is {what}; [batch, features, dim] was needed", at=node)
        sizes = [u for u in node.users if is_op(u, aten.sym_size.int)]
        readers = [u for u in node.users if u not in sizes]
        if len(readers) != 1:
            names = ", ".join(sorted(packet_name(u) or u.op for u in readers))
            return skip(f"X times its own transpose is read by {names}; one selection of pairs from it was needed", at=node)
        picked = _selection(node, readers[0], shape[1], facts)
        if picked is None:
            return skip(
                f"X times its own transpose is read as a matrix by {packet_name(readers[0]) or readers[0].op}; "
                "a fixed selection of pairs from it was needed", at=node,
            )  # fmt: skip
        nodes += sizes + picked.nodes
        table = Table.of([(x, 0)], nodes)
        assert table is not None, "X is one tensor"
        found = dots_of(table, picked.pairs, picked.anchor, nodes, picked.constants, facts, picked.flat)
        found.checks = picked.checks
        found.sizes = [(size, x, min(dim_of(size, 1, 3), 1)) for size in sizes]
        return found


def dots_of(
    table: Table, pairs: Pairs, anchor: Node, nodes: list[Node], constants: list[Constant], facts: Facts, flat: bool = False
) -> Found:
    """``anchor`` ``[batch, pairs]`` (``flat``: ``[batch * pairs]``) as one op on ``table``, which takes over the cat that reads it."""
    join = None if flat else join_of(anchor)
    extras, place = (join.extras, join.place) if join is not None else ([], 0)
    end = join.node if join is not None else anchor
    stored, digest = facts.digest(constants)
    nodes = [*nodes, *(n for c in constants for n in c.nodes), end]

    def build(editor: Editor, copy_of) -> Node:
        last = copy_of(end)
        made = editor.call(
            DOT_INTERACTION, table.build(editor, copy_of, last), [copy_of(e) for e in extras], pairs.encode(), place, [copy_of(n) for n in stored], digest,
            before=last, sources=[copy_of(n) for n in nodes],
        )  # fmt: skip
        if flat:
            made = editor.call(aten.view.default, made, [-1], before=last, sources=[last])
        return made

    count = len({*pairs.first, *pairs.second})
    beside = f", written beside {len(extras)} other tensors" if extras else ""
    return Found(end, nodes, table.bases, build, f"{len(pairs)} dot products of {count} features in 1 call{beside}")


# --- X X^T -----------------------------------------------------------------------------------------------------------------------


def _gram(node: Node, facts: Facts) -> tuple[Node, list[Node]] | None:
    """(X, the nodes of the product) if ``node`` is X X^T over the last two dimensions."""
    if is_op(node, aten.einsum.default):
        return _einsum(node)
    if is_op(node, aten.sum.dim_IntList):
        return _broadcast(node)
    if not is_op(node, aten.bmm.default, aten.matmul.default):
        return None
    left, right = node.args[0], node.args[1]
    if (whole := _transposed(right)) is not None and same_value(whole, left, facts.writes):
        return left, [right, node]  # type: ignore[return-value]
    if (whole := _transposed(left)) is not None and same_value(whole, right, facts.writes):  # X^T X: the columns of X are the features
        return left, [node]  # type: ignore[return-value]
    return None


def _transposed(node: Any) -> Node | None:
    """What ``node`` swaps the last two dimensions of."""
    if not is_op(node, *_TRANSPOSES):
        return None
    rank, dims = rank_of(node.args[0]), node.args[1:]
    if node.target is aten.transpose.int and (rank < 0 or {d % rank for d in dims} != {rank - 2, rank - 1}):
        return None
    if node.target is aten.permute.default:
        wanted = [*range(rank - 2), rank - 1, rank - 2]
        if rank < 2 or [d % rank for d in dims[0]] != wanted:
            return None
    return node.args[0]


def _einsum(node: Node) -> tuple[Node, list[Node]] | None:
    equation, factors = node.args[0], node.args[1]
    if len(factors) != 2 or factors[0] is not factors[1]:  # type: ignore[arg-type]
        return None
    left, _, out = str(equation).replace(" ", "").partition("->")
    a, _, b = left.partition(",")
    if len(a) != 3 or len(b) != 3 or len(out) != 3 or a[0] != b[0] or out[0] != a[0]:
        return None
    shared = (set(a[1:]) & set(b[1:])) - set(out)
    i, j = (set(s[1:]) - shared for s in (a, b))
    if len(shared) != 1 or len(i) != 1 or len(j) != 1 or i == j or set(out[1:]) != i | j:
        return None
    (summed,) = shared
    if a.index(summed) != b.index(summed) or a.index(summed) != 2:
        return None
    return factors[0], [node]  # type: ignore[return-value]


def _broadcast(node: Node) -> tuple[Node, list[Node]] | None:
    """``(X.unsqueeze(1) * X.unsqueeze(2)).sum(-1)``."""
    product, dims = node.args[0], node.args[1]
    if not is_op(product, aten.mul.Tensor) or dims not in ([-1], [3]) or (len(node.args) > 2 and node.args[2]) or node.kwargs:
        return None
    sides = product.args  # type: ignore[union-attr]
    if not all(is_op(s, aten.unsqueeze.default) and rank_of(s.args[0]) == 3 for s in sides):
        return None
    if sides[0].args[0] is not sides[1].args[0] or {dim_of(s, 1, 4) for s in sides} != {1, 2}:  # type: ignore[union-attr]
        return None
    return sides[0].args[0], [*sides, product, node]  # type: ignore[return-value, union-attr, list-item]


# --- which pairs -----------------------------------------------------------------------------------------------------------------


@dataclass
class _Picked:
    pairs: Pairs
    anchor: Node
    nodes: list[Node]
    constants: list[Constant]
    flat: bool = False
    checks: list[Node] = field(default_factory=list)


def _selection(matrix: Node, reader: Node | None, features: Any, facts: Facts) -> _Picked | None:
    """The pairs that the only ``reader`` of the matrix (or of its flat form, or of one triangle) selects; ``None`` if it does not."""
    nodes: list[Node] = [matrix]
    kept: Callable[[int, int], bool] | None = None
    node = matrix
    if is_op(reader, *_TRIANGLES):
        offset: Any = reader.args[1] if len(reader.args) > 1 else 0  # type: ignore[union-attr]
        lower = reader.target is aten.tril.default  # type: ignore[union-attr]
        kept = (lambda i, j: j - i <= offset) if lower else (lambda i, j: j - i >= offset)
        nodes.append(reader)  # type: ignore[arg-type]
        node, reader = reader, only_user(reader)  # type: ignore[arg-type, assignment]
    if reader is None or node is None:
        return None
    picked = _read_of(node, reader, features, facts)
    if picked is None or (kept is not None and not all(map(kept, picked.pairs.first, picked.pairs.second))):
        return None
    if isinstance(features, int) and picked.pairs.least_features > features:
        return None
    picked.nodes = nodes + picked.nodes
    return picked


def _read_of(node: Node, reader: Node, features: Any, facts: Facts) -> _Picked | None:
    if is_op(reader, *_FLAT):
        shape, reader_shape = shape_of(node), shape_of(reader)
        last = only_user(reader)
        if shape is None or reader_shape is None or len(reader_shape) != 2 or str(reader_shape[0]) != str(shape[0]) or last is None:
            return None
        return _flat_read(reader, last, features, facts)
    if is_op(reader, aten.masked_select.default):
        mask = facts.constant(reader.args[1])
        pairs = None if mask is None else _of_mask(mask, features)
        if mask is None or pairs is None:
            return None
        views = [u for u in reader.users if is_op(u, *_FLAT)]
        checks = _size_checks(reader, views)
        if len(views) == 1 and checks is not None and _has_columns(views[0], node, len(pairs)):
            return _Picked(pairs, views[0], [reader, *checks, views[0]], [mask], checks=checks)
        return _Picked(pairs, reader, [reader], [mask], flat=True)
    if not is_op(reader, aten.index.Tensor) or reader.args[0] is not node:
        return None
    indices = list(reader.args[1])  # type: ignore[arg-type]
    constants = [c for i in indices[1:] if (c := facts.constant(i)) is not None]
    if indices[0] is not None or len(constants) != len(indices) - 1:
        return None
    if len(indices) == 2 and (pairs := _of_mask(constants[0], features)) is not None:
        return _Picked(pairs, reader, [reader], constants)
    if len(indices) != 3:
        return None
    first, second = (integers(c, features) for c in constants)
    if first is None or second is None or len(first) != len(second):
        return None
    return _Picked(Pairs(tuple(first), tuple(second)), reader, [reader], constants)


def _has_columns(view: Node, matrix: Node, count: int) -> bool:
    """Does ``view`` have ``count`` columns? (``view(batch, -1)`` does too: all that is selected is batch x count numbers.)"""
    sizes, shape = list(view.args[1]), shape_of(matrix)  # type: ignore[arg-type]
    if len(sizes) != 2 or shape is None:
        return False
    rows = sizes[0].meta.get("val") if isinstance(sizes[0], Node) else sizes[0]
    return (rows == -1 if isinstance(rows, int) and rows < 0 else str(rows) == str(shape[0])) and sizes[1] in (-1, count)


def _size_checks(selected: Node, views: list[Node]) -> list[Node] | None:
    """The nodes by which export asserts how many numbers a mask selects; ``None`` if anything else reads ``selected``."""
    found: dict[Node, None] = {}
    stack = [u for u in selected.users if u not in views]
    while stack:
        node = stack.pop()
        if node not in views and node not in found:
            arithmetic = node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload)
            if not arithmetic and not is_op(node, *_CHECKS):
                return None
            found[node] = None
            stack.extend(node.users)
    return sorted(found)


def _of_mask(mask: Constant, features: Any) -> Pairs | None:
    """The pairs where ``mask`` [features, features] holds; a mask of other sizes is broadcast or refused by the plain model."""
    value = mask.value
    if value.dim() == 3 and value.shape[0] == 1:
        value = value[0]
    if not isinstance(features, int) or tuple(value.shape) != (features, features) or value.dtype != torch.bool:
        return None
    first, second = value.nonzero(as_tuple=True)
    return Pairs(tuple(first.tolist()), tuple(second.tolist()))


def _flat_read(flat: Node, reader: Node, features: Any, facts: Facts) -> _Picked | None:
    """An index into the ``features * features`` columns of the flat matrix."""
    if not isinstance(features, int):
        return None
    if is_op(reader, aten.index_select.default) and dim_of(reader, 1, 2) == 1:
        index = reader.args[2]
    elif is_op(reader, aten.index.Tensor) and len(reader.args[1]) == 2 and reader.args[1][0] is None:  # type: ignore[arg-type, index]
        index = reader.args[1][1]  # type: ignore[index]
    else:
        return None
    constant = facts.constant(index)
    numbers = integers(constant, features * features)
    if constant is None or numbers is None or max(numbers, default=0) >= features * features:
        return None
    pairs = Pairs(tuple(n // features for n in numbers), tuple(n % features for n in numbers))
    return _Picked(pairs, reader, [flat, reader], [constant])
