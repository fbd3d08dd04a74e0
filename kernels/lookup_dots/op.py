"""``tablewright::lookup_dots``: a dot interaction that looks its features up itself, so that the rows never reach memory.

::

    lookup_dots(rows, tables, indices, dense, extras, spec, pairs, place=0, multiple=1, dtype=None, constants=None, digest="")
    -> [batch, sum of widths]

``spec`` describes the lookups (plain ones, ids ``[batch]``, all of one width, in one slot), as for ``embedding_bags``; ``tables``,
``indices`` and ``dense`` are what that op takes as tables, indices and extras. ``rows`` is that op's slot, left ``unmade``: nothing is read from it, but it
takes the gradient of the looked-up rows back to the op that knows what each table's is. ``dtype`` is that of the result; by default what
``torch.cat`` of rows and extras would give, and autocast's under autocast. The rest is as in ``dot_interaction``.

The backward looks the rows up again, so a table that changed since the forward is an error (a plain lookup would have kept the old
rows). Differentiable once in ``rows`` and ``extras``; a backward that is differentiated again runs through plain PyTorch ops. Raises what
``embedding_bags`` raises for bad ids, ``IndexError`` for a pair outside the features, ``RuntimeError`` if a constant changed.
"""
from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..embedding import reference as embedding
from ..embedding.spec import decode
from ..interaction import pairs as pairings
from ..interaction import reference as interaction
from ..interaction.constants import unchanged
from ..interaction.op import extra_grads, joined
from ..library import DIRECT, LIBRARY, tracing
from . import cpu
from .reference import features, rows_of

LIBRARY.define(
    "lookup_dots(Tensor rows, Tensor[] tables, Tensor[] indices, Tensor[] dense, Tensor[] extras, str spec, str pairs, int place=0,"
    ' int multiple=1, ScalarType? dtype=None, Tensor[]? constants=None, str digest="") -> Tensor'
)
LIBRARY.define(
    "lookup_dots_backward(Tensor grad, Tensor[] tables, Tensor[] indices, Tensor[] dense, str spec, str pairs) -> Tensor"
)


def implementation(device: torch.device):
    """The module whose functions run on ``device``."""
    if device.type == "cpu":
        return cpu
    from . import gpu  # Triton is imported only where a GPU asks for it

    return gpu


