"""Second-order factorization machines: ``((sum x)^2 - sum x^2) / 2`` over the features becomes one op.

``(x_1 + ... + x_F)^2 - (x_1^2 + ... + x_F^2) = 2 * sum over i < j of x_i * x_j`` (Rendle 2010), for each column of X
``[batch, features, dim]``. The op sums ``x_j * (x_1 + ... + x_{j-1})`` in one sweep over X, where the plain ops make two tensors
of its size, and its backward needs X alone. Sums over dim and factors that follow go into it.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from ..kernels.interaction.op import FM
from .feature_pairs import Facts, Feature, Found, InteractionPass, Table, feature, shape_of
from .graph import Editor, aten, is_op
from .interaction_tail import Tail, add_up, follow
from .lazy import same_value
from .records import Skip


@dataclass
class FuseFm(InteractionPass):
    """Rewrite squares of sums minus sums of squares, where that is measured faster."""

    name: ClassVar[str] = "fuse_fm"
    kind: ClassVar[str] = "interactions"
    numerics: ClassVar[str] = "reassociated"

    def find(self, node: Node, facts: Facts) -> Found | Skip | None:
        if not is_op(node, aten.sub.Tensor) or len(node.args) != 2 or node.kwargs:
            return None
        for square_of_sum, sum_of_squares, sign in ((*node.args, 1.0), (*reversed(node.args), -1.0)):
            summed = _square(square_of_sum)
            left = None if summed is None else _FieldSum.of(summed, squares=False)
            right = None if left is None else _FieldSum.of(sum_of_squares, squares=True)
            if left is None or right is None or not left.same(right, facts):
                continue
            axes: list[Any] = list("bd")
            if left.keep is not None:
                axes.insert(left.keep, 1)
            tail = follow(node, axes, 2.0 * sign)
            nodes = [node, square_of_sum, *left.nodes, *right.nodes, *tail.nodes]
            return left.replaced_by_op(tail, nodes)
        return None


def _square(node: Any) -> Node | None:
    """What ``node`` is the square of."""
    if is_op(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return node.args[0]
    if is_op(node, aten.square.default) or (is_op(node, aten.mul.Tensor) and node.args[0] is node.args[1]):
        return node.args[0]
    return None


@dataclass
class _FieldSum:
    """A sum over the features of X: of a tensor along ``dim`` (then ``features`` is empty), or of a list of features."""

    x: Node | None
    dim: int
    keep: int | None
    features: list[Feature]
    nodes: list[Node]

    def same(self, other: _FieldSum, facts: Facts) -> bool:
        """Of the same X in the same way?"""
        mine, theirs = ({f.key for f in s.features} for s in (self, other))
        alike = (self.dim, self.keep, mine) == (other.dim, other.keep, theirs)
        return alike and (self.x is other.x or same_value(self.x, other.x, facts.writes))

    @staticmethod
    def of(node: Any, squares: bool) -> _FieldSum | None:
        """``node`` as a sum over features, or with ``squares`` over their squares."""
        if is_op(node, aten.sum.dim_IntList) and not node.kwargs:
            whole, dims = node.args[0], node.args[1]
            x = _square(whole) if squares else whole
            shape = shape_of(x)
            if shape is None or len(shape) != 3 or not isinstance(dims, (list, tuple)) or len(dims) != 1:
                return None
            dim = dims[0] % 3
            keep = dim if len(node.args) > 2 and node.args[2] else None
            return _FieldSum(x, dim, keep, [], [node, whole] if squares else [node])
        leaves: list[Node] = []
        nodes = [node]
        if not is_op(node, aten.add.Tensor) or not add_up(node, leaves, nodes):
            return None
        parts = [_square(leaf) for leaf in leaves] if squares else leaves
        features = [feature(p) for p in parts]
        found = [f for f in features if f is not None]
        if len(found) < max(3, len(parts)) or len({f.key for f in found}) != len(found) or len({f.kept for f in found}) != 1:
            return None
        nodes += [leaf for leaf in leaves if squares] + [n for f in found for n in f.nodes]
        return _FieldSum(None, 1, 1 if found[0].kept else None, found, nodes)

    def replaced_by_op(self, tail: Tail, nodes: list[Node]) -> Found | None:
        reduce = tail.summed("d")
        table = Table.of([(self.x, 0)] if self.x is not None else [f.key for f in self.features], nodes)
        if table is None or (self.x is None and table.features != len(self.features)):
            return None

        def build(editor: Editor, copy_of) -> Node:
            place = copy_of(tail.anchor)
            x = table.build(editor, copy_of, place)
            if self.dim != 1:  # the features come first, or last
                x = editor.call(aten.transpose.int, x, self.dim, 1, before=place, sources=[place])
            made = editor.call(FM, x, tail.scale, reduce, before=place, sources=[copy_of(n) for n in nodes])
            return tail.restore(editor, made, place)

        what = "summed over dim too" if reduce else "one number a column"
        return Found(tail.anchor, nodes, table.bases, build, f"the products of all pairs of features in 1 call, {what}")
