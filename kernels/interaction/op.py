"""The interaction ops: what a rewritten graph calls instead of gram matrices, index lists and differences of squares.

::

    dot_interaction(x, extras, pairs, place=0, constants=None, digest="", multiple=1, dtype=None) -> [batch, sum of widths]
    pair_products(x, pairs, constants=None, digest="") -> [batch, pairs, dim]
    fm(x, scale=1.0, reduce=False, constants=None, digest="") -> [batch, dim], or [batch] if reduce

``x`` is ``[batch, features, dim]`` (any strides). ``pairs`` is an encoded :class:`~.pairs.Pairs`. ``dot_interaction`` writes
``<x[i], x[j]>`` for each pair, ``place`` of the ``extras`` (``[batch, width]``) before them and the others after, then zeros until the
width is a multiple of ``multiple``, in the dtype that ``torch.cat`` would give; under autocast it takes x in autocast's dtype, as bmm does.
``dtype``: x counts as rounded to it, sums are float32, and the result is of it, whatever the extras are; x's gradient is of x's dtype. ``fm`` is ``scale`` times the sum over
i < j of ``x[i] * x[j]`` (Rendle 2010: ``((sum x)^2 - sum x^2) / 2``), by running sums, in which nothing cancels.
``constants`` and ``digest``: see ``constants.py``.

All are differentiable in x and the extras; second derivatives run through the reference's PyTorch ops. Results are the same bits for any number of threads.
Raises IndexError for a pair outside x, RuntimeError if a constant changed.
"""
from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..library import LIBRARY, tracing
from . import cpu, reference
from .constants import unchanged
from .pairs import decode

for _schema in (
    'dot_interaction(Tensor x, Tensor[] extras, str pairs, int place=0, Tensor[]? constants=None, str digest="",'
    " int multiple=1, ScalarType? dtype=None) -> Tensor",
    "dot_interaction_backward(Tensor grad, Tensor x, str pairs, ScalarType? dtype=None) -> Tensor",
    'pair_products(Tensor x, str pairs, Tensor[]? constants=None, str digest="") -> Tensor',
    "pair_products_backward(Tensor grad, Tensor x, str pairs) -> Tensor",
    'fm(Tensor x, float scale=1.0, bool reduce=False, Tensor[]? constants=None, str digest="") -> Tensor',
    "fm_backward(Tensor grad, Tensor x, float scale, bool reduce) -> Tensor",
):
    LIBRARY.define(_schema)

_OPS = torch.ops.tablewright


def implementation(device: torch.device):
    """The module whose functions run on ``device``."""
    if device.type == "cpu":
        return cpu
    from . import gpu  # Triton is imported only where a GPU asks for it

    return gpu


# --- dot_interaction ---------------------------------------------------------------------------------------------------------


