"""``dropout(x, p)`` -> ``tablewright.dropout(x, p)``: the same draws of the same generator, so the same bits, some 8 times as fast on CPU.

torch draws dropout's mask one value at a time, 8 ns each: in a multilayer perceptron as long as the matrix products take. Measured
on 2048 x 400 values, one thread, forward + backward: 7.4 -> 0.8 ms (``kernels/dropout``). Applied only where this machine's PyTorch is
found to draw exactly as the kernel does.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..kernels.dropout import cpu
from ..kernels.dropout import op as dropout
from .graph import Editor, arguments, aten, is_op, value_of
from .measure import Measured
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context


@dataclass
class FastDropout(Measured):
    """Draw dropout masks with the vectorized generator; one record ("dropout masks") for each dropout."""

    name: ClassVar[str] = "fast_dropout"
    kind: ClassVar[str] = "dropout masks"
    numerics: ClassVar[str] = "exact"

    def run(self, context: Context) -> list[Record]:
        return [self._rewrite(n, context) for n in list(context.graph.nodes) if is_op(n, aten.dropout.default)]

    def _rewrite(self, node: Node, context: Context) -> Record:
        reason = _unfit(node)
        if reason is None:
            refusal = self.no_gain(context, [node], lambda editor, copy_of: _replace(editor, copy_of[node]))
            reason = refusal.reason if refusal is not None else None
        if reason is not None:
            return record(self.name, self.kind, SKIPPED, node, reason)
        if not context.allowed():
            return record(self.name, self.kind, DISABLED, node, "beyond the number of rewrites that were asked for")
        done = record(self.name, self.kind, APPLIED, node, detail="the same draws, made a block at a time")
        _replace(Editor(context.graph, self.name), node)
        return done


def _unfit(node: Node) -> str | None:
    a, value = arguments(node), value_of(node)
    if not isinstance(a["p"], (int, float)) or not 0 < a["p"] < 1:
        return f"dropout with p={a['p']} draws nothing; a probability between 0 and 1 was needed"
    if value is None:
        return "the values' dtype and device are not known without sample_inputs"
    if value.device.type != "cpu" or value.dtype != torch.float32:
        kind = str(value.dtype).removeprefix("torch.")
        return f"the values are {kind} on {value.device.type}; the faster draws are for float32 on cpu"
    if not cpu.available():
        return f"the faster draws are not those of this PyTorch, or cannot be made ({cpu.describe()})"
    return None


def _replace(editor: Editor, node: Node) -> None:
    a = arguments(node)
    made = editor.call(dropout.OP, a["input"], a["p"], a["train"], before=node, sources=[node], value=value_of(node))
    editor.replace(node, made)
