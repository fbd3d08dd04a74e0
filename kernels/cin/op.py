"""``tablewright::cin_layer``: a layer of the compressed interaction network, without the tensor of all outer products.

``cin_layer(x, y, weight, bias)`` is ``out[b, o, d] = bias[o] + sum over h, m of weight[o, h * M + m] * x[b, h, d] * y[b, m, d]`` for ``x`` ``[B, H, D]``,
``y`` ``[B, M, D]``, ``weight`` ``[O, H * M]`` and ``bias`` ``[O]`` or none; the result is ``[B, O, D]``. The plain form makes the products
``[B, H * M, D]`` (170 MB for 2048 samples, 10 x 128 rows, dim 16), convolves them, and keeps them for the backward.

On CPU the products of some hundred (b, d) at a time are made where a cache holds them, and go into matrix products
(``kernels/dense/gemm.py``); the backward makes them again. Measured on an AMD EPYC (Zen 5), torch 2.13, one thread, float32, batch
2048, forward + backward: 10 x 128 rows of dim 16 to 128 835 -> 320 ms, 26 x 64 to 64 914 -> 209 ms, 13 x 13 to 256 140 -> 92 ms; with 16
outputs it takes about as long as the plain form. Elsewhere than on CPU, in half precision, and in a backward that is
differentiated again it runs as :func:`reference`.

Source: Lian et al., xDeepFM (2018), equation 6.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dense import gemm
from ..library import DIRECT, LIBRARY, recorded_gradients, tracing

LIBRARY.define("cin_layer(Tensor x, Tensor y, Tensor weight, Tensor? bias) -> Tensor")

_CHUNK = 350_000  # products at a time: 1.4 MB of float32
_WIDE = 32  # from here on a row is long enough for elementwise ops


def reference(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same in plain, differentiable PyTorch."""
    products = torch.einsum("bhd,bmd->bhmd", x, y).flatten(1, 2)
    return F.conv1d(products, weight.unsqueeze(-1), bias)


def _by_column(x: Tensor) -> Tensor:
    """``[B, H, D]`` -> ``[B * D, H]``."""
    return x.transpose(1, 2).reshape(-1, x.shape[1])


def _steps(columns: int, width: int) -> list[slice]:
    step = max(64, _CHUNK // width)
    return [slice(start, start + step) for start in range(0, columns, step)]


def _forward(a: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = a.new_empty(len(a), len(weight))
    for part in _steps(len(a), weight.shape[1]):
        products = (a[part].unsqueeze(2) * c[part].unsqueeze(1)).flatten(1)
        out[part] = gemm.linear(products, weight, bias)
    return out


def _backward(grad: Tensor, a: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``a``, ``c`` and ``weight``."""
    to_a, to_c, to_weight = torch.empty_like(a), torch.empty_like(c), torch.zeros_like(weight)
    for part in _steps(len(a), weight.shape[1]):
        some, left, right = grad[part], a[part], c[part]
        products = (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)
        to_weight += gemm.weight_gradient(some, products)
        each = gemm.input_gradient(some, weight).view(len(left), left.shape[1], right.shape[1])
        if right.shape[1] >= _WIDE:
            to_c[part] = torch.bmm(left.unsqueeze(1), each).squeeze(1)
            to_a[part] = each.mul_(right.unsqueeze(1)).sum(2)
        else:
            to_a[part] = torch.bmm(each, right.unsqueeze(2)).squeeze(2)
            to_c[part] = each.mul_(left.unsqueeze(2)).sum(1)
    return to_a, to_c, to_weight


def _layer(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made = _forward(_by_column(x), _by_column(y), weight, bias)
    return made.view(len(x), x.shape[2], -1).transpose(1, 2).contiguous()


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, bias):
        ctx.save_for_backward(x, y, weight, bias)
        return _layer(x, y, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, y, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return tuple(recorded_gradients(reference, (x, y, weight, bias), needs, grad))
        columns = _by_column(grad)
        to_a, to_c, to_weight = _backward(columns, _by_column(x), _by_column(y), weight)
        to_x, to_y = (t.view(len(x), x.shape[2], -1).transpose(1, 2) for t in (to_a, to_c))
        return to_x, to_y, to_weight, columns.sum(0) if needs[3] else None


def call(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:data:`OP` without the trip through torch's dispatcher."""
    plain = not x.is_cpu or x.dtype not in (torch.float32, torch.float64) or any(t.dtype != x.dtype for t in (y, weight))
    if plain or not x.numel() or torch.compiler.is_compiling() or tracing() or torch.is_autocast_enabled("cpu"):
        return reference(x, y, weight, bias)
    return _Layer.apply(x, y, weight, bias) if torch.is_grad_enabled() else _layer(x, y, weight, bias)


LIBRARY.impl("cin_layer", call, "CompositeImplicitAutograd")

OP = torch.ops.tablewright.cin_layer.default
DIRECT[OP] = call
