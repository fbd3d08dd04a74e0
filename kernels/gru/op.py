"""``tablewright::gru``: the layers of an ``nn.GRU`` in one direction, without dropout between them.

``gru(x, hx, weights, biases, batch_first)`` is ``torch.gru(x, hx, weights, biases, layers, 0.0, True, False, batch_first)``: the last layer's h of every
step and each layer's last. ``x`` ``[steps, batch, in]`` or, where ``batch_first``, ``[batch, steps, in]``; ``hx`` ``[layers, batch, dim]``; ``weights`` a layer's
W ``[3 dim, in]``, U ``[3 dim, dim]`` and, with ``biases``, two of ``[3 dim]``, layer after layer. What is faster is float32 on CPU (``cpu.py``); other dtypes
and devices, every trace and every shape that does not fit are ``torch.gru`` itself, and so are the errors. Its kernel for CPUs makes a dozen
passes over memory at each step, with functions at 2 ns a value. Measured: see ``passes/fuse_gru.py``.

sigmoid and tanh are within 4e-7 of the exact value. A backward that is differentiated again (``create_graph=True``) runs through ``torch.gru``.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY, tracing
from . import cpu

LIBRARY.define("gru(Tensor x, Tensor hx, Tensor[] weights, bool biases, bool batch_first) -> (Tensor, Tensor)")


def reference(x: Tensor, hx: Tensor, weights: Sequence[Tensor], biases: bool, batch_first: bool) -> tuple[Tensor, Tensor]:
    """The same in PyTorch."""
    return torch.gru(x, hx, list(weights), biases, len(weights) // (4 if biases else 2), 0.0, True, False, batch_first)


def _serves(x: Tensor, hx: Tensor, weights: Sequence[Tensor], biases: bool, batch_first: bool) -> bool:
    each = 4 if biases else 2
    if not cpu.available() or x.dim() != 3 or hx.dim() != 3 or not x.numel() or not hx.numel() or len(weights) != each * len(hx):
        return False
    for tensor in (x, hx, *weights):
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.dtype != torch.float32 or not tensor.is_cpu or tensor.is_neg():
            return False
    dim, width = hx.shape[2], x.shape[2]
    if hx.shape[1] != x.shape[0 if batch_first else 1]:
        return False
    for i in range(len(hx)):
        wanted = [(3 * dim, width if i == 0 else dim), (3 * dim, dim), (3 * dim,), (3 * dim,)][:each]
        if [tuple(w.shape) for w in weights[each * i : each * (i + 1)]] != wanted:
            return False
    return True


def _layers(weights: Sequence[Tensor], biases: bool) -> list[Sequence[Tensor]]:
    each = 4 if biases else 2
    return [weights[at : at + each] for at in range(0, len(weights), each)]


def _last(kept: Sequence[cpu.Kept]) -> Tensor:
    return torch.stack([states[-1] for states, _ in kept])


class _Gru(torch.autograd.Function):
    @staticmethod
    def forward(ctx, biases, batch_first, x, hx, *weights):
        ctx.set_materialize_grads(False)
        ctx.biases, ctx.batch_first = biases, batch_first
        out, kept = cpu.forward(x, hx, _layers(weights, biases), batch_first)
        out = out.clone() if out._is_view() and not batch_first else torch.ops.aten._unsafe_view(out, out.shape)
        ctx.save_for_backward(x, hx, *weights, *(t for pair in kept for t in pair))
        return out, _last(kept)

    @staticmethod
    def backward(ctx, *grads):
        grad, last = grads
        if grad is None and last is None:
            return (None,) * (2 + len(ctx.needs_input_grad[2:]))
        x, hx, *rest = ctx.saved_tensors
        weights, kept = rest[: -2 * len(hx)], rest[-2 * len(hx) :]
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            given = [(out, g) for out, g in zip(reference(x, hx, weights, ctx.biases, ctx.batch_first), (grad, last)) if g is not None]
            asked = [t for t, need in zip((x, hx, *weights), needs) if need]
            found = iter(torch.autograd.grad([out for out, _ in given], asked, [g for _, g in given], create_graph=True))
            return None, None, *(next(found) if need else None for need in needs)
        pairs = list(zip(kept[::2], kept[1::2]))
        of_x, of_hx, made = cpu.backward(grad, last, x, _layers(weights, ctx.biases), pairs, ctx.batch_first, needs[0])
        found = (of_x, of_hx, *(g for layer in made for g in layer))
        return None, None, *(g if need else None for g, need in zip(found, needs))


def call(x: Tensor, hx: Tensor, weights: Sequence[Tensor], biases: bool, batch_first: bool) -> tuple[Tensor, Tensor]:
    """:data:`OP` without the trip through torch's dispatcher."""
    if torch.compiler.is_compiling() or tracing() or torch.is_autocast_enabled(x.device.type) or not _serves(x, hx, weights, biases, batch_first):
        return reference(x, hx, weights, biases, batch_first)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, hx, *weights)):
        return _Gru.apply(biases, batch_first, x, hx, *weights)
    out, kept = cpu.forward(x, hx, _layers(weights, biases), batch_first)
    return out, _last(kept)


LIBRARY.impl("gru", call, "CompositeImplicitAutograd")

OP = torch.ops.tablewright.gru.default
DIRECT[OP] = call