def _promoted(x: Tensor, extras: list[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (e.dtype for e in extras), x.dtype)


def _width(extras: list[Tensor]) -> int:
    return sum(e.shape[1] for e in extras)


def joined(run, shape_of: Tensor, extras: list[Tensor], count: int, place: int, multiple: int, dtype: torch.dtype):
    """(a new output, the columns of it for ``count`` pairs, every extra with its columns); what fills it up is zero."""
    width, first = count + _width(extras), _width(extras[:place])
    out = run.empty((shape_of.shape[0], _padded(width, multiple)), dtype, shape_of.device)
    out.narrow(1, width, out.shape[1] - width).zero_()
    column, beside = 0, []
    for i, extra in enumerate(extras):
        column += count if i == place else 0
        beside.append((extra, out.narrow(1, column, extra.shape[1])))
        column += extra.shape[1]
    return out, out.narrow(1, first, count), beside


def _padded(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _dots(
    x: Tensor, extras: list[Tensor], pairs: str, place: int = 0, constants=None, digest: str = "", multiple: int = 1, dtype: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    unchanged(constants, digest)
    run = implementation(x.device)
    wanted = dtype or _promoted(x, extras)
    rounds = dtype is not None and run.rounds(x, pairs, dtype)
    if dtype is not None and not rounds:
        x = x.to(dtype)
    if not extras and multiple == 1 and not rounds:
        return run.dots(x, pairs)
    out, part, beside = joined(run, x, extras, len(decode(pairs)), place, multiple, wanted)
    if out.dtype == x.dtype or rounds:
        run.dots(x, pairs, part, beside)
    else:
        part.copy_(run.dots(x, pairs))
        for extra, columns in beside:
            columns.copy_(extra)
    return out


@torch.library.register_fake("tablewright::dot_interaction", lib=LIBRARY)
def _fake_dots(x, extras, pairs, place=0, constants=None, digest="", multiple=1, dtype=None):
    width = _padded(_width(extras) + len(decode(pairs)), multiple)
    return x.new_empty((x.shape[0], width), dtype=dtype or _promoted(x, extras))


def _dots_backward(grad: Tensor, x: Tensor, pairs: str, dtype: torch.dtype | None = None) -> Tensor:
    run = implementation(x.device)
    if dtype is None:
        return run.dots_backward(grad.to(x.dtype), x, pairs)
    low = x if run.rounds(x, pairs, dtype) else x.to(dtype)
    return run.dots_backward(grad.to(dtype), low, pairs).to(x.dtype)


def extra_grads(grad: Tensor, extras, count: int, place: int, wanted) -> list[Tensor | None]:
    """The parts of ``grad`` that belong to the extras, each (width, dtype), beside ``count`` pairs."""
    made, column = [], 0
    for i, (width, dtype) in enumerate(extras):
        column += count if i == place else 0
        made.append(grad.narrow(1, column, width).to(dtype) if wanted[i] else None)
        column += width
    return made


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pairs, place, constants, digest, multiple, dtype, *extras):
        ctx.save_for_backward(x)
        ctx.pairs, ctx.place, ctx.dtype = pairs, place, dtype
        ctx.extras = [(e.shape[1], e.dtype) for e in extras]
        return _below(_OPS.dot_interaction, _dots)(x, list(extras), pairs, place, constants, digest, multiple, dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        count, first = len(decode(ctx.pairs)), sum(w for w, _ in ctx.extras[: ctx.place])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _backward_of("dots")(grad.narrow(1, first, count), x, ctx.pairs, ctx.dtype)
        return dx, *[None] * 6, *extra_grads(grad, ctx.extras, count, ctx.place, ctx.needs_input_grad[7:])


def _dots_autograd(x, extras, pairs, place=0, constants=None, digest="", multiple=1, dtype=None):
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    return _Dots.apply(x, pairs, place, constants, digest, multiple, dtype, *extras)


# --- pair_products -----------------------------------------------------------------------------------------------------------


def _products(x: Tensor, pairs: str, constants=None, digest: str = "") -> Tensor:
    unchanged(constants, digest)
    return implementation(x.device).products(x, pairs)


@torch.library.register_fake("tablewright::pair_products", lib=LIBRARY)
def _fake_products(x, pairs, constants=None, digest=""):
    return x.new_empty((x.shape[0], len(decode(pairs)), x.shape[2]))


def _products_backward(grad: Tensor, x: Tensor, pairs: str) -> Tensor:
    return implementation(x.device).products_backward(grad, x, pairs)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pairs, constants, digest):
        ctx.save_for_backward(x)
        ctx.pairs = pairs
        return _below(_OPS.pair_products, _products)(x, pairs, constants, digest)

    @staticmethod
    def backward(ctx, grad):
        dx = _backward_of("products")(grad, *ctx.saved_tensors, ctx.pairs)
        return dx, None, None, None


def _products_autograd(x, pairs, constants=None, digest=""):
    return _Products.apply(x, pairs, constants, digest)


# --- fm ----------------------------------------------------------------------------------------------------------------------


def _fm(x: Tensor, scale: float = 1.0, reduce: bool = False, constants=None, digest: str = "") -> Tensor:
    unchanged(constants, digest)
    return implementation(x.device).fm(x, scale, reduce)


@torch.library.register_fake("tablewright::fm", lib=LIBRARY)
def _fake_fm(x, scale=1.0, reduce=False, constants=None, digest=""):
    return x.new_empty((x.shape[0],) if reduce else (x.shape[0], x.shape[2]))


def _fm_backward(grad: Tensor, x: Tensor, scale: float, reduce: bool) -> Tensor:
    return implementation(x.device).fm_backward(grad, x, scale, reduce)


class _Fm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, reduce, constants, digest):
        ctx.save_for_backward(x)
        ctx.options = scale, reduce
        return _below(_OPS.fm, _fm)(x, scale, reduce, constants, digest)

    @staticmethod
    def backward(ctx, grad):
        return _backward_of("fm")(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


def _fm_autograd(x, scale=1.0, reduce=False, constants=None, digest=""):
    return _Fm.apply(x, scale, reduce, constants, digest)


# --- registration ------------------------------------------------------------------------------------------------------------


def _below(op, function):
    """``op`` under autograd where a trace must see it, else its ``function`` itself, without the dispatcher's time."""
    if not tracing():
        return function

    def call(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def _backward_of(name: str):
    """What computes the gradient for x of ``name``: in a backward that is itself differentiated, ops that can be."""
    if torch.is_grad_enabled():
        return getattr(reference, f"{name}_backward")
    return _below(*_BACKWARDS[name])


_BACKWARDS = {
    "dots": (_OPS.dot_interaction_backward, _dots_backward),
    "products": (_OPS.pair_products_backward, _products_backward),
    "fm": (_OPS.fm_backward, _fm_backward),
}


@torch.library.register_fake("tablewright::dot_interaction_backward", lib=LIBRARY)
@torch.library.register_fake("tablewright::pair_products_backward", lib=LIBRARY)
@torch.library.register_fake("tablewright::fm_backward", lib=LIBRARY)
def _fake_backward(grad, x, *options):
    return x.new_empty(x.shape)


for _name, _kernel, _backward, _autograd in (
    ("dot_interaction", _dots, _dots_backward, _dots_autograd),
    ("pair_products", _products, _products_backward, _products_autograd),
    ("fm", _fm, _fm_backward, _fm_autograd),
):
    for _device in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _kernel, _device)
        LIBRARY.impl(f"{_name}_backward", _backward, _device)
    LIBRARY.impl(_name, _autograd, "Autograd")

DOT_INTERACTION = _OPS.dot_interaction.default
PAIR_PRODUCTS = _OPS.pair_products.default
FM = _OPS.fm.default
