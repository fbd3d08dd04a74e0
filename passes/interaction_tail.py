"""The chain of sums and scalings that follows an interaction: what its readers make of it, as long as there is one reader each."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Node

from .feature_pairs import only_user
from .graph import Editor, aten, is_op


@dataclass
class Tail:
    """What single readers make of an interaction: ``axes`` are letters of the axes that are left, or 1."""

    anchor: Node
    axes: list[Any]
    scale: float
    nodes: list[Node]

    def summed(self, axis: str) -> bool:
        return axis not in self.axes

    def restore(self, editor: Editor, node: Node, before: Node) -> Node:
        """Put back the axes of size 1."""
        for place, axis in enumerate(self.axes):
            if axis == 1:
                node = editor.call(aten.unsqueeze.default, node, place, before=before, sources=[before])
        return node


def follow(node: Node, axes: list[Any], scale: float | None = None, limit: int = 8) -> Tail:
    """Follow sums over axes other than "b", and scalings by numbers if ``scale`` is given, as long as each has one reader: at
    most ``limit`` of them."""
    tail = Tail(node, list(axes), 1.0 if scale is None else scale, [node])
    while len(tail.nodes) <= limit and (user := only_user(tail.anchor)) is not None:
        if is_op(user, aten.sum.dim_IntList) and user.args[0] is tail.anchor and not user.kwargs:
            rank, dims = len(tail.axes), cast(Any, user.args[1])
            if not isinstance(dims, (list, tuple)) or not dims:
                break
            places = [d % rank for d in dims]
            if any(tail.axes[p] in ("b", "pd") for p in places):
                break
            keep = len(user.args) > 2 and bool(user.args[2])
            tail.axes = [1 if keep and i in places else a for i, a in enumerate(tail.axes) if keep or i not in places]
        elif scale is not None and (factor := _factor(user, tail.anchor)) is not None:
            tail.scale *= factor
        else:
            break
        tail.anchor = user
        tail.nodes.append(user)
    return tail


def _factor(user: Node, node: Node) -> float | None:
    if is_op(user, aten.neg.default):
        return -1.0
    if is_op(user, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) and len(user.args) == 2 and not user.kwargs:
        other = user.args[1] if user.args[0] is node else user.args[0]
        if isinstance(other, (int, float)) and not isinstance(other, bool):
            if user.target in (aten.mul.Tensor, aten.mul.Scalar):
                return float(other)
            if user.args[0] is node and other != 0:
                return 1.0 / other
    return None


def add_up(node: Node, parts: list[Node], nodes: list[Node]) -> bool:
    """The terms of a sum written with ``+``, and the inner additions (Python's ``sum`` begins with 0). False if a number other
    than 0 is added, or a multiple."""
    if node.kwargs or len(node.args) != 2:
        return False
    for side in node.args:
        if isinstance(side, Node) and is_op(side, aten.add.Tensor) and len(side.users) == 1:
            nodes.append(side)
            if not add_up(side, parts, nodes):
                return False
        elif isinstance(side, Node):
            parts.append(side)
        elif side != 0:
            return False
    return True
