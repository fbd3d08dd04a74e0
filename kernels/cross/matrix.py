"""``tablewright::cross``: one matrix cross layer of DCN v2, ``x0 * (x W^T + b) + c + x``.

``x0`` and ``x`` ``[*, dim]``, ``weight`` ``[dim, dim]``, ``bias`` (``b``) and ``shift`` (``c``) ``[dim]`` or none -> ``[*, dim]``, of any floating
dtype on any device; where ``weight`` (and ``bias``) are of a lower precision than ``x0`` and ``x``, the product is made in it and everything
else in that of ``x``. After the product there is one pass over memory (``addcmul``) instead of two or three, and the backward
adds the residual's gradient in place; the product itself is ``dense/gemm.py``'s. A kernel of its own for the rest would gain
nothing: at batch 2048 and dim 429 the elementwise part is 4 % of the layer. A backward
that is differentiated again (``create_graph=True``) runs through plain PyTorch ops.

Source: Wang et al., DCN V2 (2021), equation 1. Raises ``ValueError`` where ``x0`` and ``x`` differ in shape.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dense import gemm
from ..library import DIRECT, LIBRARY, backward_of, tracing

LIBRARY.define("cross(Tensor x0, Tensor x, Tensor weight, Tensor? bias, Tensor? shift) -> Tensor")
LIBRARY.define("cross_forward(Tensor x0, Tensor x, Tensor weight, Tensor? bias, Tensor? shift) -> (Tensor, Tensor)")
LIBRARY.define("cross_backward(Tensor grad, Tensor x0, Tensor x, Tensor y, Tensor weight, bool[] wanted) -> Tensor[]")


def reference(x0: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor:
    """The same in plain, differentiable PyTorch."""
    out = x0 * F.linear(x.to(weight.dtype), weight, bias) + x
    return out if shift is None else out + shift


def _forward(x0, x, weight, bias, shift) -> tuple[Tensor, Tensor]:
    """The layer's value, and ``x W^T + b`` for the backward."""
    if x0.shape != x.shape:
        raise ValueError(f"x0 has shape {tuple(x0.shape)} and x {tuple(x.shape)}; they must be equal")
    y = gemm.linear(x.to(weight.dtype), weight, bias)
    if y.dtype != x.dtype:  # ops on two dtypes take PyTorch five times as long as a copy and ops on one
        out = y.to(x.dtype).mul_(x0)
        return (out if shift is None else out.add_(shift)).add_(x), y
    if shift is None:
        return torch.addcmul(x, x0, y), y
    return torch.addcmul(shift, x0, y).add_(x), y


def _kernel(x0, x, weight, bias, shift) -> Tensor:
    return _forward(x0, x, weight, bias, shift)[0]


def _backward(
    grad: Tensor, x0: Tensor, x: Tensor, y: Tensor, weight: Tensor, wanted: list[bool], again: bool = False
) -> list[Tensor]:  # fmt: skip
    """The gradients of (x0, x, weight, bias, shift) that are ``wanted``, in this order; ``again``: by ops that can be differentiated."""
    made = []
    if wanted[0]:
        made.append(grad * y if again or y.dtype == grad.dtype else y.to(grad.dtype).mul_(grad))
    inner = grad
    if any(wanted[1:4]):
        inner = (grad * x0).to(weight.dtype) if again else torch.mul(grad, x0, out=torch.empty_like(grad, dtype=weight.dtype))
    if wanted[1]:
        back = gemm.input_gradient(inner, weight, again)
        made.append(grad + back if again else back.to(grad.dtype).add_(grad))
    if wanted[2]:
        made.append(gemm.weight_gradient(inner, x.to(weight.dtype), again))
    if wanted[3]:
        made.append(inner.reshape(-1, inner.shape[-1]).sum(0))
    if wanted[4]:
        made.append(grad.reshape(-1, grad.shape[-1]).sum(0))
    return made


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, x, weight, bias, shift):
        if tracing():
            with torch._C._AutoDispatchBelowAutograd():
                out, y = torch.ops.tablewright.cross_forward(x0, x, weight, bias, shift)
        else:
            out, y = _forward(x0, x, weight, bias, shift)
        ctx.save_for_backward(x0, x, y, weight, bias)
        return out

    @staticmethod
    def backward(ctx, grad):
        x0, x, y, weight, bias = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            y = F.linear(x.to(weight.dtype), weight, bias)  # autograd knows what this one was made from
        run = backward_of(_backward, torch.ops.tablewright.cross_backward)
        made = iter(run(grad, x0, x, y, weight, wanted))
        return tuple(next(made) if want else None for want in wanted)


def _autograd(x0, x, weight, bias, shift) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        return reference(x0, x, weight, bias, shift)  # which autocast sees and casts as in the plain model
    if not torch.is_grad_enabled() and not tracing():
        return _kernel(x0, x, weight, bias, shift)
    return _Cross.apply(x0, x, weight, bias, shift)


@torch.library.register_fake("tablewright::cross", lib=LIBRARY)
def _fake(x0, x, weight, bias, shift):
    return x.new_empty(x.shape)


@torch.library.register_fake("tablewright::cross_forward", lib=LIBRARY)
def _fake_forward(x0, x, weight, bias, shift):
    return x.new_empty(x.shape), weight.new_empty(x.shape)


@torch.library.register_fake("tablewright::cross_backward", lib=LIBRARY)
def _fake_backward(grad, x0, x, y, weight, wanted):
    dim = weight.shape[0]
    like = (x0, x, weight, weight.new_empty(dim), x.new_empty(dim))
    return [t.new_empty(t.shape) for t, want in zip(like, wanted) if want]


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("cross", _kernel, _device)
    LIBRARY.impl("cross_forward", _forward, _device)
    LIBRARY.impl("cross_backward", _backward, _device)
LIBRARY.impl("cross", _autograd, "Autograd")

OP = torch.ops.tablewright.cross.default


def call(x0, x, weight, bias, shift) -> Tensor:
    """:data:`OP` without the trip through torch's dispatcher, wherever nothing needs to see the op."""
    run = OP if torch.compiler.is_compiling() or tracing() else _autograd
    return run(x0, x, weight, bias, shift)


DIRECT[OP] = call
