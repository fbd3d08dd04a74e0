"""``tablewright::small_products``: ``a @ b`` for many small matrices.

``small_products(a, b)`` is ``torch.matmul(a, b)``: ``[*, m, k]``, ``[*, k, n]`` -> ``[*, m, n]``, any dtype, device and strides. Attention over the
fields of a row multiplies thousands of 10 x 8 matrices; PyTorch copies turned operands and hands them to MKL's batched products, which on an AMD
processor come to a few GFLOP/s. For float32 on CPU with one or two leading dimensions and up to 256 columns they are made in C++ where the operands lie;
everything else, and every trace, is ``torch.matmul`` itself. A backward that is differentiated again (``create_graph=True``) runs through
plain PyTorch ops.

Raises what ``torch.matmul`` raises for shapes that do not fit.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY, tracing
from . import cpu

LIBRARY.define("small_products(Tensor a, Tensor b) -> Tensor")


def _product(a: Tensor, b: Tensor) -> Tensor:
    return cpu.product(a, b) if cpu.serves(a, b) else torch.matmul(a, b)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return cpu.product(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        run = torch.matmul if torch.is_grad_enabled() else _product
        needs = ctx.needs_input_grad
        return run(grad, b.mT) if needs[0] else None, run(a.mT, grad) if needs[1] else None


def call(a: Tensor, b: Tensor) -> Tensor:
    """:data:`OP` without the trip through torch's dispatcher."""
    if torch.compiler.is_compiling() or tracing() or torch.is_autocast_enabled(a.device.type) or not cpu.serves(a, b):
        return torch.matmul(a, b)
    return _Products.apply(a, b) if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad) else cpu.product(a, b)


LIBRARY.impl("small_products", call, "CompositeImplicitAutograd")

OP = torch.ops.tablewright.small_products.default
DIRECT[OP] = call
