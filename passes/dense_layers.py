"""Find dot interactions, so that the report is complete.

No kernel for them is in this version, so each is recorded as skipped, and nothing is changed.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from .graph import aten, is_op
from .records import SKIPPED, Record, record
from .rule import Context, Pass

_TRANSPOSES = (aten.transpose.int, aten.permute.default, aten.mT.default, aten.adjoint.default)


@dataclass
class FindDenseLayers(Pass):
    """Record each product of a matrix with its own transpose ("interactions")."""

    name: ClassVar[str] = "find_dense_layers"
    kind: ClassVar[str] = "interactions"
    numerics: ClassVar[str] = "exact"

    def run(self, context: Context) -> list[Record]:
        reason = "X times its own transpose runs as PyTorch's own kernels: this version has no fused dot interaction"
        return [record(self.name, self.kind, SKIPPED, node, reason) for node in context.graph.nodes if _is_gram(node)]


def _is_gram(node: Node) -> bool:
    if is_op(node, aten.einsum.default):
        factors = node.args[1]
        return isinstance(factors, (list, tuple)) and len(factors) == 2 and factors[0] is factors[1]
    if not is_op(node, aten.bmm.default, aten.matmul.default):
        return False
    left, right = node.args[0], node.args[1]
    return any(is_op(a, *_TRANSPOSES) and a.args[0] is b for a, b in ((left, right), (right, left)))  # type: ignore[union-attr]
