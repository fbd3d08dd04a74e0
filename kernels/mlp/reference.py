"""A fused multilayer perceptron in plain PyTorch: what the fast forms are tested against, and what runs where they cannot.

``x`` is ``[rows, in]``; ``weights[i]`` ``[out_i, in_i]``; ``biases[i]`` ``[out_i]`` or none. Any floating dtype.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dense.gemm import matched
from .layers import Layer, pack, unpack


def plain(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], layers: Sequence[Layer], train: Sequence[bool]) -> Tensor:
    """What the op stands for, in the plain model's own ops."""
    for layer, weight, bias, drops in zip(layers, weights, biases, train):
        x = F.linear(x, *matched(x, weight, bias))
        x = F.relu(x) if layer.relu else x
        x = F.dropout(x, layer.p, drops) if layer.p else x
    return x


def finish(y: Tensor, layer: Layer, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dropout(relu(y)) with the values dropped where ``keep`` is False, the mask for the backward as bits)."""
    passed = ~(y <= 0) if layer.relu else torch.ones_like(y, dtype=torch.bool)  # NaN passes
    y = F.relu(y) if layer.relu else y
    if keep is not None:
        y, passed = y * (keep.to(y.dtype) / (1 - layer.p)), passed & keep
    return y, pack(passed)


def masked(grad: Tensor, bits: Tensor, p: float) -> Tensor:
    """The gradient before ReLU and dropout: ``grad / (1 - p)`` where the bit is set, else 0."""
    return torch.where(unpack(bits, grad.shape[1]), grad / (1 - p) if p else grad, 0)


def masked_again(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], layers: Sequence[Layer], train: Sequence[bool],
    masks: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The result once more, with the masks of an earlier forward, in ops that autograd can differentiate as often as asked."""
    given = iter(masks)
    for layer, weight, bias, drops in zip(layers, weights, biases, train):
        x = F.linear(x, *matched(x, weight, bias))
        if layer.masks(drops):
            x = x * (unpack(next(given), x.shape[1]).to(x.dtype) / (1 - layer.dropped(drops)))
    return x
