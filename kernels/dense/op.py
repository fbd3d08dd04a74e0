"""``tablewright::dense``: a linear layer and its activation, the activation in place on the product's fresh result.

``dense(x, weight, bias, activation, of_relu=False)`` is ``activation(x @ weight.T + bias)`` for ``x`` ``[*, in]``, ``weight`` ``[out, in]``,
``bias`` ``[out]`` or none, and ``activation`` one of "none", "relu", "sigmoid", "tanh". Any floating dtype and device; what is
faster than ``F.linear`` about it is float32 on CPU (``gemm.py``, with the numbers). The derivative of relu at 0 is 0 and NaN
stays NaN, as in torch; the backward reads the activation's result, not its input. A backward that is differentiated again
(``create_graph=True``) runs through plain PyTorch ops. ``of_relu``: ``x`` is the result of a ReLU and nobody else wants its gradient, which
may then be given as 0 wherever ``x`` is, as the ReLU would make it: the product writes it so, and a ``dense`` below takes it as it is.

Raises what ``F.linear`` raises for shapes that do not fit, and ``ValueError`` for an unknown activation or a weight of another
rank.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..library import DIRECT, LIBRARY, backward_of, tracing
from ..tanh.cpu import tanh_
from . import gemm

LIBRARY.define("dense(Tensor x, Tensor weight, Tensor? bias, str activation, bool of_relu=False) -> Tensor")
LIBRARY.define(
    "dense_backward(Tensor grad, Tensor x, Tensor weight, Tensor out, str activation, bool[] wanted, bool of_relu=False) -> Tensor[]"
)

_ACTIVATE = {"none": lambda y: y, "relu": Tensor.relu_, "sigmoid": Tensor.sigmoid_, "tanh": tanh_}
_DERIVE = {
    "none": lambda grad, out: grad,
    "relu": lambda grad, out: torch.ops.aten.threshold_backward(grad, out, 0),
    "sigmoid": torch.ops.aten.sigmoid_backward,
    "tanh": torch.ops.aten.tanh_backward,
}
ACTIVATIONS = tuple(_ACTIVATE)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The same in plain, differentiable PyTorch."""
    y = F.linear(x, weight, bias)
    return y if activation == "none" else getattr(torch, activation)(y)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, of_relu: bool = False) -> Tensor:
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [out, in]")
    if activation not in _ACTIVATE:
        raise ValueError(f"activation is {activation!r}; it must be one of {ACTIVATIONS}")
    relu = activation == "relu"
    out = gemm.linear(x, weight, bias, relu)
    if out._is_view():  # of rows laid out in two dimensions: autograd lets no one write to a view that a Function returns
        out = torch.ops.aten._unsafe_view(out, out.shape)
    return out if relu else _ACTIVATE[activation](out)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, out: Tensor, activation: str, wanted: list[bool], of_relu: bool = False, again: bool = False
) -> list[Tensor]:  # fmt: skip
    """The gradients of (x, weight, bias) that are ``wanted``, in this order; ``again``: by ops that can be differentiated."""
    both = _given(grad, out) or gemm.relu_gradient(grad, out) if activation == "relu" and not again else None
    grad, sums = (_DERIVE[activation](grad, out), None) if both is None else both
    made = []
    if wanted[0]:
        masked = gemm.relu_input_gradient(grad, weight, x) if of_relu and not again else None
        made.append(gemm.input_gradient(grad, weight, again) if masked is None else masked[0])
        if masked is not None:
            setattr(masked[0], _MASKED, (x.data_ptr(), masked[0]._version, masked[1]))
    if wanted[1]:
        made.append(gemm.weight_gradient(grad, x, again, weight=weight))
    if wanted[2]:
        made.append(grad.reshape(-1, grad.shape[-1]).sum(0) if sums is None else sums)
    return made


# On a gradient: (where the result of the ReLU lies by which it is masked already, its version then, the sums of its columns).
_MASKED = "_tablewright_masked"


def _given(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor] | None:
    """What ``relu_gradient`` makes of ``grad``, where the layer above made it already and nothing was added since."""
    held = getattr(grad, _MASKED, None)
    return (grad, held[2]) if held is not None and held[:2] == (out.data_ptr(), grad._version) else None


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation, of_relu):
        if tracing():
            with torch._C._AutoDispatchBelowAutograd():
                out = torch.ops.tablewright.dense(x, weight, bias, activation, of_relu)
        else:
            out = _forward(x, weight, bias, activation)
        ctx.activation, ctx.of_relu = activation, of_relu
        ctx.save_for_backward(x, weight, *([] if activation == "none" else [out]))
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, *rest = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        run = backward_of(_backward, torch.ops.tablewright.dense_backward)
        made = iter(run(grad, x, weight, rest[0] if rest else grad, ctx.activation, wanted, ctx.of_relu))
        return (*(next(made) if want else None for want in wanted), None, None)


def _autograd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, of_relu: bool = False) -> Tensor:
    if x.layout != torch.strided:  # a sparse matrix: torch's own product takes it, ours read dense rows
        return reference(x, weight, bias, activation)
    if torch.is_autocast_enabled(x.device.type):
        return reference(x, weight, bias, activation)  # which autocast sees and casts as in the plain model
    if not torch.is_grad_enabled() and not tracing():
        return _forward(x, weight, bias, activation)
    return _Dense.apply(x, weight, bias, activation, of_relu)


@torch.library.register_fake("tablewright::dense", lib=LIBRARY)
def _fake(x, weight, bias, activation, of_relu=False):
    return F.linear(x, weight, bias).contiguous()


@torch.library.register_fake("tablewright::dense_backward", lib=LIBRARY)
def _fake_backward(grad, x, weight, out, activation, wanted, of_relu=False):
    likes = (x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]))
    return [like for like, want in zip(likes, wanted) if want]


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("dense", _forward, _device)
    LIBRARY.impl("dense_backward", _backward, _device)
LIBRARY.impl("dense", _autograd, "Autograd")

OP = torch.ops.tablewright.dense.default


def call(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, of_relu: bool = False) -> Tensor:
    """:data:`OP` without the trip through torch's dispatcher, wherever nothing needs to see the op."""
    run = OP if torch.compiler.is_compiling() or tracing() else _autograd
    return run(x, weight, bias, activation, of_relu)


DIRECT[OP] = call
