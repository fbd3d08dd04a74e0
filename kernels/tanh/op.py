"""``tablewright::tanh``: ``torch.tanh``, on CPU some 7 times as fast where MKL computes PyTorch's.

``tanh(x)`` -> a tensor like ``x``. Fast for float32 on CPU that lies side by side in memory where the C++ kernels were built (``cpu.py``): results are then within 3
units in the last place; everything else, and every trace, is ``torch.tanh`` itself. NaN stays NaN, and so does the sign of 0. Can be
differentiated any number of times.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY, tracing
from . import cpu

LIBRARY.define("tanh(Tensor x) -> Tensor")


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = cpu.tanh(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grad, out)


def call(x: Tensor) -> Tensor:
    """:data:`OP` without the trip through torch's dispatcher."""
    if not cpu.serves(x) or torch.compiler.is_compiling() or tracing():
        return torch.tanh(x)
    return _Tanh.apply(x) if x.requires_grad and torch.is_grad_enabled() else cpu.tanh(x)


LIBRARY.impl("tanh", call, "CompositeImplicitAutograd")

OP = torch.ops.tablewright.tanh.default
DIRECT[OP] = call
