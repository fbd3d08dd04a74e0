"""Fused multilayer perceptrons on CPU: oneDNN or MKL products, then ReLU, dropout and the bit mask in one pass over the result.

Dropout draws what torch draws, value for value (``kernels/dropout``); where it cannot, and for other dtypes than float32 and bfloat16,
plain PyTorch ops do the work.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dense import gemm
from ..dropout import cpu as draws
from . import reference
from .layers import Layer

_FAST = (torch.float32, torch.bfloat16)


def _native(y: Tensor, p: float) -> bool:
    fits = y.dtype in _FAST and y.is_contiguous() and y.numel() > 0
    return fits and draws.describe().startswith("native") and (p == 0 or draws.available())


def _finish(y: Tensor, layer: Layer, p: float) -> tuple[Tensor, Tensor]:
    if _native(y, p):
        return y, draws.finish(y, layer.relu, p)
    keep = torch.empty_like(y).bernoulli_(1 - p) != 0 if p else None
    return reference.finish(y, layer, keep)


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], layers: Sequence[Layer], train: Sequence[bool],
    seed: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """(the result of each layer ``[rows, out]``, the mask of each layer that has one). ``seed`` is not read: torch's generator is."""
    outs, masks = [], []
    for layer, weight, bias, drops in zip(layers, weights, biases, train):
        x = gemm.linear(x, weight, bias)
        if layer.masks(drops):
            x, mask = _finish(x, layer, layer.dropped(drops))
            masks.append(mask)
        outs.append(x)
    return outs, masks


def backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], outs: Sequence[Tensor], masks: Sequence[Tensor], layers: Sequence[Layer],
    train: Sequence[bool], wanted_x: bool, wanted: Sequence[tuple[bool, bool]],
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:  # fmt: skip
    """The gradient of x, and those of each layer's weight and bias; None where not ``wanted``.

    ``outs``: the results of all layers but the last. Stops at the first layer below which nothing is wanted."""
    left = list(masks)
    made: list[tuple[Tensor | None, Tensor | None]] = []
    for i in reversed(range(len(layers))):
        if layers[i].masks(train[i]):
            mask, p = left.pop(), layers[i].dropped(train[i])
            native = grad.dtype in _FAST and draws.describe().startswith("native")
            grad = draws.masked(grad, mask, p) if native else reference.masked(grad, mask, p)
        given = outs[i - 1] if i else x
        made.append((gemm.weight_gradient(grad, given) if wanted[i][0] else None, grad.sum(0) if wanted[i][1] else None))
        if not (wanted_x or any(map(any, wanted[:i]))):
            made += [(None, None)] * i
            return None, made[::-1]
        grad = gemm.input_gradient(grad, weights[i])
    return grad, made[::-1]
