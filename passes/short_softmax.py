"""``softmax(x, dim)`` over few values  ->  ``tablewright.softmax_rows(x, dim)``, where that is measured faster.

Attention over the fields of a row, over pairs of fields or over a handful of experts has rows of 2 to some 50 values, for which
PyTorch's CPU kernel is slow (``kernels/softmax/op.py``, with the numbers). Any dimension behind which all sizes are 1 counts as the
last: scores ``[batch, length, 1]`` under ``dim=1`` are rows of ``length``.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..kernels.softmax.op import OP
from .graph import Editor, arguments, aten, is_op, value_of
from .measure import Measured
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context

_MOST = 64  # values in a row; longer ones PyTorch's kernel does well


@dataclass
class ShortSoftmax(Measured):
    """Take the softmax of short rows all at once; one record ("softmaxes") for each softmax on CPU that has such rows."""

    name: ClassVar[str] = "short_softmax"
    kind: ClassVar[str] = "softmaxes"
    numerics: ClassVar[str] = "reassociated"

    def run(self, context: Context) -> list[Record]:
        nodes = [n for n in context.graph.nodes if is_op(n, aten.softmax.int) and _row_length(n)]
        return [self._rewrite(n, context) for n in nodes]

    def _rewrite(self, node: Node, context: Context) -> Record:
        refusal = self.no_gain(context, [node], lambda editor, copy_of: _replace(editor, copy_of[node]))
        if refusal is not None:
            return record(self.name, self.kind, SKIPPED, node, refusal.reason)
        if not context.allowed():
            return record(self.name, self.kind, DISABLED, node, "beyond the number of rewrites that were asked for")
        done = record(self.name, self.kind, APPLIED, node, detail=f"rows of {_row_length(node)} values, all at once")
        _replace(Editor(context.graph, self.name), node)
        return done


def _row_length(node: Node) -> int | None:
    """How many values are in a row of the sample; ``None`` where they are many, or this is none for the op."""
    value, a = value_of(node), arguments(node)
    source = value_of(a["self"])
    if value is None or source is None or not value.dim() or a["dtype"] not in (None, source.dtype):
        return None
    if value.device.type != "cpu" or value.dtype not in (torch.float32, torch.float64):
        return None
    size, *behind = value.shape[a["dim"] % value.dim() :]
    size = size.node.hint if isinstance(size, torch.SymInt) else size
    return size if size is not None and 0 < size <= _MOST and all(isinstance(s, int) and s == 1 for s in behind) else None


def _replace(editor: Editor, node: Node) -> None:
    a = arguments(node)
    editor.replace(node, editor.call(OP, a["self"], a["dim"], before=node, sources=[node], value=value_of(node)))
