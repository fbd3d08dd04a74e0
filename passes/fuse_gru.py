"""``nn.GRU`` in one direction  ->  ``tablewright.gru(x, hx, weights, biases, batch_first)``, where that is measured faster.

PyTorch's GRU on CPU makes a dozen passes over memory at each step and its sigmoid and tanh take 2 ns a value; ``kernels/gru/op.py`` makes one pass.
Measured on an AMD EPYC (Zen 5), torch 2.13, one thread, batch 2048, 20 steps, forward + backward: two layers 16->16 35.6 -> 16.9 ms, one layer
64->64 111 -> 59, 64->128 342 -> 269.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..kernels.gru.op import OP
from .graph import Editor, arguments, aten, is_op, value_of
from .measure import Measured
from .records import APPLIED, DISABLED, SKIPPED, Record, Skip, record, skip
from .rule import Context


@dataclass
class FuseGru(Measured):
    """Make each step of a GRU one pass over memory; one record ("recurrent layers") for each GRU."""

    name: ClassVar[str] = "fuse_gru"
    kind: ClassVar[str] = "recurrent layers"
    numerics: ClassVar[str] = "reassociated"

    def run(self, context: Context) -> list[Record]:
        return [self._rewrite(n, context) for n in list(context.graph.nodes) if is_op(n, aten.gru.input, aten.gru.data)]

    def _rewrite(self, node: Node, context: Context) -> Record:
        refusal = _unfit(node)
        if refusal is None:
            with_readers = [node, *(u for u in node.users if is_op(u, operator.getitem))]
            refusal = self.no_gain(context, with_readers, lambda editor, copy_of: _replace(editor, copy_of[node]))
        if refusal is not None:
            return record(self.name, self.kind, SKIPPED, node, refusal.reason)
        if not context.allowed():
            return record(self.name, self.kind, DISABLED, node, "beyond the number of rewrites that were asked for")
        done = record(self.name, self.kind, APPLIED, node, detail=f"{arguments(node)['num_layers']} layers, each step in one pass")
        _replace(Editor(context.graph, self.name), node)
        return done


def _unfit(node: Node) -> Skip | None:
    if is_op(node, aten.gru.data):
        return skip("the GRU reads packed sequences of different lengths; all of one length were needed", at=node)
    a = arguments(node)
    if a["bidirectional"] is not False:
        return skip("the GRU runs in both directions; one was needed", at=node)
    if a["dropout"] != 0 and a["num_layers"] != 1:
        return skip(f"the GRU drops {a['dropout']} of what lies between its layers; nothing dropped was needed", at=node)
    value = value_of(a["input"])
    if value is None:
        return skip("the shape of the GRU's input is not known without sample_inputs; float32 on CPU in three dimensions was needed", at=node)
    if value.device.type != "cpu" or value.dtype != torch.float32 or value.dim() != 3:
        return skip(
            f"the GRU's input is {value.dtype} on {value.device.type} in {value.dim()} dimensions; float32 on CPU in three was needed", at=node
        )  # fmt: skip
    return None


def _replace(editor: Editor, node: Node) -> None:
    a = arguments(node)
    made = editor.call(
        OP, a["input"], a["hx"], a["params"], a["has_biases"], a["batch_first"], before=node, sources=[node], value=node.meta.get("val")
    )
    editor.replace(node, made)
