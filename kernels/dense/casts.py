"""``tablewright::cast_all``: many tensors to another dtype in one call, as a step's weights are for low precision.

``cast_all(tensors, dtype)`` -> one fresh tensor for each, of equal shape, on any device; ``tensors`` share one dtype, which is not
``dtype``. Values are rounded to nearest, ties to even, as by ``Tensor.to``. On a GPU all of them are one launch. The backward, too, is
one call: it brings the gradients that there are back to the tensors' dtype, and can be differentiated again.

Raises ``ValueError`` for tensors of several dtypes, or of ``dtype`` already.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY, tracing

LIBRARY.define("cast_all(Tensor[] tensors, ScalarType dtype) -> Tensor[]")


def _kernel(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    _check(tensors, dtype)
    if tensors and tensors[0].is_cuda:
        made = [torch.empty_like(t, dtype=dtype) for t in tensors]
        torch.ops.aten._foreach_copy_(made, list(tensors))
        return made
    return [t.to(dtype) for t in tensors]


def _check(tensors: list[Tensor], dtype: torch.dtype) -> None:
    found = {t.dtype for t in tensors}
    if len(found) > 1 or dtype in found:
        raise ValueError(f"the tensors are {sorted(map(str, found))}, to be cast to {dtype}; they must share one other dtype")


class _CastAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        if tracing():
            with torch._C._AutoDispatchBelowAutograd():
                return tuple(torch.ops.tablewright.cast_all(list(tensors), dtype))
        return tuple(_kernel(tensors, dtype))

    @staticmethod
    def backward(ctx, *grads):
        given = [g for g in grads if g is not None]
        made = iter(call(given, ctx.dtype) if given else ())
        return None, *(None if g is None else next(made) for g in grads)


def _autograd(tensors, dtype) -> list[Tensor]:
    if not tensors or (not torch.is_grad_enabled() and not tracing()):
        return _kernel(tensors, dtype)
    return list(_CastAll.apply(dtype, *tensors))


@torch.library.register_fake("tablewright::cast_all", lib=LIBRARY)
def _fake(tensors, dtype):
    _check(tensors, dtype)
    return [torch.empty_like(t, dtype=dtype) for t in tensors]


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("cast_all", _kernel, _device)
LIBRARY.impl("cast_all", _autograd, "Autograd")

OP = torch.ops.tablewright.cast_all.default


def call(tensors, dtype) -> list[Tensor]:
    """:data:`OP` without the trip through torch's dispatcher, wherever nothing needs to see the op."""
    run = OP if torch.compiler.is_compiling() or tracing() else _autograd
    return run(tensors, dtype)


DIRECT[OP] = call
