"""Products of pairs of features, written as index lists, lists of lookups or a Python loop, become one op.

``X[:, rows] * X[:, cols]``, ``index_select`` likewise, ``cat([e[i] for i in rows], 1) * cat([e[j] for j in cols], 1)``, and up to
F(F-1)/2 products ``x[:, i] * x[:, j]`` that are stacked, concatenated or added. What is summed over afterwards decides the op:

* nothing: ``pair_products`` ``[batch, pairs, dim]`` (AFM, FFM). Its backward adds rows up where they lie; the plain one scatters
  ``pairs * dim`` numbers a sample twice, and each ``select`` of a loop makes a zero tensor of X's size.
* dim: ``dot_interaction`` ``[batch, pairs]`` (PNN), beside what it is concatenated with.
* pairs, if they are all of them: ``fm``.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.fx import Node

from ..kernels.interaction.op import DOT_INTERACTION, FM, PAIR_PRODUCTS
from ..kernels.interaction.pairs import Pairs
from .feature_pairs import Constant, Facts, Feature, Found, InteractionPass, Table, dim_of, feature, integers, rank_of, shape_of
from .fuse_dot_interaction import dots_of
from .graph import Editor, aten, is_op
from .interaction_tail import Tail, add_up, follow
from .records import Skip

_FEWEST = 3  # pairs; fewer are no interaction of many features
_MOST_OTHERS = 4  # terms of a sum that are no products

Key = tuple[Node, int | None]


@dataclass
class FusePairProducts(InteractionPass):
    """Rewrite elementwise products of pairs of features, where that is measured faster."""

    name: ClassVar[str] = "fuse_pair_products"
    kind: ClassVar[str] = "interactions"
    numerics: ClassVar[str] = "reassociated"

    def find(self, node: Node, facts: Facts) -> Found | Skip | None:
        found = _indexed(node, facts) or _listed(node)
        if found is None:
            return None
        uses = Counter(key for pair in found.keys for key in set(pair))
        together = Counter(base for base, _ in uses)
        if len(found.keys) < _FEWEST or max(*uses.values(), *together.values()) < 2:
            return None  # a product of two unrelated things, piece by piece
        nodes = list(found.nodes)
        table = Table.of([key for pair in found.keys for key in pair], nodes)
        if table is None:
            return None
        numbers = [tuple(map(table.number, pair)) for pair in found.keys]
        pairs = Pairs(tuple(i for i, _ in numbers), tuple(j for _, j in numbers))
        tail = follow(node, found.axes, limit=0 if found.rest else 8)
        nodes += tail.nodes
        if tail.axes == ["b", "p"]:
            return dots_of(table, pairs, tail.anchor, nodes, found.constants, facts)
        return _replaced(table, pairs, tail, nodes, found, facts)


def _replaced(table: Table, pairs: Pairs, tail: Tail, nodes: list[Node], found: _Products, facts: Facts) -> Found:
    stored, digest = facts.digest(found.constants)
    nodes = [*nodes, *(n for c in found.constants for n in c.nodes)]
    no_pairs, no_dim = (not any(letter in str(a) for a in tail.axes) for letter in "pd")
    by_fm = no_pairs and _are_all(pairs, table.features)

    def build(editor: Editor, copy_of) -> Node:
        last = copy_of(tail.anchor)
        x = table.build(editor, copy_of, last)
        more = {"before": last, "sources": [copy_of(n) for n in nodes]}
        kept = [copy_of(n) for n in stored], digest
        if by_fm:
            made = editor.call(FM, x, 1.0, no_dim, *kept, **more)
        elif no_dim:
            made = editor.call(DOT_INTERACTION, x, [], pairs.encode(), 0, *kept, **more)
        else:
            made = editor.call(PAIR_PRODUCTS, x, pairs.encode(), *kept, **more)
        if no_pairs and not by_fm:
            made = editor.call(aten.sum.dim_IntList, made, [1], **more)
        if "pd" in tail.axes:
            made = editor.call(aten.flatten.using_ints, made, 1, **more)
        made = tail.restore(editor, made, last)
        for other in found.rest:
            made = editor.call(aten.add.Tensor, copy_of(other), made, **more)
        return made

    what = "all summed in 1 call" if by_fm else "in 1 call"
    return Found(tail.anchor, nodes, table.bases, build, f"{len(pairs)} products of pairs of features {what}")


def _are_all(pairs: Pairs, features: Any) -> bool:
    """Is every pair of different features there, once?"""
    if not isinstance(features, int) or len(pairs) != features * (features - 1) // 2 or not pairs.distinct:
        return False
    return pairs.least_features == features and all(i != j for i, j in zip(pairs.first, pairs.second))


@dataclass
class _Products:
    """Pairs of features, the axes of the node that holds their products ("b", "p", "d", or 1), and all nodes below it.
    ``rest``: what else is added, where the products are added up."""

    keys: list[tuple[Key, Key]]
    axes: list[Any]
    nodes: list[Node]
    constants: list[Constant]
    rest: list[Node] = field(default_factory=list)


# --- two tensors of features, multiplied -------------------------------------------------------------------------------------------


def _indexed(node: Node, facts: Facts) -> _Products | None:
    """``node`` as the product of two tensors ``[batch, pairs, dim]`` whose rows are features."""
    if not is_op(node, aten.mul.Tensor) or rank_of(node) != 3:
        return None
    nodes, constants = [node], []
    sides = [_rows(side, facts, nodes, constants) for side in node.args]
    left, right = sides
    if left is None or right is None or len(left) != len(right):
        return None
    return _Products(list(zip(left, right)), list("bpd"), nodes, constants)


def _rows(node: Any, facts: Facts, nodes: list[Node], constants: list[Constant]) -> list[Key] | None:
    """The features that ``node`` holds along dimension 1."""
    if is_op(node, aten.cat.default, aten.stack.default) and dim_of(node, 1, 3) == 1:
        features = [feature(n) for n in node.args[0]]
        found = [f for f in features if f is not None]
        if len(found) < len(features) or any(f.kept == is_op(node, aten.stack.default) for f in found):
            return None
        nodes += [node, *(n for f in found for n in f.nodes)]
        return [f.key for f in found]
    if is_op(node, aten.index_select.default) and dim_of(node, 1, 3) == 1:
        base, index = node.args[0], node.args[2]
    elif is_op(node, aten.index.Tensor) and len(node.args[1]) == 2 and node.args[1][0] is None:
        base, index = node.args[0], node.args[1][1]
    else:
        return None
    shape, constant = shape_of(base), facts.constant(index)
    numbers = None if shape is None or len(shape) != 3 else integers(constant, shape[1])
    if numbers is None or constant is None or (isinstance(shape[1], int) and max(numbers, default=-1) >= shape[1]):  # type: ignore[index]
        return None
    nodes.append(node)
    constants.append(constant)
    return [(base, i) for i in numbers]


# --- many small products -----------------------------------------------------------------------------------------------------------


@dataclass
class _Term:
    """The product of two features; ``axes`` are those it has: "b" and "d", or 1."""

    left: Feature
    right: Feature
    axes: list[Any]
    nodes: list[Node]


def _listed(node: Node) -> _Products | None:
    """``node`` as a stack, a concatenation or a sum of products of two features each."""
    nodes = [node]
    if is_op(node, aten.stack.default, aten.cat.default):
        parts = list(node.args[0])  # type: ignore[arg-type]
    elif is_op(node, aten.add.Tensor) and not any(is_op(u, aten.add.Tensor) for u in node.users):
        parts = []
        if not add_up(node, parts, nodes):
            return None
    else:
        return None
    if len(parts) < _FEWEST:
        return None
    terms = {p: _term(p) for p in parts}
    known = [terms[p] for p in parts if terms[p] is not None]
    rest = [p for p in parts if terms[p] is None]
    most = _MOST_OTHERS if is_op(node, aten.add.Tensor) else 0
    if len(rest) > most or not known or any(t.axes != known[0].axes for t in known):
        return None
    axes = _together(node, known[0].axes)
    if axes is None:
        return None
    nodes += [n for t in known for n in t.nodes]
    return _Products([(t.left.key, t.right.key) for t in known], axes, nodes, [], rest)


def _together(node: Node, axes: list[Any]) -> list[Any] | None:
    """The axes of ``node``, which joins products of these axes."""
    if is_op(node, aten.add.Tensor):
        return axes
    if is_op(node, aten.stack.default):
        return [axes[0], "p", *axes[1:]] if dim_of(node, 1, len(axes) + 1) == 1 else None
    if len(axes) < 2 or dim_of(node, 1, len(axes)) != 1:
        return None
    return [axes[0], "p" if axes[1] == 1 else "pd", *axes[2:]]


def _term(node: Any) -> _Term | None:
    if is_op(node, aten.sum.dim_IntList):
        inner = _term(node.args[0])
        if inner is None or "d" not in inner.axes or len(node.args[0].users) != 1:
            return None
        tail = follow(node.args[0], inner.axes, limit=1)
        return _Term(inner.left, inner.right, tail.axes, [*inner.nodes, node]) if tail.summed("d") else None
    if not is_op(node, aten.mul.Tensor):
        return None
    left, right = (feature(side) for side in node.args)
    if left is None or right is None or left.kept != right.kept:
        return None
    return _Term(left, right, ["b", 1, "d"] if left.kept else ["b", "d"], [*left.nodes, *right.nodes, node])
