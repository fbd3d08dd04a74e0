"""The graph of evaluation mode alone: flags become constants, dropout and counters go, arguments that only a backward reads go.

Runs before an export for serving, on a graph captured with its modules in evaluation mode. Training flags are read from the
modules as they are; a module left in training mode keeps its dropout, which the export then refuses.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from ..kernels.dropout import op as dropout
from .graph import Editor, arguments, aten, fetch, is_op
from .lookups import BAG_OPS
from .records import APPLIED, Record, record
from .rule import Context, Pass

_DROPOUT = (
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default, dropout.OP,
)  # fmt: skip


@dataclass
class EvalForm(Pass):
    """Take out what only training needs; one record ("training parts") for each dropout and each counter."""

    name: ClassVar[str] = "eval_form"
    kind: ClassVar[str] = "training parts"
    numerics: ClassVar[str] = "exact"

    def run(self, context: Context) -> list[Record]:
        editor, records = Editor(context.graph, self.name), []
        for node in list(context.graph.nodes):
            if node.op == "get_attr" and isinstance(value := fetch(context.root, str(node.target)), bool):
                for user in list(node.users):
                    user.args = tuple(value if a is node else a for a in user.args)
                    user.kwargs = {k: value if v is node else v for k, v in user.kwargs.items()}
                context.graph.erase_node(node)
        for node in list(context.graph.nodes):
            if is_op(node, *_DROPOUT) and arguments(node)["train"] is False:
                records.append(record(self.name, self.kind, APPLIED, node, detail="dropout in evaluation mode is the identity"))
                editor.replace(node, node.args[0])  # type: ignore[arg-type]
            elif _adds_nothing(node):
                records.append(record(self.name, self.kind, APPLIED, node, detail="a counter of training batches"))
                editor.replace(node, node.args[0])  # type: ignore[arg-type]
            elif is_op(node, aten.embedding.default) and len(node.args) > 2:
                node.args = node.args[:2]  # padding_idx, scale_grad_by_freq, sparse
            elif is_op(node, *BAG_OPS):
                node.update_arg(3, False)  # scale_grad_by_freq
                if len(node.args) > 5:
                    node.update_arg(5, False)  # sparse
        editor.remove_dead()
        return records


def _adds_nothing(node: Node) -> bool:
    """``num_batches_tracked += training`` where training is False."""
    return is_op(node, aten.add_.Tensor) and node.args[1] is False
