"""Linear layers and their activations over the positions of a sequence  ->  one ``tablewright.row_layers``, where that is measured faster.

``linear(gelu(linear(x, W1, b1)), W2, b2)`` for ``x`` ``[batch, length, in]``, as in every transformer, and any longer chain of this kind, as in the
attention units of DIN: the layers between, wider than ``x`` and read by nobody else, are never whole in memory (``kernels/row_layers/op.py``, with the numbers).
Runs behind ``dense_chains``, which leaves an activation in the call of its product or as a call of its own. ``mlp`` has the chains of dropout.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..kernels.dense import op as dense
from ..kernels.row_layers.op import OP
from .graph import Editor, Writes, arguments, aten, is_op, value_of
from .measure import Measured
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context

_ACTIVATIONS = {
    aten.relu.default: "relu", aten.sigmoid.default: "sigmoid", aten.tanh.default: "tanh", aten.silu.default: "silu", aten.gelu.default: "gelu",
}  # fmt: skip


@dataclass(frozen=True)
class _Layer:
    """A product and, if it has one, the activation that alone reads it."""

    nodes: tuple[Node, ...]
    activation: str

    def operands(self, copy_of=lambda n: n) -> tuple[Node, Node, Node | None]:
        """(x, weight, bias)"""
        x, weight, bias = list(arguments(copy_of(self.nodes[0])).values())[:3]
        return x, weight, bias


@dataclass
class RowLayers(Measured):
    """Run layers over a sequence some rows at a time; one record ("sequence layers") for each chain of two or more on CPU."""

    name: ClassVar[str] = "row_layers"
    kind: ClassVar[str] = "sequence layers"
    numerics: ClassVar[str] = "reassociated"

    def run(self, context: Context) -> list[Record]:
        writes = Writes(context.graph, context.root)
        seen: set[Node] = set()
        records = []
        for node in list(context.graph.nodes):
            if node in seen or not _is_product(node):
                continue
            chain = _chain(node, writes)
            seen.update(n for layer in chain for n in layer.nodes)
            x = value_of(chain[0].operands()[0]) if len(chain) > 1 else None
            if x is not None and x.dim() > 2 and x.device.type == "cpu":
                records.append(self._rewrite(chain, context))
        return records

    def _rewrite(self, chain: list[_Layer], context: Context) -> Record:
        nodes = [n for layer in chain for n in layer.nodes]
        values = [value_of(n) for layer in chain for n in layer.operands() if n is not None]
        kinds = {None if v is None else v.dtype for v in values}
        reason = None if kinds == {torch.float32} else "inputs and weights are not all float32, or not known; the products that gain are float32's"
        if reason is None:
            refusal = self.no_gain(context, nodes, lambda editor, copy_of: _replace(editor, chain, copy_of.__getitem__))
            reason = None if refusal is None else refusal.reason
        if reason is not None:
            return record(self.name, self.kind, SKIPPED, nodes[-1], reason)
        if not context.allowed():
            return record(self.name, self.kind, DISABLED, nodes[-1], "beyond the number of rewrites that were asked for")
        done = record(self.name, self.kind, APPLIED, nodes[-1], detail=f"{len(chain)} layers ({_names(chain)}), some rows at a time")
        _replace(Editor(context.graph, self.name), chain, lambda n: n)
        return done


def _is_product(node: Node) -> bool:
    if not is_op(node, aten.linear.default, dense.OP):
        return False
    weight = value_of(list(arguments(node).values())[1])
    return weight is not None and weight.dim() == 2


def _chain(first: Node, writes: Writes) -> list[_Layer]:
    """The layers from ``first`` on, each the only reader of the one before."""
    chain: list[_Layer] = []
    node: Node | None = first
    while node is not None and _is_product(node) and not _written(node, writes) and (not chain or arguments(node)[_X[node.target]] is chain[-1].nodes[-1]):
        activation = arguments(node)["activation"] if is_op(node, dense.OP) else "none"
        user = _only_user(node)
        nodes = (node,)
        if activation == "none" and is_op(user, *_ACTIVATIONS) and not _written(user, writes):  # type: ignore[arg-type]
            assert user is not None
            activation = "gelu_tanh" if user.kwargs.get("approximate") == "tanh" else _ACTIVATIONS[user.target]
            nodes = node, user
            user = _only_user(user)
        chain.append(_Layer(nodes, activation))
        node = user
    return chain


_X = {aten.linear.default: "input", dense.OP: "x"}


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _written(node: Node, writes: Writes) -> bool:
    """Is ``node`` or what it reads written to in place?"""
    return any(map(writes.to, (node, *node.all_input_nodes)))


def _names(chain: list[_Layer]) -> str:
    return ",".join(layer.activation for layer in chain)


def _replace(editor: Editor, chain: list[_Layer], copy_of) -> None:
    nodes = [copy_of(n) for layer in chain for n in layer.nodes]
    inputs, weights, biases = map(list, zip(*(layer.operands(copy_of) for layer in chain)))
    made = editor.call(OP, inputs[0], weights, biases, _names(chain), before=nodes[-1], sources=nodes, value=value_of(nodes[-1]))
    editor.replace(nodes[-1], made)
    for node in reversed(nodes[:-1]):
        editor.graph.erase_node(node)
