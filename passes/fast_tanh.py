"""``tanh(x)`` -> ``tablewright.tanh(x)``, where that is measured faster.

PyTorch's tanh of float32 on CPU goes through MKL, which on AMD processors takes ten times as long as its sigmoid. Measured on 2048 x 400 values, one
thread of an AMD EPYC (Zen 5), forward: 1.90 -> 0.16 ms (``kernels/tanh``). What stands behind a linear layer is part of ``dense_chains`` and
``row_layers``, which use the same function.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from ..kernels.tanh import cpu
from ..kernels.tanh import op as tanh
from .graph import Editor, aten, value_of
from .swapped_op import SwappedOp


@dataclass
class FastTanh(SwappedOp):
    """Compute tanh in C++; one record ("tanh") for each."""

    name: ClassVar[str] = "fast_tanh"
    kind: ClassVar[str] = "tanh"
    plain: ClassVar = aten.tanh.default
    detail: ClassVar[str] = "in vectors"

    def unfit(self, node: Node) -> str | None:
        value = value_of(node)
        if value is None:
            return "the values' dtype and device are not known without sample_inputs"
        if value.device.type != "cpu" or value.dtype != torch.float32:
            return f"the values are {str(value.dtype).removeprefix('torch.')} on {value.device.type}; the faster tanh is for float32 on cpu"
        return None if cpu.available() else cpu.describe()

    def made(self, editor: Editor, node: Node) -> Node:
        return editor.call(tanh.OP, node.args[0], before=node, sources=[node], value=value_of(node))
