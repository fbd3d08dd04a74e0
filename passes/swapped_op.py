"""One op of PyTorch's -> the same op of ``kernels/``, wherever its values fit and it is measured faster."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from .graph import Editor, is_op
from .measure import Measured
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context


@dataclass
class SwappedOp(Measured):
    """Base of passes that replace each ``plain`` by another op; one record for each of them."""

    plain: ClassVar[Any]
    detail: ClassVar[str]

    def unfit(self, node: Node) -> str | None:
        """Why the other op cannot take what ``node`` has, or ``None``."""
        raise TypeError(f"{type(self).__name__} must define unfit()")

    def made(self, editor: Editor, node: Node) -> Node:
        """The other op with the arguments of ``node``, before it."""
        raise TypeError(f"{type(self).__name__} must define made()")

    def run(self, context: Context) -> list[Record]:
        return [self._rewrite(n, context) for n in list(context.graph.nodes) if is_op(n, self.plain)]

    def _rewrite(self, node: Node, context: Context) -> Record:
        reason = self.unfit(node)
        if reason is None:
            refusal = self.no_gain(context, [node], lambda editor, copy_of: self._replace(editor, copy_of[node]))
            reason = refusal.reason if refusal is not None else None
        if reason is not None:
            return record(self.name, self.kind, SKIPPED, node, reason)
        if not context.allowed():
            return record(self.name, self.kind, DISABLED, node, "beyond the number of rewrites that were asked for")
        done = record(self.name, self.kind, APPLIED, node, detail=self.detail)
        self._replace(Editor(context.graph, self.name), node)
        return done

    def _replace(self, editor: Editor, node: Node) -> None:
        editor.replace(node, self.made(editor, node))
