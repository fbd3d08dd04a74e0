"""Find the dense layers that a fused kernel could serve, so that the report is complete: MLP chains and dot interactions.

No kernel for them is in this version, so each is recorded as skipped, and nothing is changed.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from .graph import aten, is_op
from .records import SKIPPED, Record, record
from .rule import Context, Pass

_ELEMENTWISE = (aten.relu.default, aten.dropout.default, aten.sigmoid.default, aten.tanh.default)
_TRANSPOSES = (aten.transpose.int, aten.permute.default, aten.mT.default, aten.adjoint.default)


@dataclass
class FindDenseLayers(Pass):
    """Record each chain of linear layers ("mlps") and each product of a matrix with its own transpose ("interactions")."""

    name: ClassVar[str] = "find_dense_layers"
    kind: ClassVar[str] = "mlps"
    numerics: ClassVar[str] = "exact"

    def run(self, context: Context) -> list[Record]:
        records: list[Record] = []
        counted: set[Node] = set()
        for node in context.graph.nodes:
            if is_op(node, aten.linear.default) and node not in counted:
                layers = _chain(node)
                counted.update(layers)
                records.append(
                    record(
                        self.name, "mlps", SKIPPED, layers[-1],
                        f"a chain of {len(layers)} linear layers runs as PyTorch's own kernels: this version has no fused MLP",
                        subject=layers[0].meta["origin"].module_path,
                    )
                )  # fmt: skip
            elif _is_gram(node):
                reason = "X times its own transpose runs as PyTorch's own kernels: this version has no fused dot interaction"
                records.append(record(self.name, "interactions", SKIPPED, node, reason))
        return records


def _chain(first: Node) -> list[Node]:
    layers, node = [first], first
    while len(node.users) == 1:
        node = next(iter(node.users))
        if is_op(node, aten.linear.default):
            layers.append(node)
        elif not is_op(node, *_ELEMENTWISE):
            break
    return layers


def _is_gram(node: Node) -> bool:
    if is_op(node, aten.einsum.default):
        factors = node.args[1]
        return isinstance(factors, (list, tuple)) and len(factors) == 2 and factors[0] is factors[1]
    if not is_op(node, aten.bmm.default, aten.matmul.default):
        return False
    left, right = node.args[0], node.args[1]
    return any(is_op(a, *_TRANSPOSES) and a.args[0] is b for a, b in ((left, right), (right, left)))  # type: ignore[union-attr]
