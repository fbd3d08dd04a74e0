"""``tablewright::cross_vector``: all vector cross layers of DCN v1 at once, ``x[l+1] = x0 (x[l] . w[l] + i[l]) + b[l] + x[l]``.

Every ``x[l]`` is ``a[l] x0 + c[l]`` with one number ``a[l]`` per row and one vector ``c[l]`` for all rows: ``a[0] = 1``, ``c[0] = 0``,

    a[l+1] = a[l] (1 + x0 . w[l]) + c[l] . w[l] + i[l]        c[l+1] = c[l] + b[l]

So the layers need the products ``x0 . w[l]`` (one skinny matrix product), a few operations on ``[rows]``, and one pass that makes
the result; the plain form makes three or four passes over ``[rows, dim]`` in each layer.

``x0`` ``[*, dim]``; ``weights`` one tensor of ``dim`` elements for each layer; ``inner`` (``i``) of one element and ``biases`` (``b``) of ``dim``
elements, or none. Any floating dtype and device; the result has ``x0``'s shape. A backward that is differentiated
again (``create_graph=True``) runs through plain PyTorch ops.

Source: Wang et al., Deep & Cross Network (2017), equation 3; the closed form follows by induction.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY, backward_of, tracing

LIBRARY.define("cross_vector(Tensor x0, Tensor[] weights, Tensor?[] inner, Tensor?[] biases) -> Tensor")
LIBRARY.define("cross_vector_forward(Tensor x0, Tensor[] weights, Tensor?[] inner, Tensor?[] biases) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    "cross_vector_backward(Tensor grad, Tensor x0, Tensor products, Tensor scales, Tensor[] weights, Tensor?[] inner,"
    " Tensor?[] biases, bool wants_x0) -> Tensor[]"
)


def reference(x0: Tensor, weights: list[Tensor], inner: list[Tensor | None], biases: list[Tensor | None]) -> Tensor:
    """The same layer by layer in plain, differentiable PyTorch."""
    x = x0
    for w, i, b in zip(weights, inner, biases):
        y = (x @ w.reshape(-1)).unsqueeze(-1)
        y = y if i is None else y + i
        x = x0 * y + x if b is None else x0 * y + b.reshape(-1) + x
    return x


def _shifts(x0: Tensor, biases) -> list[Tensor]:
    """``c[0] ... c[layers]``."""
    sums = [x0.new_zeros(x0.shape[-1])]
    for b in biases:
        sums.append(sums[-1] if b is None else sums[-1] + b.reshape(-1))
    return sums


def _forward(x0: Tensor, weights, inner, biases) -> tuple[Tensor, Tensor, Tensor]:
    """The result, ``x0 . w[l]`` and ``a[l]``, both ``[layers, *]``."""
    stacked = torch.stack([w.reshape(-1) for w in weights])
    products = (x0 @ stacked.t()).movedim(-1, 0).contiguous()
    shifts = _shifts(x0, biases)
    biased = any(b is not None for b in biases)
    scales = [torch.ones_like(products[0])]
    for number, (w, i) in enumerate(zip(weights, inner)):
        following = torch.addcmul(scales[-1], scales[-1], products[number])
        if biased and number:
            following += shifts[number] @ w.reshape(-1)
        if i is not None:
            following += i
        scales.append(following)
    last = scales[-1].unsqueeze(-1)
    out = torch.addcmul(shifts[-1], x0, last) if biased else x0 * last
    return out, products, torch.stack(scales)


def _kernel(x0, weights, inner, biases) -> Tensor:
    return _forward(x0, weights, inner, biases)[0]


def _backward(
    grad: Tensor, x0: Tensor, products: Tensor, scales: Tensor, weights, inner, biases, wants_x0: bool, again: bool = False
) -> list[Tensor]:  # fmt: skip
    """The gradients of x0 (if wanted), of every weight, of the inner terms and of the biases that there are.

    ``again`` changes nothing: all of these ops can be differentiated."""
    layers, dim = len(weights), x0.shape[-1]
    flat, rows = x0.reshape(-1, dim), grad.reshape(-1, dim)
    vectors = [w.reshape(-1) for w in weights]
    shifts = _shifts(x0, biases)
    to_scale = (rows * flat).sum(-1).view(products.shape[1:])
    to_shift = rows.sum(0)
    to_products, of_weights, of_inner, of_biases = [], [], [], []
    for number in reversed(range(layers)):
        total = to_scale.sum()
        of_inner.append(total)
        of_biases.append(to_shift)
        of_weights.append(total * shifts[number])
        to_shift = torch.addcmul(to_shift, vectors[number], total)
        to_products.append(to_scale * scales[number])
        to_scale = torch.addcmul(to_scale, to_scale, products[number])
    columns = torch.stack(to_products[::-1]).view(layers, -1)
    from_products = columns @ flat
    made = []
    if wants_x0:
        made.append(torch.addmm(rows * scales[-1].reshape(-1, 1), columns.t(), torch.stack(vectors)).view(x0.shape))
    made += [(of_weights[layers - 1 - n] + from_products[n]).view(w.shape) for n, w in enumerate(weights)]
    made += [of_inner[layers - 1 - n].reshape(i.shape) for n, i in enumerate(inner) if i is not None]
    made += [of_biases[layers - 1 - n].clone().view(b.shape) for n, b in enumerate(biases) if b is not None]
    return made


class _CrossVector(torch.autograd.Function):
    """Inputs after the count: x0, then weights, inner terms and biases, as many of each as there are layers."""

    @staticmethod
    def forward(ctx, layers, x0, *tensors):
        parts = _split(tensors, layers)
        if tracing():
            with torch._C._AutoDispatchBelowAutograd():
                out, products, scales = torch.ops.tablewright.cross_vector_forward(x0, *parts)
        else:
            out, products, scales = _forward(x0, *parts)
        ctx.layers = layers
        ctx.save_for_backward(x0, products, scales, *tensors)
        return out

    @staticmethod
    def backward(ctx, grad):
        x0, products, scales, *tensors = ctx.saved_tensors
        parts = _split(tensors, ctx.layers)
        if torch.is_grad_enabled():
            _, products, scales = _forward(x0, *parts)  # autograd knows what these were made from
        run = backward_of(_backward, torch.ops.tablewright.cross_vector_backward)
        needs = ctx.needs_input_grad[1:]
        made = iter(run(grad, x0, products, scales, *parts, needs[0]))
        grads = [next(made) if needs[0] else None]
        for tensor, need in zip(tensors, needs[1:]):
            given = None if tensor is None else next(made)
            grads.append(given if need else None)
        return None, *grads


def _split(tensors, layers: int) -> tuple[list, list, list]:
    return list(tensors[:layers]), list(tensors[layers : 2 * layers]), list(tensors[2 * layers :])


def _autograd(x0, weights, inner, biases) -> Tensor:
    if torch.is_autocast_enabled(x0.device.type):
        return reference(x0, weights, inner, biases)  # which autocast sees and casts as in the plain model
    if not torch.is_grad_enabled() and not tracing():
        return _kernel(x0, weights, inner, biases)
    return _CrossVector.apply(len(weights), x0, *weights, *inner, *biases)


@torch.library.register_fake("tablewright::cross_vector", lib=LIBRARY)
def _fake(x0, weights, inner, biases):
    return x0.new_empty(x0.shape)


@torch.library.register_fake("tablewright::cross_vector_forward", lib=LIBRARY)
def _fake_forward(x0, weights, inner, biases):
    rows, layers = x0.shape[:-1], len(weights)
    return x0.new_empty(x0.shape), x0.new_empty((layers, *rows)), x0.new_empty((layers + 1, *rows))


@torch.library.register_fake("tablewright::cross_vector_backward", lib=LIBRARY)
def _fake_backward(grad, x0, products, scales, weights, inner, biases, wants_x0):
    likes = [*([x0] if wants_x0 else []), *weights, *(i for i in inner if i is not None), *(b for b in biases if b is not None)]
    return [like.new_empty(like.shape) for like in likes]


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("cross_vector", _kernel, _device)
    LIBRARY.impl("cross_vector_forward", _forward, _device)
    LIBRARY.impl("cross_vector_backward", _backward, _device)
LIBRARY.impl("cross_vector", _autograd, "Autograd")

OP = torch.ops.tablewright.cross_vector.default


def call(x0, weights, inner, biases) -> Tensor:
    """:data:`OP` without the trip through torch's dispatcher, wherever nothing needs to see the op."""
    run = OP if torch.compiler.is_compiling() or tracing() else _autograd
    return run(x0, weights, inner, biases)


DIRECT[OP] = call
