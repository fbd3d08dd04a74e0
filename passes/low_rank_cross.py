"""Recognise the mixture of low-rank experts of DCN v2 in ATen form, as its published implementations write it.

``x + matmul(stack([x0 * (U_e f(C_e f(V_e x)) + b)]), softmax(stack([g_e . x])))`` over columns ``[batch, dim, 1]``, with ``f`` an activation
and one expert for each ``e``. Source: Wang et al., DCN V2 (2021), equation 4.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .cross_layers import is_constant, written_inside
from .graph import Writes, arguments, aten, is_op, value_of
from .records import Skip, skip

_ACTIVATIONS = (aten.tanh.default, aten.relu.default, aten.sigmoid.default)


@dataclass(frozen=True)
class LowRankCross:
    """One such layer; each list has an entry for every expert. ``inside``: the nodes that it is made of, ``out`` last."""

    out: Node
    x0: Node
    x: Node
    down: list[Node]  # V, [rank, dim]
    middle: list[Node]  # C, [rank, rank]
    up: list[Node]  # U, [dim, rank]
    gates: list[Node]  # g, [1, dim]
    shift: Node  # b, [dim, 1]
    activation: object
    dim: int
    rank: int
    inside: tuple[Node, ...]
    form: str = "low rank"
    column: bool = True

    def operands(self) -> list[Node]:
        """What the layer reads."""
        return [self.x0, self.x, *self.down, *self.middle, *self.up, *self.gates, self.shift]


def read_low_rank(node: Node, writes: Writes) -> LowRankCross | Skip | None:
    """The layer whose value ``node`` is, a :class:`Skip` if it is one that cannot be fused, or ``None``."""
    if not is_op(node, aten.add.Tensor) or len(node.args) != 2 or node.kwargs:
        return None
    for mixed, x in (node.args, node.args[::-1]):
        if isinstance(x, Node) and is_op(mixed, aten.matmul.default, aten.bmm.default) and len(mixed.users) == 1:
            found = _mixture(node, mixed, x)
            if isinstance(found, LowRankCross):
                return written_inside(found, writes) or found
            if found is not None:
                return found
    return None


def _mixture(out: Node, mixed: Node, x: Node) -> LowRankCross | Skip | None:
    stacked, weights = mixed.args
    value = value_of(x)
    if value is None or value.dim() != 3 or value.shape[-1] != 1 or not isinstance(value.shape[1], int):
        return None
    dim, inside = value.shape[1], [mixed, out]
    outputs = _alone(stacked, aten.stack.default, inside)
    if outputs is None or arguments(outputs)["dim"] not in (2, -1):
        return None
    listed: Any = outputs.args[0]
    experts = [e for o in listed if (e := _expert(o, x, inside)) is not None]
    if len(experts) != len(listed):
        return None
    x0, activation, shift, rank = (experts[0][name] for name in ("x0", "activation", "shift", "rank"))
    outer = value_of(x0)
    if outer is None or list(map(str, outer.shape)) != list(map(str, value.shape)):
        return None
    if any(e["x0"] is not x0 or e["activation"] is not activation or not _same(e["shift"], shift) for e in experts):
        return skip("a mixture of low-rank experts that differ in activation, bias or x0; equal ones were needed", at=out)
    shapes = {"down": [rank, dim], "middle": [rank, rank], "up": [dim, rank]}
    if any(_shape(e[name]) != wanted for e in experts for name, wanted in shapes.items()) or _shape(shift) != [dim, 1]:
        return skip("a mixture of low-rank experts of different ranks; equal shapes were needed", at=out)
    gates = _gates(weights, x, inside)
    if gates is None or len(gates) != len(experts) or any(_shape(g) != [1, dim] for g in gates):
        return skip("a mixture of low-rank experts whose gates are not the softmax of linear layers without bias on x", at=out)
    ordered = sorted(dict.fromkeys(inside), key=list(out.graph.nodes).index)
    lists = [[e[name] for e in experts] for name in shapes]
    return LowRankCross(out, x0, x, *lists, gates, shift, activation, dim, rank, tuple(ordered))


def _gates(node: Node, x: Node, inside: list[Node]) -> list[Node] | None:
    soft = _alone(node, aten.softmax.int, inside)
    scores = _alone(soft.args[0], aten.stack.default, inside) if soft is not None else None
    if scores is None or arguments(scores)["dim"] != 1 or arguments(soft)["dim"] not in (1, -2):
        return None
    listed: Any = scores.args[0]
    gates = [g for s in listed if (g := _gate(s, x, inside)) is not None]
    return gates if len(gates) == len(listed) else None


def _alone(node, op, inside: list[Node]) -> Node | None:
    """``node`` if it is a call of ``op`` with one reader; it is then part of the layer."""
    if not is_op(node, op) or len(node.users) != 1:
        return None
    inside.append(node)
    return node


def _gate(node, x: Node, inside: list[Node]) -> Node | None:
    """The weight of a gate's linear layer on ``x``."""
    call = _alone(node, aten.linear.default, inside)
    if call is None:
        return None
    a = arguments(call)
    row = a["input"]
    if a["bias"] is not None or not is_constant(a["weight"]) or not _squeezes(row) or row.args[0] is not x:
        return None
    if len(row.users) == 1:
        inside.append(row)
    return a["weight"]


def _expert(node, x: Node, inside: list[Node]) -> dict | None:
    if not _squeezes(node) or len(node.users) != 1:
        return None
    inside.append(node)
    product = _alone(node.args[0], aten.mul.Tensor, inside)
    if product is None:
        return None
    for x0, inner in (product.args, product.args[::-1]):
        if is_op(inner, aten.add.Tensor) and len(inner.users) == 1 and len(inner.args) == 2 and not inner.kwargs:
            for raised, shift in (inner.args, inner.args[::-1]):
                if not is_op(raised, aten.matmul.default) or not is_constant(shift):
                    continue
                found = _stack_of_products(raised, x)
                if found is not None:
                    inside += [inner, *found.pop("nodes")]
                    return {**found, "x0": x0, "shift": shift}
    return None


def _stack_of_products(raised: Node, x: Node) -> dict | None:
    """``U f(C f(V x))`` from its last product down."""
    nodes, weights, node, activations = [], [], raised, []
    for level in range(3):
        if not is_op(node, aten.matmul.default) or len(node.users) != 1 or not is_constant(node.args[0]):
            return None
        nodes.append(node)
        weights.append(node.args[0])
        node = node.args[1]
        if level < 2:
            if not is_op(node, *_ACTIVATIONS) or len(node.users) != 1:
                return None
            nodes.append(node)
            activations.append(node.target)
            node = node.args[0]
    sizes = _shape(weights[1])
    if node is not x or activations[0] is not activations[1] or sizes is None:
        return None
    up, middle, down = weights
    return {"up": up, "middle": middle, "down": down, "activation": activations[0], "rank": sizes[0], "nodes": nodes}


def _squeezes(node) -> bool:
    return is_op(node, aten.squeeze.dim) and node.args[1] in (2, -1)


def _same(a, b) -> bool:
    """Do two nodes compute the same from stored tensors?"""
    if a is b:
        return True
    if not isinstance(a, Node) or not isinstance(b, Node):
        return type(a) is type(b) and a == b
    if a.op != b.op or a.target != b.target or len(a.args) != len(b.args) or a.kwargs or b.kwargs:
        return False
    return a.op in ("get_attr", "call_function") and all(map(_same, a.args, b.args))


def _shape(node: Node) -> list | None:
    value = value_of(node)
    return None if value is None else list(value.shape)