def _result_type(tables, dense, extras, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or functools.reduce(torch.promote_types, (t.dtype for t in (*dense, *extras)), tables[0].dtype)


def _forward(
    rows, tables, indices, dense, extras, spec: str, pairs: str, place: int = 0, multiple: int = 1, dtype=None, constants=None,
    digest: str = "",
) -> Tensor:  # fmt: skip
    unchanged(constants, digest)
    parsed, chosen = decode(spec), pairings.decode(pairs)
    pairings.check(chosen, features(parsed)[0])
    run = implementation(tables[0].device)
    made = _result_type(tables, dense, extras, dtype)
    out, part, beside = joined(run, indices[0], extras, len(chosen), place, multiple, made)
    run.dots(parsed, tables, indices, [d.to(tables[0].dtype) for d in dense], pairs, part, beside)
    return out


def _backward(grad: Tensor, tables, indices, dense, spec: str, pairs: str) -> Tensor:
    """The gradient of the looked-up rows, ``[batch, features * width]``."""
    dense = [d.to(tables[0].dtype) for d in dense]
    return implementation(tables[0].device).dots_backward(grad, decode(spec), tables, indices, dense, pairs)


class _LookupDots(torch.autograd.Function):
    """Tensor inputs: rows, then tables, ids and dense tensors (``counts``), then extras."""

    @staticmethod
    def forward(ctx, spec, pairs, place, multiple, dtype, constants, digest, counts, rows, *tensors):
        tables, indices, dense, extras = _split(counts, tensors)
        ctx.save_for_backward(*tables, *indices, *dense, rows)
        options = spec, pairs, place, multiple, dtype, constants, digest
        ctx.call = spec, pairs, place, counts, [(e.shape[1], e.dtype) for e in extras]
        if tracing():
            with torch._C._AutoDispatchBelowAutograd():
                return torch.ops.tablewright.lookup_dots(rows, tables, indices, dense, extras, *options)
        return _forward(rows, tables, indices, dense, extras, *options)

    @staticmethod
    def backward(ctx, grad):
        spec, pairs, place, counts, extras = ctx.call
        tables, indices, dense, (rows,) = _split(counts, ctx.saved_tensors)
        count = len(pairings.decode(pairs))
        first = sum(width for width, _ in extras[:place])
        d_rows = None
        part = grad.narrow(1, first, count)
        if ctx.needs_input_grad[8] and torch.is_grad_enabled():
            # The rows' own derivatives travel through ``rows`` as well, which is zero.
            x = rows_of(embedding, decode(spec), tables, indices, [d.to(tables[0].dtype) for d in dense])
            d_rows = interaction.dots_backward(part, x + rows.view(x.shape), pairs).flatten(1)
        elif ctx.needs_input_grad[8]:
            run = torch.ops.tablewright.lookup_dots_backward if tracing() else _backward
            d_rows = run(part, tables, indices, dense, spec, pairs)
        nothing = (None,) * sum(counts)
        return (None,) * 8 + (d_rows, *nothing, *extra_grads(grad, extras, count, place, ctx.needs_input_grad[9 + sum(counts) :]))


def _split(counts, tensors) -> tuple[list[Tensor], ...]:
    parts, start = [], 0
    for count in counts:
        parts.append(list(tensors[start : start + count]))
        start += count
    return (*parts, list(tensors[start:]))


def _autograd(rows, tables, indices, dense, extras, spec, pairs, place=0, multiple=1, dtype=None, constants=None, digest="") -> Tensor:
    kind = tables[0].device.type
    if dtype is None and torch.is_autocast_enabled(kind) and tables[0].dtype != torch.float64:
        dtype = functools.reduce(torch.promote_types, (e.dtype for e in extras), torch.get_autocast_dtype(kind))
    if not torch.is_grad_enabled() and not tracing():
        return _forward(rows, tables, indices, dense, extras, spec, pairs, place, multiple, dtype, constants, digest)
    counts = len(tables), len(indices), len(dense)
    given = [t.detach() for t in (*tables, *dense)]  # their gradients travel through ``rows``
    tables, dense = given[: len(tables)], given[len(tables) :]
    options = spec, pairs, place, multiple, dtype, constants, digest
    return _LookupDots.apply(*options, counts, rows, *tables, *indices, *dense, *extras)


@torch.library.register_fake("tablewright::lookup_dots", lib=LIBRARY)
def _fake(rows, tables, indices, dense, extras, spec, pairs, place=0, multiple=1, dtype=None, constants=None, digest=""):
    width = sum(e.shape[1] for e in extras) + len(pairings.decode(pairs))
    shape = indices[0].shape[0], -(-width // multiple) * multiple
    return tables[0].new_empty(shape, dtype=_result_type(tables, dense, extras, dtype))


@torch.library.register_fake("tablewright::lookup_dots_backward", lib=LIBRARY)
def _fake_backward(grad, tables, indices, dense, spec, pairs):
    return tables[0].new_empty((indices[0].shape[0], decode(spec).slots[0]))


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("lookup_dots", _forward, _device)
    LIBRARY.impl("lookup_dots_backward", _backward, _device)
LIBRARY.impl("lookup_dots", _autograd, "Autograd")

OP = torch.ops.tablewright.lookup_dots.default


def call(rows, tables, indices, dense, extras, spec, pairs, place=0, multiple=1, dtype=None, constants=None, digest="") -> Tensor:
    """:data:`OP` without the trip through torch's dispatcher, wherever nothing needs to see the op."""
    run = OP if torch.compiler.is_compiling() or tracing() else _autograd
    return run(rows, tables, indices, dense, extras, spec, pairs, place, multiple, dtype, constants, digest)


DIRECT[OP] = call
