"""``tablewright::dropout``: ``torch.dropout`` bit for bit, with the same draws from the same generator, on CPU some 8 times as fast.

``dropout(x, p, train)`` -> a tensor like ``x`` (``x`` itself where nothing is dropped, as in torch). Fast for contiguous float32
on CPU where the C++ kernels were built and PyTorch draws as they do (``cpu.py``); everything else, and every trace, is
``torch.dropout`` itself. A backward that is differentiated again (``create_graph=True``) runs through plain PyTorch ops.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY, tracing
from . import cpu

LIBRARY.define("dropout(Tensor x, float p, bool train) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))

_LEAST_VALUES = 2048  # below, reading the generator's state costs more than torch's own loop


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        out, kept = cpu.dropout(x, p)
        ctx.p = p
        ctx.save_for_backward(kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad * (kept.to(grad.dtype) / (1 - ctx.p)), None
        return cpu.gradient(grad, kept, ctx.p), None


def call(x: Tensor, p: float, train: bool) -> Tensor:
    """:data:`OP` without the trip through torch's dispatcher."""
    if not train or x.numel() < _LEAST_VALUES or not cpu.serves(x, p) or torch.compiler.is_compiling() or tracing():
        return torch.dropout(x, p, train)
    if not cpu.available():
        return torch.dropout(x, p, train)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return cpu.dropout(x, p)[0]
    return _Dropout.apply(x, p)


LIBRARY.impl("dropout", call, "CompositeImplicitAutograd")

OP = torch.ops.tablewright.dropout.default
DIRECT[OP] = call
