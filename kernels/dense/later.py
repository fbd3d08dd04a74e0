"""``tablewright::later``: a weight whose gradient ``tablewright::dense`` leaves for later.

``later(weight)`` is ``weight`` itself. In the backward of a ``dense`` that reads it the gradients of its input and bias are made at once,
while that of the weight is made when autograd reaches this node: it takes nodes whose turn it is in the reverse order of their calls, so
where ``later`` is called decides what runs first. A collective that waits only for the input's gradient then starts earlier, and the weights'
gradients are made while it travels. Same numbers, and gradients that are differentiated again are made as ever.

Raises ``RuntimeError`` in the backward where the gradient was changed between the two nodes (a second reader of the result, or a hook).
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY, tracing
from . import gemm

LIBRARY.define("later(Tensor(a) weight) -> Tensor(a)")
LIBRARY.impl("later", lambda weight: weight.view_as(weight), "CompositeImplicitAutograd")


class _Later(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.job = None
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        job, ctx.job = ctx.job, None
        if job is None:
            return grad
        carrier, given, x = job
        if grad.data_ptr() != carrier.data_ptr():
            raise RuntimeError("the gradient of a weight that is made later was changed on its way (a hook, or another reader of the weight)")
        return gemm.weight_gradient(given, x)


def leave(node, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """What ``dense`` returns for its weight, if ``node``, which gets it, is that of :func:`call`: a stand-in, which holds no memory."""
    if not isinstance(node, _Later._backward_cls) or torch.is_anomaly_enabled():  # type: ignore[attr-defined]
        return None  # anomaly detection would take the stand-in for a gradient that is NaN
    carrier = grad.new_full((), float("nan")).expand(weight.shape)
    node.job = carrier, grad, x
    return carrier


OP = torch.ops.tablewright.later.default


def call(weight: Tensor) -> Tensor:
    """:data:`OP` as eager mode calls it."""
    if tracing() or torch.compiler.is_compiling():
        return OP(weight)
    return _Later.apply(weight) if torch.is_grad_enabled() and weight.requires_grad else weight


DIRECT[OP] = call
