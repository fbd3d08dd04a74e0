"""Fused multilayer perceptrons on CPU: products of ``dense/gemm.py``, then ReLU, dropout and the bit mask in one pass over the result.

Products of bfloat16 that are the package's own do more at their end: ReLU and its mask, and in the backward the mask of the layer below and the
sum of that one's bias gradient.

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
        p = layer.dropped(drops)
        both = gemm.linear_and_bits(x, weight, bias) if layer.relu and not p else None
        if both is None:
            x = gemm.linear(x, weight, bias)
            both = _finish(x, layer, p) if layer.masks(drops) else (x, None)
        x, mask = both
        if mask is not None:
            masks.append(mask)
        outs.append(x)
    return outs, masks


def backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], outs: Sequence[Tensor], masks: Sequence[Tensor], layers: Sequence[Layer],
    train: Sequence[bool], wanted_x: bool, wanted: Sequence[tuple[bool, bool]],
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:  # fmt: skip
    """The gradient of x, and those of each layer's weight and bias; None where not ``wanted``.

    ``outs``: the results of all layers but the last. Stops at the first layer below which nothing is wanted."""
    given_masks = iter(masks)
    mask_of = [next(given_masks) if layer.masks(drops) else None for layer, drops in zip(layers, train)]
    made: list[tuple[Tensor | None, Tensor | None]] = []
    sums = None  # of grad's columns, where the product that made it has them and it is masked already
    for i in reversed(range(len(layers))):
        mask, p = mask_of[i], layers[i].dropped(train[i])
        if mask is not None and sums is None:
            native = grad.dtype in _FAST and draws.describe().startswith("native")
            grad = draws.masked(grad, mask, p) if native else reference.masked(grad, mask, p)
        given, dtype = outs[i - 1] if i else x, weights[i].dtype
        of_weight = gemm.weight_gradient(grad, given, dtype=dtype) if wanted[i][0] else None
        of_bias = None
        if wanted[i][1]:
            of_bias = gemm.bias_gradient(grad, dtype) if sums is None else sums.to(dtype)
        made.append((of_weight, of_bias))
        if not (wanted_x or any(map(any, wanted[:i]))):
            made += [(None, None)] * i
            return None, made[::-1]
        below = mask_of[i - 1] if i else None
        both = None
        if below is not None:
            both = gemm.masked_input_gradient(grad, weights[i], below, draws.scale_of(layers[i - 1].dropped(train[i - 1]), grad.dtype))
        grad, sums = (gemm.input_gradient(grad, weights[i]), None) if both is None else both
    return grad, made[::-1]
