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
from .graph import Editor, arguments, aten, value_of
from .swapped_op import SwappedOp


@dataclass
class FastDropout(SwappedOp):
    """Draw dropout masks with the vectorized generator; one record ("dropout masks") for each dropout."""

    name: ClassVar[str] = "fast_dropout"
    kind: ClassVar[str] = "dropout masks"
    numerics: ClassVar[str] = "exact"
    plain: ClassVar = aten.dropout.default
    detail: ClassVar[str] = "the same draws, made a block at a time"

    def unfit(self, node: Node) -> str | None:
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

    def made(self, editor: Editor, node: Node) -> Node:
        a = arguments(node)
        return editor.call(dropout.OP, a["input"], a["p"], a["train"], before=node, sources=[node], value=value_of(node))
