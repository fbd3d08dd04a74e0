"""Interactions in plain PyTorch: what the fast forms are tested against, and what runs where they cannot.

``x`` is ``[batch, features, dim]`` of any floating dtype and any strides. Half precision is summed in float32, rounded once.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .pairs import check, decode, index_tensors


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def dots(x: Tensor, pairs: str) -> Tensor:
    """``[batch, pairs]``: the inner product of each pair."""
    check(decode(pairs), x.shape[1])
    first, second = (n.long() for n in index_tensors(pairs, x.device))
    wide = _wide(x)
    products = torch.bmm(wide, wide.transpose(1, 2)).flatten(1)
    return products.index_select(1, first * x.shape[1] + second).to(x.dtype)


def dots_backward(grad: Tensor, x: Tensor, pairs: str, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient of :func:`dots` for x: ``S x``, where ``S[i, j]`` sums the gradients of the pairs (i, j) and (j, i). ``dtype``: what x was
    rounded to."""
    batch, features, _ = x.shape
    first, second = (n.long() for n in index_tensors(pairs, x.device))
    wide, grad = _wide(x if dtype is None else x.to(dtype)), _wide(grad)
    square = grad.new_zeros(batch, features * features).index_add_(1, first * features + second, grad).view(batch, features, features)
    return torch.bmm(square + square.transpose(1, 2), wide).to(x.dtype)


def products(x: Tensor, pairs: str) -> Tensor:
    """``[batch, pairs, dim]``: the elementwise product of each pair."""
    check(decode(pairs), x.shape[1])
    first, second = (n.long() for n in index_tensors(pairs, x.device))
    return x.index_select(1, first) * x.index_select(1, second)


def products_backward(grad: Tensor, x: Tensor, pairs: str) -> Tensor:
    """The gradient of :func:`products` for x."""
    first, second = (n.long() for n in index_tensors(pairs, x.device))
    wide, grad = _wide(x), _wide(grad)
    out = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    out.index_add_(1, first, grad * wide.index_select(1, second))
    out.index_add_(1, second, grad * wide.index_select(1, first))
    return out.to(x.dtype)


def fm(x: Tensor, scale: float, reduce: bool) -> Tensor:
    """``scale * sum over i < j of x[:, i] * x[:, j]``: ``[batch, dim]``, or ``[batch]`` summed over dim too."""
    wide = _wide(x)
    pairs = (wide * (wide.cumsum(1) - wide)).sum(1)
    return (scale * (pairs.sum(1) if reduce else pairs)).to(x.dtype)


def fm_backward(grad: Tensor, x: Tensor, scale: float, reduce: bool) -> Tensor:
    """The gradient of :func:`fm` for x: ``scale * grad * (sum of x - x)``."""
    wide, grad = _wide(x), _wide(grad)
    grad = grad[:, None, None] if reduce else grad[:, None]
    return (scale * grad * (wide.sum(1, keepdim=True) - wide)).to(x.dtype)
