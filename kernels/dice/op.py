"""``tablewright::dice``: the gate of the Dice activation, ``p * x + (1 - p) * alpha * x`` with ``p = sigmoid(gate)``.

``dice(x, gate, alpha)`` for ``x`` and ``gate`` of one shape (``gate`` is usually ``x`` after a batch norm) and ``alpha`` of any shape that broadcasts
to it. It is ``x * (alpha + p * (1 - alpha))``: three passes forward and seven backward, where the plain form takes six and some
fifteen. Any floating dtype and device. Measured on an AMD EPYC (Zen 5), torch 2.13, one thread, float32, 2048 x 400 values, forward +
backward: 4.4 -> 1.9 ms. A backward that is differentiated again runs through plain PyTorch ops.

Source: Zhou et al., Deep Interest Network (2018), equation 3.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY, recorded_gradients, tracing

LIBRARY.define("dice(Tensor x, Tensor gate, Tensor alpha) -> Tensor")


def reference(x: Tensor, gate: Tensor, alpha: Tensor) -> Tensor:
    """The same in plain, differentiable PyTorch."""
    p = torch.sigmoid(gate)
    return p * x + (1 - p) * alpha * x


def _forward(x: Tensor, p: Tensor, alpha: Tensor) -> Tensor:
    return torch.addcmul(alpha, p, 1 - alpha).mul_(x)


class _Dice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, alpha):
        p = torch.sigmoid(gate)
        ctx.save_for_backward(x, gate, alpha, p)
        return _forward(x, p, alpha)

    @staticmethod
    def backward(ctx, grad):
        x, gate, alpha, p = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return tuple(recorded_gradients(reference, (x, gate, alpha), needs, grad))
        to_x = _forward(grad, p, alpha) if needs[0] else None
        product = grad * x
        to_alpha = torch.addcmul(product, product, p, value=-1).sum_to_size(alpha.shape) if needs[2] else None
        to_gate = torch.ops.aten.sigmoid_backward(product.mul_(1 - alpha), p) if needs[1] else None
        return to_x, to_gate, to_alpha


def call(x: Tensor, gate: Tensor, alpha: Tensor) -> Tensor:
    """:data:`OP` without the trip through torch's dispatcher."""
    mixed = x.dtype != gate.dtype or x.dtype != alpha.dtype or x.shape != gate.shape
    if mixed or torch.compiler.is_compiling() or tracing() or torch.is_autocast_enabled(x.device.type):
        return reference(x, gate, alpha)
    return _Dice.apply(x, gate, alpha) if torch.is_grad_enabled() else _forward(x, torch.sigmoid(gate), alpha)


LIBRARY.impl("dice", call, "CompositeImplicitAutograd")

OP = torch.ops.tablewright.dice.default
DIRECT[OP] = call
